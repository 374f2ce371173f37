//! Text held to a grammar, on the built-in pair: every strategy keeps to it, and ends where it ends.
#![cfg(all(feature = "builtin-pair", feature = "grammar"))]

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use mtad::decode::{CostTable, Settings, Strategy};
use mtad::grammar::Grammar;
use mtad::lm::Token;
use mtad::sampling::{Constraint, Guide, Path};
use mtad::tokenizer::Tokenizer;
use mtad::{Error, LoadOptions, Origin, Pair, Request, SessionOptions, StopReason, Warp};
use serde_json::{Value, json};

fn pair() -> &'static Pair {
    static PAIR: OnceLock<Pair> = OnceLock::new();
    PAIR.get_or_init(|| {
        let options =
            LoadOptions { threads: 2, device: "cpu".to_owned(), ..LoadOptions::default() };
        Pair::builtin(true, &options, &mut |_, _| true).unwrap()
    })
}

fn tokenizer() -> &'static Tokenizer {
    pair().tokenizer()
}

fn all() -> impl Iterator<Item = Strategy> {
    Strategy::ALL.into_iter().map(|(strategy, _)| strategy)
}

fn request(strategy: Strategy, grammar: &Arc<Grammar>, seed: u64) -> Request {
    let costs = CostTable::new(vec![(1, 10.0), (32, 20.0)], vec![(1, 1.0), (8, 1.2)]).unwrap();
    let settings = Settings {
        strategy,
        costs: Some(Arc::new(costs)),
        constraint: Some(grammar.clone()),
        seed,
        ..Settings::default()
    };
    Request { settings, max_tokens: Some(150), ..Request::default() }
}

const PROMPT: &str = "Once upon a time there was a little dog. His name was";

/// A text with its tokens, where they are from, why it ended and how many rounds it took.
struct Told {
    text: String,
    tokens: Vec<Token>,
    origins: Vec<Origin>,
    stop: StopReason,
    rounds: u64,
    forced: u64,
}

fn generate(request: &Request) -> Result<Told, Error> {
    let mut session = pair().session(&SessionOptions::default())?;
    let mut generation = session.generate(PROMPT, request)?;
    let (mut text, mut origins) = (String::new(), Vec::new());
    for piece in generation.by_ref() {
        let piece = piece?;
        text.push_str(&piece.text);
        origins.extend(piece.token.map(|_| piece.origin));
    }
    Ok(Told {
        text,
        tokens: generation.tokens().to_vec(),
        origins,
        stop: generation.stop_reason().unwrap(),
        rounds: generation.statistics().rounds(),
        forced: generation.statistics().forced,
    })
}

/// Whether a text is one of the grammar, byte for byte, and may end there.
fn accepts(grammar: &Arc<Grammar>, text: &str) -> bool {
    let guide = Guide::new(grammar.clone(), 0);
    // The bytes one by one if the vocabulary spells them so, else as it does.
    let tokens: Vec<Token> = spelled(text);
    let ends = |mask: &mtad::sampling::Mask| mask.tokens().any(|t| grammar.is_end(t));
    guide.follows(&tokens) && ends(&guide.mask(Path { text: &tokens, ..Path::default() }))
}

/// A text in the longest tokens that it begins with.
fn spelled(text: &str) -> Vec<Token> {
    static PIECES: OnceLock<Vec<(Vec<u8>, Token)>> = OnceLock::new();
    let pieces = PIECES.get_or_init(|| {
        let ids = 0..tokenizer().len() as Token;
        let is_text = |&id: &Token| {
            let kind = tokenizer().token_type(id).unwrap();
            !kind.is_special() && kind != mtad::tokenizer::TokenType::Byte
        };
        let mut pieces: Vec<_> = ids
            .clone()
            .filter(is_text)
            .chain(ids.filter(|id| !is_text(id)))
            .filter(|&id| !tokenizer().token_type(id).unwrap().is_special())
            .map(|id| (tokenizer().piece(id), id))
            .filter(|(piece, _)| !piece.is_empty())
            .collect();
        pieces.sort_by_key(|(piece, _)| std::cmp::Reverse(piece.len()));
        pieces
    });
    let mut left = text.as_bytes();
    let mut tokens = Vec::new();
    while !left.is_empty() {
        let (piece, id) = pieces.iter().find(|(piece, _)| left.starts_with(piece)).unwrap();
        left = &left[piece.len()..];
        tokens.push(*id);
    }
    tokens
}

#[test]
fn every_strategy_keeps_to_a_regular_expression() {
    let grammar = Arc::new(
        Grammar::regex("^ (Max|Spot|Bob)\\. (He|She) was [a-z]{1,12}!$", tokenizer()).unwrap(),
    );
    let form = |text: &str| {
        let name = ["Max", "Spot", "Bob"]
            .into_iter()
            .find_map(|name| text.strip_prefix(&format!(" {name}. ")))
            .unwrap();
        let rest = name.strip_prefix("He was ").or_else(|| name.strip_prefix("She was ")).unwrap();
        let word = rest.strip_suffix('!').unwrap();
        assert!((1..=12).contains(&word.len()), "{text:?}");
        assert!(word.bytes().all(|b| b.is_ascii_lowercase()), "{text:?}");
    };
    for strategy in all() {
        for seed in 0..12 {
            let told = generate(&request(strategy, &grammar, seed)).unwrap();
            form(&told.text);
            assert_eq!(told.stop, StopReason::Eos, "{strategy}");
            assert!(grammar.is_end(*told.tokens.last().unwrap()), "{strategy}");
            assert_eq!(told.origins.len(), told.tokens.len());
        }
    }
}

fn dogs() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": { "enum": ["Max", "Spot", "Bob"] },
            "age": { "type": "integer", "minimum": 1, "maximum": 15 },
            "likes": {
                "type": "array",
                "items": { "type": "string", "pattern": "^[a-z]{2,8}$" },
                "minItems": 1,
                "maxItems": 3
            },
            "home": {
                "type": "object",
                "properties": { "big": { "type": "boolean" }, "door": { "enum": ["red", null] } },
                "required": ["big", "door"],
                "additionalProperties": false
            }
        },
        "required": ["name", "age", "likes", "home"],
        "additionalProperties": false
    })
}

fn is_dog(text: &str) {
    let dog: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text:?}: {e}"));
    let fields = dog.as_object().unwrap();
    assert_eq!(fields.len(), 4, "{text}");
    assert!(["Max", "Spot", "Bob"].contains(&dog["name"].as_str().unwrap()), "{text}");
    assert!((1..=15).contains(&dog["age"].as_i64().unwrap()), "{text}");
    let likes = dog["likes"].as_array().unwrap();
    assert!((1..=3).contains(&likes.len()), "{text}");
    for like in likes {
        assert!((2..=8).contains(&like.as_str().unwrap().len()), "{text}");
    }
    assert!(dog["home"]["big"].is_boolean(), "{text}");
    assert!(dog["home"]["door"] == "red" || dog["home"]["door"].is_null(), "{text}");
}

#[test]
fn every_strategy_keeps_to_a_json_schema() {
    let grammar = Arc::new(Grammar::json_schema(&dogs(), tokenizer()).unwrap());
    let (mut texts, mut complete) = (0, 0);
    for strategy in all() {
        for (seed, temperature) in [(1, 1.0), (2, 0.0), (3, 1.5), (4, 0.7)] {
            let mut request = request(strategy, &grammar, seed);
            request.max_tokens = Some(300);
            request.settings.warp = Warp { temperature, top_p: 0.95, ..Warp::default() };
            request.settings.score = seed == 4;
            let told = generate(&request).unwrap();
            texts += 1;
            if told.stop == StopReason::Eos {
                is_dog(&told.text);
                complete += 1;
            } else {
                assert!(Guide::new(grammar.clone(), 0).follows(&told.tokens), "{strategy}");
            }
            let forced = told.origins.iter().filter(|&&o| o == Origin::Forced).count() as u64;
            assert_eq!(forced, told.forced);
            if request.settings.score || strategy == Strategy::Beam {
                assert_eq!(forced, 0);
            }
        }
    }
    assert!(complete > texts / 2, "{complete} of {texts}");
}

#[test]
fn at_temperature_0_drafts_do_not_change_the_text() {
    let grammar = Arc::new(Grammar::json_schema(&dogs(), tokenizer()).unwrap());
    let text = |strategy| {
        let mut request = request(strategy, &grammar, 1);
        request.settings.warp.temperature = 0.0;
        generate(&request).unwrap().tokens
    };
    let greedy = text(Strategy::Greedy);
    for strategy in all().filter(|s| !matches!(s, Strategy::Beam | Strategy::Mtjd)) {
        assert_eq!(text(strategy), greedy, "{strategy}");
    }
}

#[test]
fn forced_tokens_come_without_passes() {
    // A text of single letters that no other tokens spell.
    let grammar = Arc::new(Grammar::regex("[0-9]Q#Q#Q#Q#", tokenizer()).unwrap());
    for strategy in all().filter(|&strategy| strategy != Strategy::Beam) {
        let told = generate(&request(strategy, &grammar, 3)).unwrap();
        let forced = told.origins.iter().filter(|&&origin| origin == Origin::Forced).count();
        assert_eq!(forced as u64, told.forced);
        println!("{strategy}: {:?}, {} rounds, {forced} forced", told.text, told.rounds);
        assert!(told.rounds <= 2 && forced > 0, "{strategy}");
        assert_eq!(told.origins.last(), Some(&Origin::Forced));
    }
}

#[test]
fn a_text_that_is_left_goes_on_with_its_grammar() {
    let grammar = Arc::new(Grammar::json_schema(&dogs(), tokenizer()).unwrap());
    let file = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("grammar.session");
    for strategy in [Strategy::Sample, Strategy::Mtad, Strategy::Speculative] {
        // Enough for the whole of it, white space included.
        let request = Request { max_tokens: Some(400), ..request(strategy, &grammar, 5) };
        let whole = generate(&request).unwrap();
        let mut session = pair().session(&SessionOptions::default()).unwrap();
        let request = Request { max_tokens: Some(7), ..request };
        let mut text = String::new();
        let mut generation = session.generate(PROMPT, &request).unwrap();
        text.extend(generation.by_ref().map(|piece| piece.unwrap().text));
        let mut stop = generation.stop_reason();
        let mut turns = 0;
        while stop == Some(StopReason::MaxTokens) {
            turns += 1;
            match turns % 3 {
                1 => {
                    session.save(&file).unwrap();
                    session = pair().load_session(&file, &SessionOptions::default()).unwrap();
                }
                2 => session = session.try_clone().unwrap(),
                _ => {}
            }
            let mut generation = session.resume(&request).unwrap();
            text.extend(generation.by_ref().map(|piece| piece.unwrap().text));
            stop = generation.stop_reason();
            assert!(turns < 60);
        }
        assert_eq!(stop, Some(StopReason::Eos));
        assert_eq!(text, whole.text, "{strategy}");
    }
}

#[test]
fn another_grammar_begins_where_the_text_was_left() {
    let grammar = |regex| Arc::new(Grammar::regex(regex, tokenizer()).unwrap());
    let mut session = pair().session(&SessionOptions::default()).unwrap();
    let first =
        Request { max_tokens: Some(3), ..request(Strategy::Mtad, &grammar("[a-z ]{20,40}"), 1) };
    session.generate(PROMPT, &first).unwrap().for_each(|piece| drop(piece.unwrap()));
    let second = request(Strategy::Mtad, &grammar("[0-9]{4}"), 1);
    let text: String = session.resume(&second).unwrap().map(|piece| piece.unwrap().text).collect();
    assert!(text.len() == 4 && text.bytes().all(|b| b.is_ascii_digit()), "{text:?}");
}

#[test]
fn gbnf_is_what_it_is_in_llama_cpp() {
    let accepts = |source: &str, fits: &[&str], not: &[&str]| {
        let grammar = Arc::new(Grammar::gbnf(source, tokenizer()).unwrap());
        for text in fits {
            assert!(self::accepts(&grammar, text), "{source}: {text:?} should fit");
        }
        for text in not {
            assert!(!self::accepts(&grammar, text), "{source}: {text:?} should not fit");
        }
    };
    // Where a lexer that takes the longest would go wrong.
    accepts("root ::= [a-z]+ \"a\"", &["aa", "cba"], &["a", "ab"]);
    accepts("root ::= [a-z]+ | \"ab\" \"1\"", &["abc", "ab", "ab1"], &["abc1"]);
    accepts("root ::= \"(\" root \")\" | [a-z]+ \"ab\"", &["(cab)", "abab"], &["(ab)", "(cab"]);
    accepts(
        "root ::= \"a\"{2,3} \"b\"{2} \"c\"{1,} d?\nd ::= \"d\"",
        &["aabbc", "aaabbccd"],
        &["abbc", "aabc"],
    );
    accepts("root ::= [^a-y\\n]{2} .", &["zzz", "ÄZ\n"], &["azz", "zz"]);
    accepts("root ::= \"\\x41\\u00e9\\U0001F600\\t\\\"\"", &["Aé😀\t\""], &["A"]);
    accepts(
        "root  ::= (expr \"=\" ws term \"\\n\")+\nexpr  ::= term ([-+*/] term)*\n\
         term  ::= ident | num | \"(\" ws expr \")\" ws\nident ::= [a-z] [a-z0-9_]* ws\n\
         num   ::= [0-9]+ ws\nws    ::= [ \\t\\n]*",
        &["1+2=3\n", "(a1 +2) *b = c\nx=1\n"],
        &["1+2=3", "1+=2\n"],
    );
    accepts(
        r#"root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws

# Optional space: by convention, applied in this grammar after literal chars when allowed
ws ::= | " " | "\n" [ \t]{0,20}
"#,
        &["{}", r#"{"a": [1, -2.5e3, "é\n\u00e9"], "b": {"c": null}}"#, "{\n  \"a\": true\n}\n"],
        &["[]", "{", r#"{"a": 01x}"#, r#"{"a":1 2}"#, "{}  "],
    );
    accepts(
        r#"root ::= (
    # it must start with the characters "1. "
    "1. " move " " move "\n"
    ([1-9] [0-9]? ". " move " " move "\n")+
)
move ::= (pawn | nonpawn | castle) [+#]?
nonpawn ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
pawn ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
castle ::= "O-O" "-O"?
"#,
        &["1. e4 e5\n2. Nf3 Nc6\n", "1. e4 e5\n2. O-O-O Qxf7#\n"],
        &["1. e4 e5\n", "1. e9 e5\n2. a4 a5\n"],
    );
}

#[test]
fn every_strategy_keeps_to_a_recursive_grammar() {
    let source = "root ::= \" \" expr \"\\n\"\nexpr ::= term | term [-+] expr\nterm ::= [0-9]{1,2} | \"(\" expr \")\"";
    let gbnf = Arc::new(Grammar::gbnf(source, tokenizer()).unwrap());
    let lark = "start: \" \" expr \"\\n\"\nexpr: term | term (\"+\" | \"-\") expr\nterm: /[0-9]{1,2}/ | \"(\" expr \")\"";
    let lark = Arc::new(Grammar::lark(lark, tokenizer()).unwrap());
    for grammar in [gbnf, lark] {
        for strategy in all() {
            for seed in 0..3 {
                let told = generate(&request(strategy, &grammar, seed)).unwrap();
                if told.stop == StopReason::Eos {
                    assert!(accepts(&grammar, &told.text), "{strategy}: {:?}", told.text);
                    assert!(told.text.starts_with(' ') && told.text.ends_with('\n'));
                }
            }
        }
    }
}

#[test]
fn what_cannot_be_used_is_refused_in_words() {
    let refused = |made: Result<Grammar, Error>, what: &str| {
        let error = made.unwrap_err();
        assert!(matches!(error, Error::Grammar(_)), "{error:?}");
        let text = error.to_string();
        println!("{text}\n");
        assert!(text.contains(what), "{text}");
        assert!(!text.contains("backtrace") && text.len() < 1000, "{text}");
    };
    let t = tokenizer();
    refused(Grammar::regex("(", t), "the regular expression cannot be used");
    refused(Grammar::regex("", t), "is empty");
    refused(Grammar::regex("a(?=b)", t), "cannot be used");
    refused(Grammar::regex("[^\\x00-\\u{10ffff}]", t), "cannot be used");
    refused(Grammar::lark("start: b", t), "the Lark grammar cannot be used");
    refused(Grammar::lark("", t), "cannot be used");
    refused(Grammar::lark("start: a\na[stop=\"x\"]: /.*/", t), "not supported");
    refused(
        Grammar::gbnf("root ::= a", t),
        "the GBNF grammar cannot be used: there is no rule `a`",
    );
    refused(Grammar::gbnf("root ::= root \"a\"", t), "cannot be used");
    refused(Grammar::json_schema(&json!(false), t), "which nothing fits");
    refused(Grammar::json_schema(&json!([1]), t), "neither an object nor true");
    refused(Grammar::json_schema(&json!({"type": "strange"}), t), "cannot be used");
    refused(
        Grammar::json_schema(&json!({"type": "integer", "minimum": 3, "maximum": 2}), t),
        "cannot be used",
    );
    refused(Grammar::json_schema(&json!({"$ref": "http://elsewhere/schema"}), t), "cannot be used");
    assert!(Grammar::json_schema(&json!(true), t).is_ok());
    assert!(Grammar::json_object(t).is_ok());
}

#[test]
fn hostile_sources_take_bounded_time() {
    let t = tokenizer();
    let nested = |depth: usize| {
        let mut schema = json!({ "type": "null" });
        for _ in 0..depth {
            let mut outer = serde_json::Map::new();
            outer.insert("items".to_owned(), schema);
            schema = Value::Object(outer);
        }
        schema
    };
    let chain =
        |rules: usize, rule: &dyn Fn(usize) -> String| -> String { (0..rules).map(rule).collect() };
    let huge = json!({ "type": "string", "maxLength": 10_000_000 });
    let many: Value = (0..3000).map(|i| (format!("key{i}"), json!({ "type": "string" }))).collect();
    type Make<'a> = Box<dyn Fn() -> Result<Grammar, Error> + 'a>;
    let cases: Vec<(&str, Make)> = vec![
        ("nested parentheses", Box::new(|| Grammar::regex(&"(".repeat(200_000), t))),
        (
            "nested groups",
            Box::new(|| Grammar::regex(&format!("{}a{}", "(".repeat(240), ")".repeat(240)), t)),
        ),
        ("repeated repetition", Box::new(|| Grammar::regex("((a{1,1000}){1,1000}){1,1000}", t))),
        ("an exponential automaton", Box::new(|| Grammar::regex("(a|b)*a(a|b){500}c", t))),
        (
            "many alternatives",
            Box::new(|| {
                let words: Vec<String> = (0..50_000).map(|i| format!("word{i}")).collect();
                Grammar::regex(&words.join("|"), t)
            }),
        ),
        (
            "nested Lark",
            Box::new(|| Grammar::lark(&format!("start: {}\"a\"", "(".repeat(100_000)), t)),
        ),
        (
            "a chain of rules",
            Box::new(|| {
                let rules = chain(50_000, &|i| format!("r{i}: \"a\" r{}\n", i + 1));
                Grammar::lark(&format!("start: r0\n{rules}r50000: \"b\"\n"), t)
            }),
        ),
        (
            "a chain of tokens",
            Box::new(|| {
                let rules = chain(30_000, &|i| format!("T{i}: \"a\" T{}\n", i + 1));
                Grammar::lark(&format!("start: T0\n{rules}T30000: \"b\"\n"), t)
            }),
        ),
        (
            "doubling tokens",
            Box::new(|| {
                let rules = chain(60, &|i| format!("T{i}: T{} T{}\n", i + 1, i + 1));
                Grammar::lark(&format!("start: T0\n{rules}T60: \"b\"\n"), t)
            }),
        ),
        (
            "a chain of GBNF rules",
            Box::new(|| {
                let rules = chain(30_000, &|i| format!("r{i} ::= \"a\" r{}\n", i + 1));
                Grammar::gbnf(&format!("root ::= r0\n{rules}r30000 ::= \"b\"\n"), t)
            }),
        ),
        (
            "doubling GBNF",
            Box::new(|| {
                let rules = chain(50, &|i| format!("r{i} ::= r{} r{}\n", i + 1, i + 1));
                Grammar::gbnf(&format!("root ::= r0\n{rules}r50 ::= \"b\" | root\n"), t)
            }),
        ),
        (
            "an ambiguous grammar",
            Box::new(|| Grammar::gbnf("root ::= root root | \"a\" | \"b\"", t)),
        ),
        ("a deep schema", Box::new(|| Grammar::json_schema(&nested(60), t))),
        ("a deeper schema", Box::new(|| Grammar::json_schema(&nested(1000), t))),
        ("a long string", Box::new(|| Grammar::json_schema(&huge, t))),
        (
            "many keys",
            Box::new(|| Grammar::json_schema(&json!({ "type": "object", "properties": many }), t)),
        ),
    ];
    for (name, make) in cases {
        let start = Instant::now();
        let made = make();
        let compiled = start.elapsed();
        let text = match &made {
            Ok(_) => "compiles".to_owned(),
            Err(error) => error.to_string().chars().take(150).collect(),
        };
        println!("{name}: {:.3} s, {text}", compiled.as_secs_f64());
        assert!(compiled.as_secs_f64() < 20.0, "{name}");
        if let Ok(grammar) = made {
            let grammar = Arc::new(grammar);
            let start = Instant::now();
            let request = Request { max_tokens: Some(20), ..request(Strategy::Mmtad, &grammar, 1) };
            let text = match generate(&request) {
                Ok(told) => format!("{:?}", told.text.chars().take(60).collect::<String>()),
                Err(error) => error.to_string().chars().take(150).collect(),
            };
            println!("  {:.3} s, {text}", start.elapsed().as_secs_f64());
            assert!(start.elapsed().as_secs_f64() < 60.0, "{name}");
        }
    }
}
