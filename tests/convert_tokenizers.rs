//! `mtad convert`: the tokenizers of checkpoint folders, in every form that they come in, against
//! llama.cpp's ids.

mod common;

use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use mtad::Error;
use mtad::convert::{Converted, convert};
use mtad::gguf::Gguf;
use mtad::tokenizer::{EncodeOptions, TokenType, Tokenizer};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use common::checkpoint::Checkpoint;
use common::{shared, vectors};

const PLAIN: EncodeOptions = EncodeOptions { bos: false, special: false };

/// A checkpoint without a tokenizer, to which files are added.
struct Place(TempDir);

impl Place {
    fn new(checkpoint: &Checkpoint) -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        checkpoint.write(&place.folder());
        place
    }

    /// A Llama whose output is the embedding.
    fn llama(vocab: usize) -> Self {
        Self::new(&Checkpoint::llama(vocab).with(json!({"tie_word_embeddings": true})))
    }

    fn folder(&self) -> PathBuf {
        self.0.path().join("model")
    }

    fn put(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.folder().join(name), content).unwrap();
    }

    fn json(&self, name: &str, content: &Value) {
        self.put(name, content.to_string());
    }

    fn remove(&self, name: &str) {
        std::fs::remove_file(self.folder().join(name)).unwrap();
    }

    fn try_convert(&self) -> Result<(Converted, Gguf), Error> {
        let out = self.0.path().join("out.gguf");
        let recipe = Some("F16".parse().unwrap());
        let converted = convert(&self.folder(), &out, recipe, &mut |_, _, _| true)?;
        Ok((converted, Gguf::open(out)?))
    }

    fn convert(&self) -> (Converted, Gguf) {
        self.try_convert().unwrap()
    }

    fn error(&self) -> String {
        let error = self.try_convert().unwrap_err().to_string();
        let files = std::fs::read_dir(self.0.path()).unwrap().count();
        assert_eq!(files, 1, "{error}");
        error
    }
}

/// A vocabulary of the reference data.
struct Reference {
    file: Gguf,
    tokens: Vec<String>,
    types: Vec<i64>,
}

impl Reference {
    fn open(name: &str) -> Option<Self> {
        let file = Gguf::open(shared(&format!("vectors/tokenizer/ggml-vocab-{name}.gguf"))?);
        let file = file.unwrap();
        let tokens = strings(&file, "tokenizer.ggml.tokens");
        let types = numbers(&file, "tokenizer.ggml.token_type");
        Some(Reference { file, tokens, types: types.into_iter().map(|x| x as i64).collect() })
    }

    fn vocab(&self) -> Map<String, Value> {
        (0u32..).zip(&self.tokens).map(|(id, text)| (text.clone(), id.into())).collect()
    }

    /// Merges as pairs of text.
    fn merges(&self) -> Vec<String> {
        strings(&self.file, "tokenizer.ggml.merges")
    }
}

fn strings(file: &Gguf, key: &str) -> Vec<String> {
    let array = file.get_array(key).unwrap().unwrap();
    array.iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

fn numbers(file: &Gguf, key: &str) -> Vec<f64> {
    let array = file.get_array(key).unwrap().unwrap();
    array.iter().map(|x| x.as_f64().or(x.as_i128().map(|x| x as f64)).unwrap()).collect()
}

/// Whether the ids of all reference texts are llama.cpp's.
fn check_ids(file: &Gguf, name: &str) {
    let tokenizer = Tokenizer::from_gguf(file).unwrap();
    let vectors = vectors(name);
    assert_eq!(vectors.len(), 246);
    for (text, ids) in vectors {
        assert_eq!(tokenizer.encode(&text, PLAIN), ids, "{text:?}");
    }
}

/// A protobuf field: its number, its wire type, and what follows.
fn field(number: u64, wire: u64, rest: &[u8]) -> Vec<u8> {
    let mut out = varint(number << 3 | wire);
    if wire == 2 {
        out.extend(varint(rest.len() as u64));
    }
    out.extend(rest);
    out
}

fn varint(mut x: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while x >= 0x80 {
        out.push(x as u8 | 0x80);
        x >>= 7;
    }
    out.push(x as u8);
    out
}

/// A SentencePiece model of type `kind` (2 is BPE).
fn sentencepiece(reference: &Reference, kind: u64) -> Vec<u8> {
    let scores = numbers(&reference.file, "tokenizer.ggml.scores");
    let mut out = Vec::new();
    for ((text, score), kind) in reference.tokens.iter().zip(scores).zip(&reference.types) {
        let piece = [
            field(1, 2, text.as_bytes()),
            field(2, 5, &(score as f32).to_le_bytes()),
            field(3, 0, &varint(*kind as u64)),
        ];
        out.extend(field(1, 2, &piece.concat()));
    }
    let trainer = [field(3, 0, &varint(kind)), field(40, 0, &varint(0))];
    out.extend(field(2, 2, &trainer.concat()));
    // No rewriting of characters; a space before texts; runs of spaces are kept.
    let normalizer = [field(1, 2, b"identity"), field(3, 0, &[1]), field(4, 0, &[0])];
    out.extend(field(3, 2, &normalizer.concat()));
    out
}

#[test]
fn a_sentencepiece_model_is_kept_as_it_is() {
    let Some(reference) = Reference::open("llama-spm") else { return };
    let place = Place::llama(32_000);
    place.put("tokenizer.model", sentencepiece(&reference, 2));
    let (converted, file) = place.convert();
    assert_eq!((converted.tokenizer, converted.notes), (Some(("llama", 32_000)), vec![]));
    for key in ["tokens", "scores", "token_type"] {
        let key = format!("tokenizer.ggml.{key}");
        assert!(file.get(&key) == reference.file.get(&key), "{key}");
    }
    check_ids(&file, "llama-spm");
    let tokenizer = Tokenizer::from_gguf(&file).unwrap();
    assert!(tokenizer.add_bos());
    let roles = (tokenizer.bos(), tokenizer.eos(), tokenizer.unk());
    assert_eq!(roles, (Some(1), Some(2), Some(0)));

    // The model's embedding has rows to spare: they become tokens that no text has.
    let place = Place::llama(32_064);
    place.put("tokenizer.model", sentencepiece(&reference, 2));
    place.json("added_tokens.json", &json!({"<|end|>": 32_001, "<more>": 32_002, "<x>": 99_999}));
    let (converted, file) = place.convert();
    assert_eq!(converted.tokenizer, Some(("llama", 32_002)));
    assert_eq!(converted.notes.len(), 1);
    assert!(converted.notes[0].contains("99999"), "{:?}", converted.notes);
    let tokenizer = Tokenizer::from_gguf(&file).unwrap();
    assert_eq!(tokenizer.len(), 32_064);
    for (id, text, kind) in [
        (32_000, "[PAD32000]", TokenType::Unused),
        (32_001, "<|end|>", TokenType::Control),
        (32_002, "<more>", TokenType::UserDefined),
        (32_063, "[PAD32063]", TokenType::Unused),
    ] {
        assert_eq!((tokenizer.token(id), tokenizer.token_type(id)), (text, Some(kind)));
    }
    assert_eq!(tokenizer.encode("a<more>b", PLAIN)[1], 32_002);
    check_ids(&file, "llama-spm");

    // What cannot be converted.
    let error = |bytes: &[u8], vocab| {
        let place = Place::llama(vocab);
        place.put("tokenizer.model", bytes);
        place.error()
    };
    let model = sentencepiece(&reference, 2);
    for (error, words) in [
        (error(&sentencepiece(&reference, 1), 32_000), "of type unigram; BPE is converted"),
        (error(b"{\"a\": 1}", 32_000), "is no SentencePiece model"),
        (error(&model[..model.len() / 2], 32_000), "is no SentencePiece model"),
        (error(&model, 31_999), "has 32000 tokens, but the model's embedding has 31999 rows"),
    ] {
        assert!(error.contains("model/tokenizer.model") && error.contains(words), "{error}");
    }
}

/// `tokenizer.json` of a SentencePiece vocabulary, which lists the merges that its scores mean.
fn sentencepiece_json(reference: &Reference) -> Value {
    let scores = numbers(&reference.file, "tokenizer.ggml.scores");
    let vocab = reference.vocab();
    let id = |text: &str| vocab.get(text).and_then(Value::as_u64);
    let is_text = |id: u64| reference.types[id as usize] == 1;
    let mut merges = Vec::new();
    for (whole, text) in reference.tokens.iter().enumerate().filter(|(id, _)| is_text(*id as u64)) {
        for (at, _) in text.char_indices().skip(1) {
            if let (Some(left), Some(right)) = (id(&text[..at]), id(&text[at..]))
                && is_text(left)
                && is_text(right)
            {
                merges.push((whole, left, right, [&text[..at], &text[at..]]));
            }
        }
    }
    merges.sort_by(|a, b| {
        let by_score = scores[b.0].total_cmp(&scores[a.0]);
        by_score.then((a.0, a.1, a.2).cmp(&(b.0, b.1, b.2)))
    });
    let added = ["<unk>", "<s>", "</s>"];
    let added = (0..).zip(added).map(|(id, text): (u32, _)| {
        json!({"id": id, "content": text, "special": true, "normalized": false})
    });
    json!({
        "version": "1.0",
        "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
        ]},
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": true,
            "vocab": vocab,
            "merges": merges.iter().map(|(.., pair)| pair.join(" ")).collect::<Vec<_>>(),
        },
    })
}

#[test]
fn tokenizer_json_of_a_sentencepiece_vocabulary_gives_the_same_ids() {
    let Some(reference) = Reference::open("llama-spm") else { return };
    let tokenizer = sentencepiece_json(&reference);
    let place = Place::llama(32_000);
    place.json("tokenizer.json", &tokenizer);
    place.json("tokenizer_config.json", &json!({"bos_token": "<s>", "eos_token": "</s>"}));
    let (converted, file) = place.convert();
    assert_eq!((converted.tokenizer, converted.notes), (Some(("llama", 32_000)), vec![]));
    for key in ["tokens", "token_type"] {
        let key = format!("tokenizer.ggml.{key}");
        assert!(file.get(&key) == reference.file.get(&key), "{key}");
    }
    check_ids(&file, "llama-spm");
    assert!(Tokenizer::from_gguf(&file).unwrap().add_bos(), "the template begins with <s>");

    // Merges that do not follow from scores are said, once.
    let mut other = tokenizer.clone();
    other["model"]["merges"].as_array_mut().unwrap().truncate(20_000);
    place.json("tokenizer.json", &other);
    let (converted, _) = place.convert();
    assert_eq!(converted.notes.len(), 1, "{:?}", converted.notes);
    assert!(converted.notes[0].contains("do not follow from the tokens"));

    // Without the template no text begins with <s>.
    let mut plain = tokenizer;
    plain["post_processor"] = Value::Null;
    place.json("tokenizer.json", &plain);
    assert!(!Tokenizer::from_gguf(&place.convert().1).unwrap().add_bos());
}

/// How `tokenizer.json` says that text is cut into words by a pattern.
fn cut_by(pattern: &str) -> Value {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
    ]})
}

/// The pattern that Qwen2 publishes, and Llama 3's.
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// `tokenizer.json` of GPT-2's vocabulary, cut as `pre_tokenizer` says.
fn byte_level_json(reference: &Reference, pre_tokenizer: Value) -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [{"id": 50_256, "content": "<|endoftext|>", "special": true}],
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false},
        "model": {
            "type": "BPE", "unk_token": null, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "vocab": reference.vocab(), "merges": reference.merges(),
        },
    })
}

fn gpt2_cuts() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true})
}

#[test]
fn byte_pairs_come_from_either_form() {
    let Some(reference) = Reference::open("gpt-2") else { return };
    let place = Place::llama(50_257);
    place.json("vocab.json", &Value::Object(reference.vocab()));
    place.put("merges.txt", format!("#version: 0.2\n{}\n", reference.merges().join("\n")));
    let class = json!({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"});
    place.json("tokenizer_config.json", &class);
    let mut digests = Vec::new();
    for form in ["vocab.json", "tokenizer.json", "pairs of merges"] {
        let mut tokenizer = byte_level_json(&reference, gpt2_cuts());
        if form == "pairs of merges" {
            // Newer files have two strings for a merge.
            for merge in tokenizer["model"]["merges"].as_array_mut().unwrap() {
                *merge = merge.as_str().unwrap().split(' ').collect();
            }
        }
        if form != "vocab.json" {
            place.json("tokenizer.json", &tokenizer);
        }
        let (converted, file) = place.convert();
        assert_eq!(converted.tokenizer, Some(("gpt2", 50_257)), "{form}");
        assert_eq!(converted.notes, [""; 0], "{form}");
        assert_eq!(file.get_str("tokenizer.ggml.pre").unwrap(), Some("gpt-2"), "{form}");
        for key in ["tokens", "merges"] {
            let key = format!("tokenizer.ggml.{key}");
            assert!(file.get(&key) == reference.file.get(&key), "{form}: {key}");
        }
        check_ids(&file, "gpt-2");
        let tokenizer = Tokenizer::from_gguf(&file).unwrap();
        assert_eq!(tokenizer.eos(), Some(50_256));
        assert_eq!(tokenizer.token_type(50_256), Some(TokenType::Control));
        assert!(!tokenizer.add_bos());
        digests.push(file.digest());
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]));
}

/// Whether every word is spelled by tokens of its own.
fn check_words(file: &Gguf, words: &[&str]) {
    let tokenizer = Tokenizer::from_gguf(file).unwrap();
    let ids = tokenizer.encode(&words.concat(), PLAIN);
    let apart: Vec<u32> = words
        .iter()
        .flat_map(|word| {
            // A word alone is one word, too: it is not cut further here.
            tokenizer.encode(word, PLAIN)
        })
        .collect();
    assert_eq!(ids, apart, "{words:?}");
}

#[test]
fn patterns_that_cut_words_are_known_by_name() {
    let Some(reference) = Reference::open("gpt-2") else { return };
    let place = Place::llama(50_257);
    let convert = |pre_tokenizer| {
        place.json("tokenizer.json", &byte_level_json(&reference, pre_tokenizer));
        place.convert()
    };
    let (_, qwen2) = convert(cut_by(QWEN2));
    assert_eq!(qwen2.get_str("tokenizer.ggml.pre").unwrap(), Some("qwen2"));
    // Digits one by one, punctuation with the word behind it, line ends with what is before them.
    check_words(
        &qwen2,
        &["In", " ", "2", "0", "2", "4", " I", "'LL", " pay", " ", "1", "0", "!\n\n"],
    );
    check_words(&qwen2, &["def", " f", "(x", "):\n", "   ", " return", "\t", "\n", "x"]);
    let tokenizer = Tokenizer::from_gguf(&qwen2).unwrap();
    let pieces = |tokenizer: &Tokenizer, text: &str| -> Vec<String> {
        let ids = tokenizer.encode(text, PLAIN);
        ids.iter().map(|&id| String::from_utf8(tokenizer.piece(id)).unwrap()).collect()
    };
    assert_eq!(pieces(&tokenizer, "1999 2000"), ["1", "9", "9", "9", " ", "2", "0", "0", "0"]);

    let (converted, llama3) = convert(cut_by(LLAMA3));
    assert_eq!(llama3.get_str("tokenizer.ggml.pre").unwrap(), Some("llama-bpe"));
    assert!(converted.notes[0].contains("ignore_merges"), "{:?}", converted.notes);
    let tokenizer = Tokenizer::from_gguf(&llama3).unwrap();
    assert_eq!(pieces(&tokenizer, "1999 2000"), ["199", "9", " ", "200", "0"]);
    let (_, gpt2) = convert(gpt2_cuts());
    let tokenizer = Tokenizer::from_gguf(&gpt2).unwrap();
    assert_eq!(pieces(&tokenizer, "1999 2000"), ["1999", " 2000"]);

    // A space of its own before the text, another pattern, another kind of model.
    let prefix = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true});
    let mut lower = byte_level_json(&reference, gpt2_cuts());
    lower["normalizer"] = json!({"type": "Lowercase"});
    let mut pieces = byte_level_json(&reference, gpt2_cuts());
    pieces["model"]["type"] = "WordPiece".into();
    for (tokenizer, words) in [
        (byte_level_json(&reference, prefix), &["`pre_tokenizer` is", "GPT-2, Llama 3 and Qwen2"]),
        (byte_level_json(&reference, cut_by(r"\w+")), &["\\w+", "GPT-2, Llama 3 and Qwen2"]),
        (lower, &["`normalizer` is", "rewrite no text"]),
        (pieces, &["`model.type` is \"WordPiece\"", "`BPE` is converted"]),
    ] {
        let place = Place::llama(50_257);
        place.json("tokenizer.json", &tokenizer);
        let error = place.error();
        assert!(error.contains("model/tokenizer.json"), "{error}");
        assert!(words.iter().all(|words| error.contains(words)), "{error}");
    }
}

/// A vocabulary of eight tokens in `vocab.json` and `merges.txt`.
fn small(place: &Place) {
    place.json("vocab.json", &json!({"a": 0, "b": 1, "Ġ": 2, "ab": 3, "<|end|>": 4, "Ġab": 5}));
    place.put("merges.txt", "#version: 0.2\na b\nĠ ab\n");
    place.json("tokenizer_config.json", &json!({"tokenizer_class": "GPT2Tokenizer"}));
}

#[test]
fn damaged_vocabularies_are_refused_by_file() {
    let put =
        |name: &'static str, content: &'static str| move |place: &Place| place.put(name, content);
    let remove = |name: &'static str| move |place: &Place| place.remove(name);
    type Change = Box<dyn Fn(&Place)>;
    let cases: [(Change, &str, &str); 13] = [
        (Box::new(remove("merges.txt")), "model", "has vocab.json but no merges.txt"),
        (Box::new(remove("vocab.json")), "model", "has merges.txt but no vocab.json"),
        (Box::new(put("vocab.json", "{")), "vocab.json", "no sound JSON"),
        (Box::new(put("vocab.json", "{}")), "vocab.json", "has no token"),
        (Box::new(put("vocab.json", r#"{"a": 0, "b": 0}"#)), "vocab.json", "the same id, 0"),
        (Box::new(put("vocab.json", r#"{"a": "x"}"#)), "vocab.json", "`a` is \"x\""),
        (Box::new(put("vocab.json", r#"{"a": 8}"#)), "vocab.json", "has 8 rows"),
        (Box::new(put("merges.txt", "a b\nab\n")), "merges.txt", "line 2 is \"ab\""),
        (Box::new(put("merges.txt", "a b\na b\n")), "merges.txt", "is there twice"),
        (Box::new(put("merges.txt", "b a\n")), "merges.txt", "there is no token \"ba\""),
        (
            Box::new(put("tokenizer_config.json", r#"{"tokenizer_class": "XTokenizer"}"#)),
            "model",
            "`XTokenizer` is not known",
        ),
        (Box::new(put("tokenizer_config.json", "{}")), "model", "tokenizer.json would say it"),
        (
            Box::new(put(
                "tokenizer_config.json",
                r#"{"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": true}"#,
            )),
            "tokenizer_config.json",
            "`add_prefix_space` is true",
        ),
    ];
    for (change, file, words) in cases {
        let place = Place::llama(8);
        small(&place);
        change(&place);
        let error = place.error();
        let named = place.0.path().join("model").join(if file == "model" { "" } else { file });
        let named = named.display().to_string();
        assert!(error.contains(named.trim_end_matches('/')), "{error}");
        assert!(error.contains(words), "{error} ({words})");
    }
    // An added token in the place of one that merges need, and of one that none does.
    let place = Place::llama(8);
    small(&place);
    place.json("added_tokens.json", &json!({"<tool>": 1}));
    let error = place.error();
    let words = "token 1 is \"b\", which merges need, and \"<tool>\" among the tokens";
    assert!(error.contains("vocab.json") && error.contains(words), "{error}");
    place.json("added_tokens.json", &json!({"<tool>": 4}));
    let (converted, _) = place.convert();
    assert_eq!(converted.notes, ["token 4, \"<|end|>\", becomes \"<tool>\""]);

    let place = Place::llama(8);
    small(&place);
    let (converted, file) = place.convert();
    assert_eq!(converted.tokenizer, Some(("gpt2", 6)));
    assert_eq!(Tokenizer::from_gguf(&file).unwrap().encode("ab ab", PLAIN), [3, 5]);
}

#[test]
fn roles_and_ends_of_texts_come_from_the_small_files() {
    let id =
        |file: &Gguf, name: &str| file.get_u64(&format!("tokenizer.ggml.{name}_token_id")).unwrap();
    let place = Place::llama(8);
    small(&place);
    // By the name in tokenizer_config.json, whatever the ids of the others are.
    place.json(
        "tokenizer_config.json",
        &json!({
            "tokenizer_class": "GPT2Tokenizer", "add_bos_token": true, "add_eos_token": false,
            "bos_token": {"content": "<|end|>"}, "eos_token": "<|turn|>", "pad_token": "none",
            "added_tokens_decoder": {
                "6": {"content": "<|turn|>", "special": true}, "7": {"content": "<tool>"},
            },
        }),
    );
    place.json("generation_config.json", &json!({"eos_token_id": [6, 4, 99], "pad_token_id": 2}));
    let (converted, file) = place.convert();
    assert_eq!((id(&file, "bos"), id(&file, "eos")), (Some(4), Some(6)));
    assert_eq!((id(&file, "eot"), id(&file, "eom")), (Some(4), None));
    assert_eq!(id(&file, "padding"), Some(2));
    assert_eq!(file.get_bool("tokenizer.ggml.add_eos_token").unwrap(), Some(false));
    assert!(converted.notes.iter().any(|note| note.contains("`pad_token` is \"none\"")));
    let tokenizer = Tokenizer::from_gguf(&file).unwrap();
    assert!(tokenizer.add_bos() && tokenizer.is_end(4) && tokenizer.is_end(6));
    assert_eq!(tokenizer.token_type(6), Some(TokenType::Control));
    assert_eq!(tokenizer.token_type(7), Some(TokenType::UserDefined));
    assert_eq!(tokenizer.encode("ab<tool>ab<|turn|>", PLAIN)[..3], [3, 7, 3]);

    // Without names: the ids of the model's own config.
    let config = json!({"tie_word_embeddings": true, "bos_token_id": 4, "eos_token_id": 5});
    let place = Place::new(&Checkpoint::llama(8).with(config));
    small(&place);
    let (_, file) = place.convert();
    assert_eq!((id(&file, "bos"), id(&file, "eos")), (Some(4), Some(5)));
    assert_eq!(id(&file, "unknown"), None);
}

#[test]
fn chat_templates_are_carried_over_from_wherever_they_stand() {
    let template = |file: &Gguf, key: &str| {
        let key = format!("tokenizer.chat_template{key}");
        file.get_str(&key).unwrap().map(str::to_owned)
    };
    let place = Place::llama(8);
    small(&place);
    let (_, file) = place.convert();
    assert_eq!(template(&file, ""), None);

    let config = |chat| json!({"tokenizer_class": "GPT2Tokenizer", "chat_template": chat});
    place.json("tokenizer_config.json", &config(json!("{{ messages }}")));
    assert_eq!(template(&place.convert().1, "").as_deref(), Some("{{ messages }}"));

    let several = json!([
        {"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"},
    ]);
    place.json("tokenizer_config.json", &config(several));
    let (_, file) = place.convert();
    assert_eq!(template(&file, "").as_deref(), Some("one"));
    assert_eq!(template(&file, ".tool_use").as_deref(), Some("two"));
    assert_eq!(strings(&file, "tokenizer.chat_templates"), ["tool_use"]);

    place.json("chat_template.json", &json!({"chat_template": "json"}));
    assert_eq!(template(&place.convert().1, "").as_deref(), Some("json"));
    place.put("chat_template.jinja", "{% if äöü %}\n");
    assert_eq!(template(&place.convert().1, "").as_deref(), Some("{% if äöü %}\n"));

    place.put("chat_template.jinja", b"\xff\xfe");
    let error = place.try_convert().unwrap_err().to_string();
    assert!(is_named(&error, &place.folder().join("chat_template.jinja")), "{error}");
    place.remove("chat_template.jinja");
    place.remove("chat_template.json");
    place.json("tokenizer_config.json", &config(json!(7)));
    let error = place.try_convert().unwrap_err().to_string();
    assert!(error.contains("`chat_template` is 7; a template is needed"), "{error}");
}

fn is_named(error: &str, file: &Path) -> bool {
    error.contains(&file.display().to_string())
}

/// JSON pointers to everything in a value.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    let mut visit = |key: &str, inner: &Value| {
        let key = key.replace('~', "~0").replace('/', "~1");
        let pointer = format!("{at}/{key}");
        pointers(inner, &pointer, found);
        found.push(pointer);
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(key, inner)| visit(key, inner)),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(i, inner)| visit(&i.to_string(), inner));
        }
        _ => {}
    }
}

#[test]
fn odd_values_in_the_files_of_a_tokenizer_do_no_harm() {
    let vocab = json!({"a": 0, "b": 1, "Ġ": 2, "ab": 3, "<|end|>": 4, "Ġab": 5});
    let byte_level = json!({
        "added_tokens": [{"id": 4, "content": "<|end|>", "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "pre_tokenizer": cut_by(QWEN2),
        "post_processor": {"type": "Sequence", "processors": [{
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|end|>"}}],
        }]},
        "model": {
            "type": "BPE", "unk_token": "a", "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": ["a b", ["Ġ", "ab"]],
        },
    });
    let sentencepiece = json!({
        "added_tokens": [{"id": 0, "content": "<unk>", "special": true}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null,
        "model": {
            "type": "BPE", "unk_token": "<unk>", "byte_fallback": true,
            "vocab": {"<unk>": 0, "<0x41>": 1, "▁": 2, "a": 3, "▁a": 4}, "merges": ["▁ a"],
        },
    });
    let config = json!({
        "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": true, "add_eos_token": false,
        "add_prefix_space": false, "bos_token": {"content": "<|end|>"}, "eos_token": "<|turn|>",
        "chat_template": [{"name": "default", "template": "x"}],
        "additional_special_tokens": ["<|turn|>"],
        "added_tokens_decoder": {"6": {"content": "<|turn|>", "special": true}},
    });
    let generation = json!({"eos_token_id": [6, 4], "bos_token_id": 4});
    let odd = json!([
        null, true, -1, 0, 7, 8, 18_446_744_073_709_551_615u64, 0.5, "", "x", "<|turn|>", "▁", [],
        [1], ["a"], {}, {"type": "NFC"}, {"content": "b"}
    ]);
    let place = Place::llama(8);
    let mut nothing = sentencepiece.clone();
    nothing["model"]["unk_token"] = Value::Null;
    place.json("tokenizer.json", &nothing);
    let error = place.error();
    assert!(error.contains("neither an unknown token nor one for every byte"), "{error}");

    let (mut fine, mut refused, mut wrong) = (0, 0, Vec::new());
    for tokenizer in [byte_level, sentencepiece] {
        let files = [
            ("tokenizer.json", &tokenizer),
            ("tokenizer_config.json", &config),
            ("special_tokens_map.json", &json!({"pad_token": "b", "unk_token": {"content": "a"}})),
            ("added_tokens.json", &json!({"<tool>": 7})),
            ("generation_config.json", &generation),
        ];
        files.iter().for_each(|(name, content)| place.json(name, content));
        place.convert();
        for (name, content) in files {
            let mut places = vec![String::new()];
            pointers(content, "", &mut places);
            for pointer in places {
                for value in odd.as_array().unwrap() {
                    let mut content = content.clone();
                    *content.pointer_mut(&pointer).unwrap() = value.clone();
                    place.json(name, &content);
                    let what = format!("{name}{pointer} = {value}");
                    let converted =
                        std::panic::catch_unwind(AssertUnwindSafe(|| place.try_convert()));
                    match converted.unwrap_or_else(|_| panic!("{what}: it panicked")) {
                        Ok((_, file)) => {
                            // What is converted is understood.
                            match Tokenizer::from_gguf(&file) {
                                Ok(tokenizer) => drop(tokenizer.encode("a ab b<|turn|>", PLAIN)),
                                Err(error) => wrong.push(format!("{what}: {error}")),
                            }
                            fine += 1;
                        }
                        Err(error) => {
                            let error = error.to_string();
                            assert!(is_named(&error, &place.folder()), "{what}: {error}");
                            refused += 1;
                        }
                    }
                }
            }
            place.json(name, content);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(fine > 500 && refused > 500, "{fine} were fine, {refused} were refused");
}
