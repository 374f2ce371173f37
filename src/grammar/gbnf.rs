//! GBNF, llama.cpp's syntax for grammars, as Lark.
//!
//! A grammar in GBNF is one of characters; Lark's has lexemes, and of two lexemes that fit the longer is
//! taken. So a grammar whose rules do not refer to themselves becomes one regular expression, and any
//! other has a lexeme for each character, of which none is longer than another: both are the same
//! language as before.

use std::collections::HashMap;
use std::fmt::Write;

use crate::lm::Token;

/// The most that groups may be nested.
const MOST_NESTING: usize = 64;
/// The longest chain of rules of a grammar that becomes one expression.
const LONGEST_CHAIN: usize = 64;
/// The largest number of repetitions.
const MOST_REPETITIONS: u32 = 2000;

/// What a rule or a group says.
#[derive(Debug, PartialEq)]
enum Node {
    /// One of these characters, or none of them.
    Chars {
        ranges: Vec<(char, char)>,
        negated: bool,
    },
    /// Characters in their order; none are an empty text.
    Literal(String),
    Rule(usize),
    Token(Token),
    Sequence(Vec<Node>),
    Choice(Vec<Node>),
    Repeat(Box<Node>, u32, Option<u32>),
}

/// The same language in Lark. `named` finds a token by its text.
///
/// # Errors
/// What is wrong, with the line.
pub(super) fn to_lark(
    source: &str,
    named: &dyn Fn(&str) -> Option<Token>,
) -> Result<String, String> {
    let mut parser =
        Parser { source, at: 0, named, numbers: HashMap::new(), names: vec![], rules: vec![] };
    parser.grammar()?;
    let Parser { numbers, names, rules, .. } = parser;
    let undefined = rules.iter().position(Option::is_none);
    if let Some(rule) = undefined {
        return Err(format!("there is no rule `{}`", names[rule]));
    }
    let Some(&root) = numbers.get("root") else {
        return Err("there is no rule `root`, with which a grammar begins".to_owned());
    };
    let rules: Vec<Node> = rules.into_iter().flatten().collect();
    let mut out = Writer { lark: String::new(), groups: rules.len(), regular: is_regular(&rules) };
    let name = |writer: &Writer, rule: usize| writer.name(rule);
    _ = writeln!(out.lark, "start: {}", name(&out, root));
    let mut left: Vec<(usize, &Node)> = rules.iter().enumerate().collect();
    while let Some((rule, node)) = left.pop() {
        let text = out.choice(node, &mut left);
        let name = out.name(rule);
        _ = writeln!(out.lark, "{name}: {text}");
    }
    Ok(out.lark)
}

/// Whether no rule leads to itself, there are no tokens, and chains of rules are short.
fn is_regular(rules: &[Node]) -> bool {
    fn children<'n>(node: &'n Node, found: &mut Vec<&'n Node>) {
        match node {
            Node::Sequence(nodes) | Node::Choice(nodes) => found.extend(nodes),
            Node::Repeat(node, ..) => found.push(node),
            _ => {}
        }
    }
    let mut references: Vec<Vec<usize>> = Vec::new();
    for rule in rules {
        let mut found = Vec::new();
        let mut left = vec![rule];
        while let Some(node) = left.pop() {
            match node {
                Node::Token(_) => return false,
                Node::Rule(rule) => found.push(*rule),
                node => children(node, &mut left),
            }
        }
        references.push(found);
    }
    // Rules whose references are all on lower levels get the next level.
    let mut level: Vec<Option<usize>> = vec![None; rules.len()];
    for current in 0..LONGEST_CHAIN {
        let ready = |rule: &usize| {
            let below = |&other: &usize| level[other].is_some_and(|level| level < current);
            level[*rule].is_none() && references[*rule].iter().all(below)
        };
        let found: Vec<usize> = (0..rules.len()).filter(ready).collect();
        found.iter().for_each(|&rule| level[rule] = Some(current));
        if found.is_empty() {
            break;
        }
    }
    level.iter().all(Option::is_some)
}

/// Writes rules, and groups as rules of their own.
struct Writer {
    lark: String,
    /// The number of rules and groups so far.
    groups: usize,
    /// Whether all of it becomes one regular expression.
    regular: bool,
}

impl Writer {
    fn name(&self, rule: usize) -> String {
        let letter = if self.regular { 'T' } else { 'r' };
        format!("{letter}{rule}")
    }

    /// What stands behind a rule's colon. Groups in it are left to be written.
    fn choice<'n>(&mut self, node: &'n Node, left: &mut Vec<(usize, &'n Node)>) -> String {
        let ways = match node {
            Node::Choice(ways) => &ways[..],
            node => std::slice::from_ref(node),
        };
        let ways: Vec<String> = ways.iter().map(|way| self.sequence(way, left)).collect();
        ways.join(" | ")
    }

    fn sequence<'n>(&mut self, node: &'n Node, left: &mut Vec<(usize, &'n Node)>) -> String {
        let parts = match node {
            Node::Sequence(parts) => &parts[..],
            node => std::slice::from_ref(node),
        };
        let parts: Vec<String> = parts.iter().map(|part| self.part(part, left)).collect();
        parts.join(" ")
    }

    fn part<'n>(&mut self, node: &'n Node, left: &mut Vec<(usize, &'n Node)>) -> String {
        match node {
            Node::Chars { ranges, negated } => {
                let mut class = String::from(if *negated { "/[^" } else { "/[" });
                for (from, to) in ranges {
                    _ = write!(class, r"\x{{{:x}}}-\x{{{:x}}}", u32::from(*from), u32::from(*to));
                }
                class + "]/"
            }
            Node::Literal(text) => {
                let char = |c: char| format!(r"/[\x{{{:x}}}]/", u32::from(c));
                let chars: Vec<String> = text.chars().map(char).collect();
                chars.join(" ")
            }
            Node::Rule(rule) => self.name(*rule),
            Node::Token(token) => format!("<[{token}]>"),
            Node::Repeat(node, min, max) => {
                // Of more than one part a repetition takes the last.
                let one = match &**node {
                    node @ (Node::Chars { .. } | Node::Rule(_) | Node::Token(_)) => {
                        self.part(node, left)
                    }
                    node => self.group(node, left),
                };
                match (min, max) {
                    (_, Some(0)) => String::new(),
                    (0, None) => format!("{one}*"),
                    (1, None) => format!("{one}+"),
                    (0, Some(1)) => format!("{one}?"),
                    (min, None) => format!("{one}{{{min},}}"),
                    (min, Some(max)) => format!("{one}{{{min},{max}}}"),
                }
            }
            node @ (Node::Sequence(_) | Node::Choice(_)) => self.group(node, left),
        }
    }

    fn group<'n>(&mut self, node: &'n Node, left: &mut Vec<(usize, &'n Node)>) -> String {
        let rule = self.groups;
        self.groups += 1;
        left.push((rule, node));
        self.name(rule)
    }
}

struct Parser<'a> {
    source: &'a str,
    /// In bytes.
    at: usize,
    named: &'a dyn Fn(&str) -> Option<Token>,
    numbers: HashMap<String, usize>,
    names: Vec<String>,
    rules: Vec<Option<Node>>,
}

impl Parser<'_> {
    fn grammar(&mut self) -> Result<(), String> {
        self.space(true);
        while self.peek().is_some() {
            let rule = self.rule_number()?;
            self.space(false);
            if !self.take("::=") {
                return Err(self.wrong("`::=` is missing behind a rule's name"));
            }
            self.space(true);
            let node = self.choice(0)?;
            if !matches!(self.peek(), None | Some('\n' | '\r')) {
                return Err(self.wrong("a rule goes on with what is none of GBNF"));
            }
            if self.rules[rule].is_some() {
                return Err(self.wrong(&format!("rule `{}` is there twice", self.names[rule])));
            }
            self.rules[rule] = Some(node);
            self.space(true);
        }
        Ok(())
    }

    fn choice(&mut self, depth: usize) -> Result<Node, String> {
        if depth > MOST_NESTING {
            return Err(self.wrong(&format!("groups are nested more than {MOST_NESTING} deep")));
        }
        let mut ways = vec![self.sequence(depth)?];
        while self.take("|") {
            self.space(true);
            ways.push(self.sequence(depth)?);
        }
        Ok(match ways.len() {
            1 => ways.remove(0),
            _ => Node::Choice(ways),
        })
    }

    fn sequence(&mut self, depth: usize) -> Result<Node, String> {
        let mut parts = Vec::new();
        loop {
            match self.peek() {
                Some('"') => parts.push(self.literal()?),
                Some('[') => parts.push(self.class()?),
                Some('.') => {
                    self.at += 1;
                    parts.push(Node::Chars { ranges: vec![('\0', char::MAX)], negated: false });
                }
                Some('(') => {
                    self.at += 1;
                    self.space(true);
                    parts.push(self.choice(depth + 1)?);
                    if !self.take(")") {
                        return Err(self.wrong("`)` is missing"));
                    }
                }
                Some('<') => parts.push(self.token()?),
                Some('!') => {
                    let what = "tokens that are excluded (`!<...>`) are not supported";
                    return Err(self.wrong(what));
                }
                Some('*' | '+' | '?' | '{') => {
                    let (min, max) = self.repetition()?;
                    let Some(last) = parts.pop() else {
                        return Err(self.wrong("there is nothing to repeat"));
                    };
                    parts.push(Node::Repeat(Box::new(last), min, max));
                }
                Some(c) if is_word(c) => {
                    let rule = self.rule_number()?;
                    parts.push(Node::Rule(rule));
                }
                _ => break,
            }
            self.space(depth > 0);
        }
        Ok(match parts.len() {
            0 => Node::Literal(String::new()),
            1 => parts.remove(0),
            _ => Node::Sequence(parts),
        })
    }

    fn literal(&mut self) -> Result<Node, String> {
        self.at += 1;
        let mut text = String::new();
        loop {
            match self.peek() {
                Some('"') => break,
                None => return Err(self.wrong("a text is not closed by `\"`")),
                Some(_) => text.push(self.char()?),
            }
        }
        self.at += 1;
        Ok(Node::Literal(text))
    }

    fn class(&mut self) -> Result<Node, String> {
        self.at += 1;
        let negated = self.take("^");
        let mut ranges = Vec::new();
        loop {
            match self.peek() {
                Some(']') => break,
                None => return Err(self.wrong("a set of characters is not closed by `]`")),
                Some(_) => {}
            }
            let from = self.char()?;
            let rest = &self.source[self.at..];
            let to = match rest.starts_with('-') && !rest.starts_with("-]") {
                true => {
                    self.at += 1;
                    self.char()?
                }
                false => from,
            };
            if to < from {
                return Err(self.wrong("a range of characters ends before it begins"));
            }
            ranges.push((from, to));
        }
        self.at += 1;
        match (ranges.is_empty(), negated) {
            (true, false) => Err(self.wrong("a set of characters is empty")),
            (true, true) => Ok(Node::Chars { ranges: vec![('\0', char::MAX)], negated: false }),
            _ => Ok(Node::Chars { ranges, negated }),
        }
    }

    /// A character of a text or a set, perhaps escaped.
    fn char(&mut self) -> Result<char, String> {
        let Some(c) = self.peek() else { return Err(self.wrong("a character is missing")) };
        self.at += c.len_utf8();
        if c != '\\' {
            return Ok(c);
        }
        let Some(c) = self.peek() else { return Err(self.wrong("a character is missing")) };
        self.at += c.len_utf8();
        match c {
            't' => Ok('\t'),
            'r' => Ok('\r'),
            'n' => Ok('\n'),
            '\\' | '"' | '[' | ']' | '-' | '^' | '/' => Ok(c),
            'x' => self.hex(2),
            'u' => self.hex(4),
            'U' => self.hex(8),
            _ => Err(self.wrong(&format!("there is no escape `\\{c}`"))),
        }
    }

    fn hex(&mut self, digits: usize) -> Result<char, String> {
        let text = self.source.get(self.at..self.at + digits).unwrap_or_default();
        let is_hex = !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
        let code = is_hex.then(|| u32::from_str_radix(text, 16).ok()).flatten();
        match code.and_then(char::from_u32) {
            Some(c) => {
                self.at += digits;
                Ok(c)
            }
            None => Err(self.wrong(&format!("{digits} hexadecimal digits of a character are due"))),
        }
    }

    fn token(&mut self) -> Result<Node, String> {
        let rest = &self.source[self.at..];
        let Some(end) = rest.find('>') else { return Err(self.wrong("`>` is missing")) };
        let inner = &rest[1..end];
        let number = inner.strip_prefix('[').and_then(|inner| inner.strip_suffix(']'));
        let token = match number {
            Some(number) => number.parse().ok(),
            None => (self.named)(&rest[..=end]),
        };
        let Some(token) = token else {
            return Err(self.wrong(&format!("there is no token `{}`", &rest[..=end])));
        };
        self.at += end + 1;
        Ok(Node::Token(token))
    }

    fn repetition(&mut self) -> Result<(u32, Option<u32>), String> {
        let sign = self.peek();
        self.at += 1;
        match sign {
            Some('*') => return Ok((0, None)),
            Some('+') => return Ok((1, None)),
            Some('?') => return Ok((0, Some(1))),
            _ => {}
        }
        self.space(true);
        let min = self.number()?;
        self.space(true);
        let max = match self.take(",") {
            false => Some(min.ok_or_else(|| self.wrong("a number of repetitions is missing"))?),
            true => {
                self.space(true);
                self.number()?
            }
        };
        self.space(true);
        if !self.take("}") {
            return Err(self.wrong("`}` is missing"));
        }
        let min = min.unwrap_or(0);
        if max.is_some_and(|max| max < min) {
            return Err(self.wrong("the largest number of repetitions is below the smallest"));
        }
        Ok((min, max))
    }

    fn number(&mut self) -> Result<Option<u32>, String> {
        let rest = &self.source[self.at..];
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 {
            return Ok(None);
        }
        match rest[..digits].parse::<u32>() {
            Ok(number) if number <= MOST_REPETITIONS => {
                self.at += digits;
                Ok(Some(number))
            }
            _ => Err(self.wrong(&format!("more than {MOST_REPETITIONS} repetitions"))),
        }
    }

    /// The number of the rule that is named here.
    fn rule_number(&mut self) -> Result<usize, String> {
        let rest = &self.source[self.at..];
        let len = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
        if len == 0 {
            return Err(self.wrong("the name of a rule is due"));
        }
        self.at += len;
        let name = &rest[..len];
        if let Some(&number) = self.numbers.get(name) {
            return Ok(number);
        }
        let number = self.names.len();
        self.numbers.insert(name.to_owned(), number);
        self.names.push(name.to_owned());
        self.rules.push(None);
        Ok(number)
    }

    fn peek(&self) -> Option<char> {
        self.source[self.at..].chars().next()
    }

    fn take(&mut self, text: &str) -> bool {
        let found = self.source[self.at..].starts_with(text);
        self.at += if found { text.len() } else { 0 };
        found
    }

    /// Skips spaces and comments, and new lines where they may stand.
    fn space(&mut self, newlines: bool) {
        loop {
            let rest = &self.source[self.at..];
            let is_space =
                |c: char| matches!(c, ' ' | '\t') || newlines && matches!(c, '\r' | '\n');
            let blank = rest.find(|c| !is_space(c)).unwrap_or(rest.len());
            let comment = match rest[blank..].starts_with('#') {
                true => rest[blank..].find(['\r', '\n']).unwrap_or(rest.len() - blank),
                false => 0,
            };
            self.at += blank + comment;
            if blank + comment == 0 {
                return;
            }
        }
    }

    fn wrong(&self, what: &str) -> String {
        let line = 1 + self.source[..self.at].matches('\n').count();
        format!("line {line}: {what}")
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lark(source: &str) -> Result<String, String> {
        to_lark(source, &|name| (name == "<think>").then_some(7))
    }

    #[test]
    fn rules_that_do_not_lead_to_themselves_are_one_expression() {
        let found = lark("root ::= \"a\" [b-d]? x{2,3} # more\nx ::= \"e\" |\n  [^f\\]]").unwrap();
        let lines: Vec<&str> = found.lines().collect();
        assert_eq!(
            lines,
            [
                "start: T0",
                r"T1: /[\x{65}]/ | /[^\x{66}-\x{66}\x{5d}-\x{5d}]/",
                r"T0: /[\x{61}]/ /[\x{62}-\x{64}]/? T1{2,3}",
            ]
        );
    }

    #[test]
    fn others_have_a_lexeme_for_each_character() {
        let found = lark("root ::= \"(\" root \")\" | (\"ab\" | <think>)* <[12]>").unwrap();
        let lines: Vec<&str> = found.lines().collect();
        assert_eq!(
            lines,
            [
                "start: r0",
                r"r0: /[\x{28}]/ r0 /[\x{29}]/ | r1* <[12]>",
                r"r1: /[\x{61}]/ /[\x{62}]/ | <[7]>",
            ]
        );
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (source, what) in [
            ("", "no rule `root`"),
            ("a ::= b", "no rule `b`"),
            ("a ::= \"b\"", "no rule `root`"),
            ("root ::= \"a", "line 1: a text is not closed"),
            ("root ::= [a", "line 1: a set of characters is not closed"),
            ("root ::= [b-a]", "ends before it begins"),
            ("root ::= []", "is empty"),
            ("root ::= (\"a\"", "`)` is missing"),
            ("root ::= \"a\")", "goes on with what is none of GBNF"),
            ("root ::= *", "nothing to repeat"),
            ("root ::= \"a\"{3,2}", "below the smallest"),
            ("root ::= \"a\"{99999}", "more than 2000"),
            ("root ::= \"a\"{1", "`}` is missing"),
            ("root ::= \"a\"{}", "a number of repetitions is missing"),
            ("root ::= \"\\q\"", "there is no escape `\\q`"),
            ("root ::= \"\\xZZ\"", "2 hexadecimal digits"),
            ("root ::= \"\\uD800\"", "4 hexadecimal digits"),
            ("root ::= \"\\x4é\"", "2 hexadecimal digits"),
            ("root ::= \"a\"\n\nroot ::= \"b\"", "line 3: rule `root` is there twice"),
            ("root : \"a\"", "`::=` is missing"),
            ("root ::= !<think>", "are not supported"),
            ("root ::= <none>", "there is no token `<none>`"),
            ("root ::= <[x]>", "there is no token"),
            ("root ::= <[1]", "`>` is missing"),
            ("?", "the name of a rule is due"),
        ] {
            let why = lark(source).unwrap_err();
            assert!(why.contains(what), "{source:?}: {why}");
        }
        let deep = format!("root ::= {}\"a\"{}", "(".repeat(100_000), ")".repeat(100_000));
        assert!(lark(&deep).unwrap_err().contains("nested more than"));
    }
}
