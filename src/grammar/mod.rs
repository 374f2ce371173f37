//! Languages that generated text is held to: JSON schemas, regular expressions, Lark and GBNF grammars.
//!
//! The crate `llguidance` compiles them and says what may follow; here is what stands between it and a
//! model's vocabulary. A [`Grammar`] is a [`Constraint`] of texts in the tokens of one [`Tokenizer`]:
//! give it to [`crate::Settings::constraint`]. What is made of a vocabulary, some tens of megabytes for
//! a large one, is made once and kept with its tokenizer.
//!
//! A text may be spelled by different tokens, and a grammar says nothing of that: every spelling of a
//! text that goes on well is allowed. So a token is forced only where no other token may follow, and the
//! text's distribution is the target's own, restricted to tokens that may follow and renormalised at
//! each step. (`llguidance` can do more, and force the tokens that a tokenizer would give forced
//! *bytes*. That is faster, but takes the choice between spellings from the model, so it is not used.)
//! Two things are no choice of spelling: of tokens with the same bytes the first may follow alone, and a
//! token for a single byte that is also a piece of text may not follow.
//!
//! Control tokens may follow only where a grammar names them, and those that end a text where it may
//! end.

mod gbnf;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::{StopReason, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher as Parser, ParserFactory};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::lm::Token;
use crate::sampling::{Constraint, Mask, Matcher};
use crate::tokenizer::{TokenType, Tokenizer};

/// Longer sources are refused before anybody reads them.
const MOST_BYTES: usize = 1 << 20;
/// Deeper schemas are refused: they are compiled by recursion.
const MOST_NESTING: usize = 128;
/// Tokens of more bytes are never part of a held text; the trie has no room for them.
const LONGEST_TOKEN: usize = 1000;
/// The most nodes of a trie.
const MOST_NODES: usize = (1 << 22) - 1;
/// The most rules of a grammar, or values of a schema.
const MOST_RULES: usize = 20_000;
/// Rules are compiled by recursion, which takes so much of the stack for each.
const STACK_OF_RULE: usize = 24 << 10;
/// Of so many rules there is room on any stack.
const FEW_RULES: usize = 16;
/// States of a lexer, of one to two kilobytes each.
const MOST_LEXER_STATES: usize = 50_000;

/// Between the parts of JSON stands at most a space, or a new line and its indentation: a model
/// that may write spaces without an end sometimes does.
const JSON_WHITESPACE: &str = r"\x20|\n[\x20\t]{0,20}";

/// A language of texts, in the tokens of one vocabulary. Cloning is cheap.
#[derive(Clone)]
pub struct Grammar {
    compiled: Arc<Compiled>,
}

struct Compiled {
    /// At the start of a text.
    start: Mutex<Parser>,
    notes: Vec<String>,
    tokenizer: Tokenizer,
    environment: Arc<Environment>,
}

/// What is made of a vocabulary.
struct Environment {
    factory: ParserFactory,
    /// The tokens that end a text.
    ends: Vec<Token>,
    /// The one of them where nothing else may follow.
    end: Token,
}

impl Grammar {
    /// Texts that are JSON and fit a schema (2020-12 and the drafts before it, as far as `llguidance`
    /// goes; keys that it does not know are refused). Properties come in the order of the schema. Between
    /// the parts of a text stands at most a space, or a new line with its indentation, unless the schema
    /// says otherwise under `x-guidance`.
    ///
    /// # Errors
    /// [`Error::Grammar`] for a schema that is none, that nothing fits, or that is too complex;
    /// [`Error::Unsupported`] for a vocabulary that no text can be held in.
    pub fn json_schema(schema: &Value, tokenizer: &Tokenizer) -> Result<Self> {
        let what = "the JSON schema";
        let rules = check_nesting(what, schema)?;
        let mut schema = match schema {
            Value::Bool(true) => json!({}),
            Value::Object(_) => schema.clone(),
            Value::Bool(false) => return Err(refused(what, "is false, which nothing fits")),
            _ => return Err(refused(what, "is neither an object nor true")),
        };
        if let Some(fields) = schema.as_object_mut() {
            let options = json!({ "whitespace_pattern": JSON_WHITESPACE });
            fields.entry("x-guidance").or_insert(options);
        }
        Self::compile(what, TopLevelGrammar::from_json_schema(schema), rules, tokenizer)
    }

    /// Texts that are any JSON object.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a vocabulary that no text can be held in.
    pub fn json_object(tokenizer: &Tokenizer) -> Result<Self> {
        Self::json_schema(&json!({ "type": "object" }), tokenizer)
    }

    /// Texts that match a regular expression as a whole, in the syntax of the crate `regex`, without
    /// look-around and word boundaries. Anchors at its start and end change nothing.
    ///
    /// # Errors
    /// As [`Grammar::json_schema`].
    pub fn regex(regex: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let what = "the regular expression";
        check_size(what, regex)?;
        let inner = regex.strip_prefix('^').unwrap_or(regex);
        let escaped = |text: &str| text.bytes().rev().take_while(|&b| b == b'\\').count() % 2 == 1;
        let inner = match inner.strip_suffix('$') {
            Some(before) if !escaped(before) => before,
            _ => inner,
        };
        if inner.is_empty() {
            return Err(refused(what, "is empty"));
        }
        Self::compile(what, TopLevelGrammar::from_regex(inner), 1, tokenizer)
    }

    /// Texts of a grammar in the variant of Lark's syntax that `llguidance` has. Its first rule is
    /// `start`.
    ///
    /// # Errors
    /// As [`Grammar::json_schema`]; also for `max_tokens` and `stop`, from which there is no way back.
    pub fn lark(grammar: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let what = "the Lark grammar";
        check_size(what, grammar)?;
        Self::compile_lark(what, grammar.to_owned(), tokenizer)
    }

    /// Texts of a grammar in GBNF, llama.cpp's syntax. Its first rule is `root`.
    ///
    /// # Errors
    /// As [`Grammar::json_schema`]; also for what cannot be said in Lark: tokens that are not named but
    /// excluded.
    pub fn gbnf(grammar: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let what = "the GBNF grammar";
        check_size(what, grammar)?;
        let named =
            |name: &str| (0..tokenizer.len() as Token).find(|&id| tokenizer.token(id) == name);
        let lark = gbnf::to_lark(grammar, &named).map_err(|why| refused(what, &why))?;
        Self::compile_lark(what, lark, tokenizer)
    }

    /// What a person should know of how the grammar was read.
    pub fn notes(&self) -> &[String] {
        &self.compiled.notes
    }

    fn compile_lark(what: &str, grammar: String, tokenizer: &Tokenizer) -> Result<Self> {
        // There is a colon in each.
        let rules = grammar.matches(':').count();
        Self::compile(what, TopLevelGrammar::from_lark(grammar), rules, tokenizer)
    }

    /// Compiles a grammar of at most so many rules.
    fn compile(
        what: &str,
        grammar: TopLevelGrammar,
        rules: usize,
        tokenizer: &Tokenizer,
    ) -> Result<Self> {
        if rules > MOST_RULES {
            return Err(refused(
                what,
                format!("has {rules} rules or more; {MOST_RULES} are allowed"),
            ));
        }
        let environment = Environment::of(tokenizer)?;
        let create = || environment.factory.create_parser(grammar);
        let created = match rules {
            0..=FEW_RULES => create(),
            _ => with_stack(rules * STACK_OF_RULE, create)
                .ok_or_else(|| refused(what, "is too large for a thread of this system"))?,
        };
        let parser = created.map_err(|e| refused(what, e))?;
        if !parser.parser.grammar().lexer_spec().can_rollback() {
            return Err(refused(what, "has max_tokens or stop, which are not supported"));
        }
        let mut start = Parser::new(Ok(parser));
        if let Some(error) = start.get_error() {
            return Err(refused(what, error));
        }
        let notes = start.grammar_warnings();
        let mut place = Place { parser: start.clone(), environment: environment.clone() };
        // A language without any text is found at its start.
        place.allow(&mut Mask::default()).map_err(|e| refused(what, e))?;
        let (start, tokenizer) = (Mutex::new(start), tokenizer.clone());
        Ok(Grammar { compiled: Arc::new(Compiled { start, notes, tokenizer, environment }) })
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").field("notes", &self.compiled.notes).finish_non_exhaustive()
    }
}

impl Constraint for Grammar {
    fn matcher(&self) -> Result<Box<dyn Matcher>> {
        let start = self.compiled.start.lock().unwrap_or_else(PoisonError::into_inner);
        let environment = self.compiled.environment.clone();
        Ok(Box::new(Place { parser: start.clone(), environment }))
    }

    fn is_end(&self, token: Token) -> bool {
        self.compiled.tokenizer.is_end(token)
    }
}

/// A place in a text.
struct Place {
    parser: Parser,
    environment: Arc<Environment>,
}

impl Matcher for Place {
    fn advance(&mut self, token: Token) -> Result<()> {
        self.parser.consume_token(token).map_err(|e| Error::Grammar(sentence(e)))
    }

    fn retreat(&mut self, tokens: usize) -> Result<()> {
        self.parser.rollback(tokens).map_err(|e| Error::Grammar(sentence(e)))
    }

    fn allow(&mut self, mask: &mut Mask) -> Result<()> {
        let Environment { factory, ends, end } = &*self.environment;
        let complete = [StopReason::NoExtension, StopReason::EndOfSentence];
        if complete.contains(&self.parser.stop_reason()) {
            mask.allow(*end);
            return Ok(());
        }
        let found = self.parser.compute_mask().map_err(|e| match sentence(e) {
            name if name == StopReason::NoExtensionBias.to_string() => nothing_follows(),
            why => Error::Grammar(why),
        });
        mask.assign(found?.as_slice());
        // What lies beyond the vocabulary stands for nodes of the trie that are no token.
        mask.forbid(factory.tok_env().tok_trie().vocab_size() as Token);
        let may_end = self.parser.is_accepting().map_err(|e| Error::Grammar(sentence(e)))?;
        if !may_end {
            ends.iter().for_each(|&end| mask.forbid(end));
        }
        match mask.tokens().next() {
            Some(_) => Ok(()),
            None => Err(nothing_follows()),
        }
    }
}

impl Environment {
    /// That of a vocabulary, made where there is none yet.
    fn of(tokenizer: &Tokenizer) -> Result<Arc<Self>> {
        let made = tokenizer.kept(|| Self::new(tokenizer).map(Arc::new).map_err(|e| e.to_string()));
        match made {
            Some(Ok(environment)) => Ok(Arc::clone(environment)),
            Some(Err(why)) => Err(Error::unsupported("vocabulary", why.as_str())),
            None => Self::new(tokenizer).map(Arc::new),
        }
    }

    fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let unsupported = |what: String| Error::unsupported("vocabulary", what);
        let tokens = tokenizer.len() as Token;
        let ends: Vec<Token> = (0..tokens).filter(|&id| tokenizer.is_end(id)).collect();
        let Some(end) = tokenizer.eos().or(ends.first().copied()) else {
            let what = "has no token that ends a text, so that none can be held to a grammar";
            return Err(unsupported(what.to_owned()));
        };
        let words = words(tokenizer);
        let mut sorted: Vec<&[u8]> = words.iter().map(|word| &word[..]).collect();
        sorted.sort_unstable();
        let new = |pair: &[&[u8]]| {
            let shared = pair[0].iter().zip(pair[1]).take_while(|(a, b)| a == b).count();
            pair[1].len() - shared
        };
        let nodes = 1 + sorted.windows(2).map(new).sum::<usize>() + sorted[0].len();
        if nodes > MOST_NODES || tokens >= 1 << 24 {
            return Err(unsupported(format!(
                "is too large to be held to a grammar: {tokens} tokens, a trie of {nodes} nodes"
            )));
        }
        let trie = TokTrie::from(&TokRxInfo::new(tokens, end), &words).with_eos_tokens(&ends);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory =
            ParserFactory::new_simple(&tokens).map_err(|e| unsupported(sentence(e)))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.verbose_errors = false;
        limits.max_lexer_states = MOST_LEXER_STATES;
        Ok(Environment { factory, ends, end })
    }
}

/// The bytes of each token as a part of a held text; none if it never is. Control tokens have their
/// name behind a byte that no text has.
fn words(tokenizer: &Tokenizer) -> Vec<Vec<u8>> {
    const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
    let mut words = vec![Vec::new(); tokenizer.len()];
    let mut taken: HashMap<Vec<u8>, Token> = HashMap::new();
    // Single bytes last, so that pieces of text go before them.
    for bytes in [false, true] {
        for (id, word) in (0..).zip(&mut words) {
            let kind = tokenizer.token_type(id).unwrap_or(TokenType::Undefined);
            if (kind == TokenType::Byte) != bytes {
                continue;
            }
            let mut piece = tokenizer.piece(id);
            let is_text = !(kind.is_special() || kind == TokenType::Unused || tokenizer.is_end(id));
            if is_text && piece.first() == Some(&MARKER) || piece.is_empty() {
                continue;
            }
            if !is_text {
                piece.insert(0, MARKER);
            }
            if piece.len() <= LONGEST_TOKEN && !taken.contains_key(&piece) {
                taken.insert(piece.clone(), id);
                *word = piece;
            }
        }
    }
    words
}

fn check_size(what: &str, source: &str) -> Result<()> {
    match source.len() {
        0..=MOST_BYTES => Ok(()),
        len => Err(refused(what, format!("has {len} bytes; {MOST_BYTES} are allowed"))),
    }
}

/// Runs `work` on a thread with so much stack; `None` if there is none to be had.
fn with_stack<T: Send>(bytes: usize, work: impl FnOnce() -> T + Send) -> Option<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size((1 << 20) + bytes);
        thread.spawn_scoped(scope, work).ok()?.join().ok()
    })
}

/// Refuses a schema that is too deep or too large. Returns how many values it has.
fn check_nesting(what: &str, schema: &Value) -> Result<usize> {
    let (mut bytes, mut count) = (0, 0);
    let mut left = vec![(schema, 0)];
    while let Some((value, depth)) = left.pop() {
        if depth > MOST_NESTING {
            return Err(refused(what, format!("is nested more than {MOST_NESTING} deep")));
        }
        (bytes, count) = (bytes + 1, count + 1);
        match value {
            Value::Array(values) => left.extend(values.iter().map(|value| (value, depth + 1))),
            Value::Object(fields) => {
                bytes += fields.keys().map(String::len).sum::<usize>();
                left.extend(fields.values().map(|value| (value, depth + 1)));
            }
            Value::String(text) => bytes += text.len(),
            _ => {}
        }
        if bytes > MOST_BYTES {
            return Err(refused(what, format!("has more than {MOST_BYTES} bytes")));
        }
    }
    Ok(count)
}

/// The error of a place where the text neither goes on nor ends.
fn nothing_follows() -> Error {
    Error::Grammar("no token of the vocabulary may follow, and the text may not end".to_owned())
}

/// The error of a source that cannot be used.
fn refused(what: &str, why: impl fmt::Display) -> Error {
    Error::Grammar(format!("{what} cannot be used: {}", sentence(why)))
}

/// What `llguidance` says, without what it adds for those who look for a fault in it.
fn sentence(error: impl fmt::Display) -> String {
    let text = error.to_string();
    let end = ["\n<backtrace>", "\n<state>", "\n<non-verbose/>"]
        .into_iter()
        .filter_map(|mark| text.find(mark))
        .min();
    text[..end.unwrap_or(text.len())].trim_end().to_owned()
}
