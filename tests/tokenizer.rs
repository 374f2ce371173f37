//! The tokenizer against llama.cpp's ids, and against files that do not hold together.

mod common;

use std::time::Instant;

use common::{BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, gguf, shared, strings, vectors};
use mtad::Error;
use mtad::gguf::{Gguf, OwnedValue, Writer};
use mtad::tokenizer::{EncodeOptions, Family, TokenType, Tokenizer};

const VOCABULARIES: [&str; 2] = ["llama-spm", "gpt-2"];
const PLAIN: EncodeOptions = EncodeOptions { bos: false, special: false };
const SPECIAL: EncodeOptions = EncodeOptions { bos: false, special: true };

fn open(name: &str) -> Option<Tokenizer> {
    let path = shared(&format!("vectors/tokenizer/ggml-vocab-{name}.gguf"))?;
    Some(Tokenizer::from_gguf(&Gguf::open(path).unwrap()).unwrap())
}

fn build(writer: &Writer) -> Tokenizer {
    Tokenizer::from_gguf(&gguf(writer)).unwrap()
}

fn refusal(writer: &Writer) -> Error {
    Tokenizer::from_gguf(&gguf(writer)).expect_err("this vocabulary is damaged")
}

#[test]
fn ids_are_those_of_llama_cpp() {
    for name in VOCABULARIES {
        let Some(tokenizer) = open(name) else { return };
        let wrong: Vec<_> = vectors(name)
            .into_iter()
            .filter(|(text, ids)| tokenizer.encode(text, PLAIN) != *ids)
            .map(|(text, ids)| (tokenizer.encode(&text, PLAIN), ids, text))
            .collect();
        assert!(wrong.is_empty(), "{name}: {} of 246 differ: {:?}", wrong.len(), wrong.first());
    }
}

/// Texts with their ids by one of the reference vocabularies.
fn harder_texts(name: &str) -> Vec<(String, Vec<u32>)> {
    let path = shared(&format!("vectors/tokenizer/tok_pub_{name}.json")).unwrap();
    let entries: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    entries.as_array().unwrap().iter().map(|e| (as_text(&e["text"]), as_ids(&e["ids"]))).collect()
}

fn as_text(value: &serde_json::Value) -> String {
    value.as_str().unwrap().to_owned()
}

fn as_ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn ids_are_those_of_llama_cpp_with_every_vocabulary() {
    for name in [
        "deepseek-coder",
        "deepseek-llm",
        "falcon",
        "gpt-2",
        "gpt-neox",
        "llama-bpe",
        "llama-spm",
        "phi-3",
        "qwen2",
        "starcoder",
    ] {
        let Some(tokenizer) = open(name) else { return };
        let texts = harder_texts(name);
        assert!(texts.len() >= 30, "{name} has {} texts", texts.len());
        for (text, ids) in texts {
            assert_eq!(tokenizer.encode(&text, PLAIN), ids, "{name}: {text:?}");
            // SentencePiece writes spaces as this character, so it cannot tell the two apart.
            if !text.contains('▁') {
                assert_eq!(tokenizer.decode(&ids), text, "{name}");
            }
        }
    }
}

#[test]
fn ids_are_those_of_llama_cpp_with_every_pre_tokenizer() {
    let Some(path) = shared("vectors/tokenizer/pre_tokenizers.json") else { return };
    let vectors: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let gpt2 = shared("vectors/tokenizer/ggml-vocab-gpt-2.gguf").unwrap();
    let gpt2 = Gguf::open(gpt2).unwrap();
    let texts: Vec<_> = vectors["texts"].as_array().unwrap().iter().map(as_text).collect();
    let mut names = Vec::new();
    for kind in vectors["kinds"].as_array().unwrap() {
        let ids: Vec<_> = kind["ids"].as_array().unwrap().iter().map(as_ids).collect();
        assert_eq!((texts.len(), ids.len()), (60, 60));
        for name in kind["names"].as_array().unwrap().iter().map(as_text) {
            let tokenizer = Tokenizer::with_pre_tokenizer(&gpt2, Some(&name)).unwrap();
            for (text, ids) in texts.iter().zip(&ids) {
                assert_eq!(tokenizer.encode(text, PLAIN), *ids, "{name}: {text:?}");
            }
            names.push(name);
        }
    }
    let mut known: Vec<_> = Tokenizer::pre_tokenizers().collect();
    names.sort();
    known.sort();
    assert_eq!(names, known);
}

#[test]
fn decoding_gives_the_text_back() {
    for name in VOCABULARIES {
        let Some(tokenizer) = open(name) else { return };
        for (text, ids) in vectors(name) {
            // SentencePiece writes spaces as this character, so it cannot tell the two apart.
            if name == "llama-spm" && text.contains('▁') {
                continue;
            }
            assert_eq!(tokenizer.decode(&ids), text, "{name}");
            let pieces: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.piece(id)).collect();
            let prefix = if name == "llama-spm" && !text.is_empty() { " " } else { "" };
            assert_eq!(pieces, format!("{prefix}{text}").into_bytes(), "{name}");
        }
    }
}

#[test]
fn streaming_gives_the_same_text_and_no_half_characters() {
    for name in VOCABULARIES {
        let Some(tokenizer) = open(name) else { return };
        for (_, ids) in vectors(name) {
            // Any run of tokens, so that it may begin and end within a character.
            for start in (0..ids.len()).step_by(3) {
                let ids = &ids[start..];
                let mut decoder = tokenizer.continuation();
                let mut streamed: String = ids.iter().map(|&id| decoder.push(id)).collect();
                streamed.push_str(&decoder.finish());
                let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.piece(id)).collect();
                assert_eq!(streamed, String::from_utf8_lossy(&bytes), "{name}");
            }
        }
    }
}

#[test]
fn real_vocabularies_tell_their_roles() {
    let Some(llama) = open("llama-spm") else { return };
    assert_eq!((llama.family(), llama.len()), (Family::SentencePiece, 32000));
    assert_eq!((llama.bos(), llama.eos(), llama.unk()), (Some(1), Some(2), Some(0)));
    assert!(llama.add_bos() && llama.is_end(2) && !llama.is_end(1));
    assert_eq!((llama.token(29871), &*llama.piece(29871)), ("▁", &b" "[..]));
    assert_eq!((llama.token_type(13), &*llama.piece(13)), (Some(TokenType::Byte), &b"\n"[..]));
    let bos = EncodeOptions { bos: true, special: false };
    assert_eq!(llama.encode("Hello world", bos), [1, 15043, 3186]);
    assert_eq!(llama.encode("", bos), [1]);
    assert_eq!(llama.decode(&[1, 15043, 3186, 2]), "Hello world");

    let Some(gpt2) = open("gpt-2") else { return };
    assert_eq!((gpt2.family(), gpt2.len()), (Family::ByteLevel, 50257));
    assert_eq!((gpt2.bos(), gpt2.eos(), gpt2.unk()), (Some(50256), Some(50256), None));
    assert!(!gpt2.add_bos() && gpt2.is_end(50256));
    assert_eq!((gpt2.token(262), &*gpt2.piece(262)), ("Ġthe", &b" the"[..]));
    assert_eq!(gpt2.encode("a<|endoftext|>b", SPECIAL), [64, 50256, 65]);
    assert!(!gpt2.encode("a<|endoftext|>b", PLAIN).contains(&50256));
    let difference = llama.first_difference(&gpt2).unwrap();
    assert_eq!((difference.id, difference.theirs.0.as_str()), (0, "!"));
}

#[test]
fn merges_follow_the_scores() {
    let tokenizer = build(&common::sentencepiece(&["▁", "a", "b", "ab", "▁a", "▁ab"]));
    let id = |piece: &str| (0..tokenizer.len() as u32).find(|&id| tokenizer.token(id) == piece);
    let ids = |pieces: &[&str]| pieces.iter().map(|piece| id(piece).unwrap()).collect::<Vec<_>>();
    assert_eq!(tokenizer.encode("ab aab", PLAIN), ids(&["▁ab", "▁a", "ab"]));
    assert_eq!(tokenizer.encode("é", PLAIN), ids(&["▁", "<0xC3>", "<0xA9>"]));
    assert!(tokenizer.encode("", PLAIN).is_empty());
    assert_eq!(tokenizer.encode(" ", PLAIN), ids(&["▁", "▁"]));
}

#[test]
fn special_tokens_are_taken_as_llama_cpp_takes_them() {
    let mut writer = common::sentencepiece(&["▁", "a", "b", "<", "s", ">", "<s", "U", "UU", "V"]);
    let mut types = vec![UNKNOWN, CONTROL, CONTROL];
    types.extend([BYTE; 256]);
    types.extend([NORMAL; 7]);
    types.extend([USER_DEFINED, USER_DEFINED, CONTROL]);
    writer.set("tokenizer.ggml.token_type", OwnedValue::I32s(types));
    let tokenizer = build(&writer);
    let show = |text: &str, options| -> String {
        let ids = tokenizer.encode(text, options);
        ids.iter().map(|&id| format!("{} ", tokenizer.token(id))).collect()
    };
    // Control tokens only on demand; never by merging `<s` and `>`.
    assert_eq!(show("<s>a", PLAIN), "▁ <s > a ");
    assert_eq!(show("V", PLAIN), "▁ <0x56> ");
    // A space goes before text at the start and behind each token that was taken whole.
    assert_eq!(show("<s>a</s> b", SPECIAL), "<s> ▁ a </s> ▁ ▁ b ");
    // User-defined tokens always, the longest first wherever they stand.
    assert_eq!(show("aUUUb", PLAIN), "▁ a UU U ▁ b ");
    assert_eq!(show("UaV", SPECIAL), "U ▁ a V ");
    // What decoding leaves out.
    assert_eq!(tokenizer.decode(&tokenizer.encode("<s>a", SPECIAL)), "a");
    assert_eq!(tokenizer.decode(&tokenizer.encode("UaU", PLAIN)), "U aU");
    let mut decoder = tokenizer.decoder().show_special(true);
    assert_eq!(decoder.push(1), "<s>");

    writer.set("tokenizer.ggml.add_space_prefix", OwnedValue::Bool(false));
    writer.set("tokenizer.ggml.add_bos_token", OwnedValue::Bool(false));
    let tokenizer = build(&writer);
    assert!(!tokenizer.add_bos());
    assert_eq!(tokenizer.encode("ab", PLAIN), [260, 261]);
    assert_eq!(tokenizer.decode(&tokenizer.encode(" a<s> b", SPECIAL)), " a b");
}

#[test]
fn streams_hold_back_bytes_until_a_character_is_whole() {
    let tokenizer = build(&common::sentencepiece(&["▁", "a", "▁a"]));
    let byte = |byte: u8| 3 + u32::from(byte);
    let mut decoder = tokenizer.decoder();
    let mut out: Vec<String> = "🦙".bytes().map(|b| decoder.push(byte(b))).collect();
    assert_eq!(out, ["", "", "", "🦙"]);
    // A broken character is replaced as soon as it is known to be broken.
    out = [0xf0, 0x9f, b'x', 0xff, 0xe2].iter().map(|&b| decoder.push(byte(b))).collect();
    assert_eq!(out, ["", "", "\u{fffd}x", "\u{fffd}", ""]);
    assert_eq!(decoder.finish(), "\u{fffd}");
    assert_eq!(decoder.finish(), "");

    // The space goes at the start of a text only, behind control tokens too.
    let (a, spaced) = (260, 261);
    let text = |mut decoder: mtad::tokenizer::StreamDecoder, ids: &[u32]| -> String {
        ids.iter().map(|&id| decoder.push(id)).collect()
    };
    assert_eq!(text(tokenizer.decoder(), &[1, spaced, spaced]), "a a");
    assert_eq!(text(tokenizer.continuation(), &[spaced, spaced]), " a a");
    assert_eq!(text(tokenizer.decoder(), &[a, spaced]), "a a");
    // Ids from outside are no text, and do not panic.
    assert_eq!(text(tokenizer.decoder(), &[u32::MAX, 262, spaced]), "a");
    assert_eq!((tokenizer.token(262), tokenizer.piece(262).len()), ("", 0));
    assert_eq!((tokenizer.token_type(262), tokenizer.is_end(262)), (None, false));
}

#[test]
fn vocabularies_are_compared_by_content() {
    let target = build(&common::sentencepiece(&["▁", "a", "b"]));
    let padded = build(&common::sentencepiece(&["▁", "a", "b", "<pad>", "<pad2>"]));
    assert_eq!(target.first_difference(&padded), None);
    assert_eq!(padded.check_draft(&target).unwrap(), 262);
    assert_eq!(target.shared_len(&padded), 262);

    let other = build(&common::sentencepiece(&["▁", "a", "c", "d"]));
    let difference = target.first_difference(&other).unwrap();
    assert_eq!(difference.id, 261);
    assert_eq!(difference.ours, ("b".to_owned(), TokenType::Normal));
    assert_eq!(difference.theirs.0, "c");
    let message = target.check_draft(&other).unwrap_err().to_string();
    assert!(message.contains(r#"token 261 is "b" (normal) in the target and "c""#), "{message}");

    // Types are what files of one model disagree about: the text makes the token.
    let mut writer = common::sentencepiece(&["▁", "a", "b"]);
    let mut types = vec![UNKNOWN, CONTROL, CONTROL];
    types.extend([BYTE; 256]);
    types.extend([NORMAL, NORMAL, USER_DEFINED]);
    writer.set("tokenizer.ggml.token_type", OwnedValue::I32s(types));
    assert_eq!(target.first_difference(&build(&writer)), None);
    assert_eq!(target.check_draft(&build(&writer)).unwrap(), 262);

    // Of a draft's file the texts are enough, but they must be spelled alike.
    let draft = common::sentencepiece(&["▁", "a", "b", "c"]);
    assert_eq!(target.check_draft_file(&gguf(&draft)).unwrap(), 262);
    let bytes = build(&common::byte_level("gpt-2", &["a b"]));
    let unknown = common::byte_level("salad", &["a b"]);
    assert_eq!(bytes.check_draft_file(&gguf(&unknown)).unwrap(), bytes.len());
    let error = target.check_draft_file(&gguf(&unknown)).unwrap_err();
    assert!(matches!(error, Error::Vocabulary(_)), "{error}");
    assert!(error.to_string().contains("\"gpt2\""), "{error}");
}

#[test]
fn byte_level_merges_and_unknown_bytes() {
    let tokenizer = build(&common::byte_level("gpt-2", &["a b", "Ġ ab", "ab c"]));
    let pieces = |text: &str| -> Vec<&str> {
        tokenizer.encode(text, PLAIN).iter().map(|&id| tokenizer.token(id)).collect()
    };
    assert_eq!(pieces("ab abc abd"), ["ab", "Ġab", "c", "Ġab", "d"]);
    // This vocabulary has no token for these bytes and none for what is unknown.
    assert_eq!(pieces("aéb"), ["ab"]);
    // Only Llama 3 begins with a token by default and takes whole words before merges.
    assert!(!tokenizer.add_bos());
    let llama3 = build(&common::byte_level("llama3", &["a b", "Ġ ab", "ab c", "b c"]));
    assert!(llama3.add_bos());
    assert_eq!(llama3.token(llama3.encode("abc", PLAIN)[0]), "abc");
    // A name alone makes an end, whatever type the file gives.
    let mut writer = common::byte_level("default", &["a b"]);
    writer.set("tokenizer.ggml.token_type", OwnedValue::I32s(vec![NORMAL; 97]));
    let tokenizer = build(&writer);
    assert!(tokenizer.is_end(96));
    assert_eq!(tokenizer.encode("<|endoftext|>", SPECIAL), [96]);
    assert_eq!(tokenizer.decode(&[96]), "");
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let mut writer = common::sentencepiece(&["▁"]);
    writer.set("tokenizer.ggml.model", "rwkv");
    let error = refusal(&writer);
    assert!(matches!(error, Error::Unsupported { .. }));
    assert!(error.to_string().contains("\"rwkv\"") && error.to_string().contains("`gpt2`"));

    let salad = common::byte_level("salad", &["a b"]);
    let error = refusal(&salad);
    assert!(matches!(error, Error::Unsupported { .. }));
    for part in ["\"salad\"", "gpt-2, ", "choose the one"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    // A name that is given goes before the file's, and must be one.
    let named = |name| Tokenizer::with_pre_tokenizer(&gguf(&salad), Some(name));
    assert!(named("qwen2").is_ok());
    let error = named("pepper").unwrap_err();
    assert!(matches!(error, Error::Invalid(_)));
    assert!(error.to_string().contains("\"pepper\"") && error.to_string().contains("gpt-2, "));
    let spm = gguf(&common::sentencepiece(&["▁"]));
    assert!(matches!(Tokenizer::with_pre_tokenizer(&spm, Some("gpt-2")), Err(Error::Invalid(_))));

    let error = refusal(Writer::new().set("general.architecture", "llama"));
    assert!(error.to_string().contains("`tokenizer.ggml.model` is missing"), "{error}");
}

#[test]
fn damaged_vocabularies_are_errors_that_say_what() {
    type Damage = fn(&mut Writer);
    let cases: [(&str, Damage); 9] = [
        ("no token", |w| {
            w.set("tokenizer.ggml.tokens", strings(&[]));
        }),
        ("strings are needed", |w| {
            w.set("tokenizer.ggml.tokens", OwnedValue::I32s(vec![1, 2]));
        }),
        ("an array is needed", |w| {
            w.set("tokenizer.ggml.tokens", "a");
        }),
        ("2 scores for 261 tokens", |w| {
            w.set("tokenizer.ggml.scores", OwnedValue::F32s(vec![0.0; 2]));
        }),
        ("f32 is needed", |w| {
            w.set("tokenizer.ggml.scores", OwnedValue::I32s(vec![0; 261]));
        }),
        ("score of token 0 is not a number", |w| {
            w.set("tokenizer.ggml.scores", OwnedValue::F32s(vec![f32::NAN; 261]));
        }),
        ("1 types for 261 tokens", |w| {
            w.set("tokenizer.ggml.token_type", OwnedValue::I32s(vec![1]));
        }),
        ("i32 is needed", |w| {
            w.set("tokenizer.ggml.token_type", OwnedValue::F32s(vec![1.0; 261]));
        }),
        ("token 260 is 2000 bytes long", |w| {
            let mut tokens = vec!["<unk>".to_owned()];
            tokens.extend((0..259).map(|i| format!("t{i}")));
            tokens.push("a".repeat(2000));
            w.set("tokenizer.ggml.tokens", OwnedValue::Strings(tokens));
        }),
    ];
    for (wanted, damage) in cases {
        let mut writer = common::sentencepiece(&["▁", "a"]);
        damage(&mut writer);
        let error = refusal(&writer);
        assert!(matches!(error, Error::Format { .. }), "{error}");
        assert!(error.to_string().contains(wanted), "{wanted:?} is not in {error}");
    }
}

/// The metadata of a file but for one key.
fn without(file: &Gguf, key: &str) -> Writer {
    let mut writer = Writer::new();
    for (k, value) in file.metadata() {
        if k != key {
            writer.set(k, owned(value));
        }
    }
    writer
}

/// The only note on a vocabulary.
fn note(tokenizer: &Tokenizer) -> &str {
    let [note] = tokenizer.notes() else { panic!("{:?}", tokenizer.notes()) };
    note
}

#[test]
fn roles_outside_the_vocabulary_are_nobody_s() {
    type Read = fn(&Tokenizer) -> Option<u32>;
    let cases: [(&str, u32, Read, Option<u32>); 3] = [
        // SentencePiece's usual places are the default.
        ("bos", 261, Tokenizer::bos, Some(1)),
        ("eos", u32::MAX, Tokenizer::eos, Some(2)),
        ("eot", 1000, |_| None, None),
    ];
    for (role, id, read, wanted) in cases {
        let mut writer = common::sentencepiece(&["▁", "a"]);
        let key = format!("tokenizer.ggml.{role}_token_id");
        writer.set(&key, id);
        let tokenizer = build(&writer);
        assert_eq!(read(&tokenizer), wanted, "{role}");
        assert!(!tokenizer.is_end(id));
        let note = note(&tokenizer);
        assert!(
            note.contains(&format!("`{key}` is {id}")) && note.contains("261 tokens"),
            "{note}"
        );
    }
    let mut writer = common::byte_level("gpt-2", &["a b"]);
    writer.set("tokenizer.ggml.bos_token_id", 97u32);
    let tokenizer = build(&writer);
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.add_bos()), (None, Some(96), false));
}

#[test]
fn a_sentencepiece_vocabulary_without_scores_is_in_their_order() {
    let Some(path) = shared("vectors/tokenizer/ggml-vocab-llama-spm.gguf") else { return };
    let file = Gguf::open(path).unwrap();
    let tokenizer = build(&without(&file, "tokenizer.ggml.scores"));
    assert!(note(&tokenizer).contains("`tokenizer.ggml.scores` is missing"));
    // This vocabulary has runs of spaces out of order, which somebody put there by hand.
    let in_order = |(text, _): &(String, Vec<u32>)| !format!(" {text}").contains("  ");
    let texts: Vec<_> = vectors("llama-spm").into_iter().filter(in_order).collect();
    assert!(texts.len() > 150, "{}", texts.len());
    for (text, ids) in texts {
        assert_eq!(tokenizer.encode(&text, PLAIN), ids, "{text:?}");
    }
}

#[test]
fn bytes_that_are_there_spell_what_they_can() {
    let writer = |unknown: bool| {
        let mut tokens = vec!["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "<0x0A>", "▁", "a"];
        let mut types = vec![UNKNOWN, CONTROL, CONTROL, BYTE, BYTE, BYTE, NORMAL, NORMAL];
        if !unknown {
            (tokens[0], types[0]) = ("<none>", CONTROL);
        }
        let mut writer = Writer::new();
        writer
            .set("tokenizer.ggml.model", "llama")
            .set("tokenizer.ggml.tokens", strings(&tokens))
            .set("tokenizer.ggml.scores", OwnedValue::F32s(vec![0.0; 8]))
            .set("tokenizer.ggml.token_type", OwnedValue::I32s(types));
        writer
    };
    let tokenizer = build(&writer(true));
    assert_eq!(tokenizer.encode("aé\nèa", PLAIN), [6, 7, 3, 4, 5, 0, 7]);
    assert_eq!(tokenizer.decode(&[6, 7, 3, 4, 5]), "aé\n");
    assert!(tokenizer.notes().is_empty());
    let tokenizer = build(&writer(false));
    assert_eq!(tokenizer.encode("aé\nèa", PLAIN), [6, 7, 3, 4, 5, 7]);
    assert!(note(&tokenizer).contains("253 bytes have no token"), "{}", note(&tokenizer));
}

#[test]
fn a_vocabulary_may_merge_text_instead_of_bytes() {
    let mut tokens: Vec<String> = vec!["<bos>".into(), "<eos>".into()];
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    let mut types = vec![CONTROL, CONTROL];
    types.extend([BYTE; 256]);
    let first = tokens.len() as u32;
    for piece in ["▁", "a", "é", "▁a", "▁aé", "\n\n", "b", "a▁", "<turn|>"] {
        tokens.push(piece.into());
        types.push(NORMAL);
    }
    let mut writer = Writer::new();
    writer
        .set("tokenizer.ggml.model", "gemma4")
        .set("tokenizer.ggml.tokens", OwnedValue::Strings(tokens))
        .set("tokenizer.ggml.token_type", OwnedValue::I32s(types))
        .set("tokenizer.ggml.bos_token_id", 0u32)
        .set("tokenizer.ggml.eos_token_id", 1u32)
        .set("tokenizer.ggml.merges", strings(&["a ▁", "▁ a", "▁a é"]));
    let tokenizer = build(&writer);
    assert_eq!((tokenizer.family(), tokenizer.add_bos()), (Family::SentencePiece, true));
    let id = |n: u32| first + n;
    // No space before the text; runs of line ends are one token; a merge may cross a space.
    assert_eq!(tokenizer.encode("a\n\nb", PLAIN), [id(1), id(5), id(6)]);
    assert_eq!(tokenizer.encode("b aéa a", PLAIN), [id(6), id(4), id(7), id(1)]);
    assert_eq!(tokenizer.encode("ñ", PLAIN), [2 + 0xc3, 2 + 0xb1]);
    assert_eq!(tokenizer.decode(&tokenizer.encode(" aé\n\nñ b", PLAIN)), " aé\n\nñ b");
    assert!(tokenizer.is_end(id(8)) && tokenizer.is_end(1));
    // A file of the other kind says it by its pre-tokenizer.
    writer.set("tokenizer.ggml.model", "gpt2").set("tokenizer.ggml.pre", "sarvam-moe");
    assert_eq!(build(&writer).encode("b aé", PLAIN), [id(6), id(4)]);
    writer.set("tokenizer.ggml.pre", "gpt-2");
    assert_eq!(build(&writer).family(), Family::ByteLevel);
}

#[test]
fn messages_of_several_do_not_end_the_answer() {
    let with = |names: &[&str]| {
        let mut writer = common::byte_level("gpt-4o", &["a b"]);
        let mut tokens: Vec<String> = (b'!'..=b'~').map(|b| char::from(b).to_string()).collect();
        tokens.extend(["Ġ".to_owned(), "ab".to_owned(), "<|endoftext|>".to_owned()]);
        let first = tokens.len() as u32;
        tokens.extend(names.iter().map(|name| (*name).to_owned()));
        let types = vec![NORMAL; tokens.len()];
        writer.set("tokenizer.ggml.tokens", OwnedValue::Strings(tokens));
        writer.set("tokenizer.ggml.token_type", OwnedValue::I32s(types));
        let tokenizer = build(&writer);
        (0..names.len() as u32).map(|n| tokenizer.is_end(first + n)).collect::<Vec<_>>()
    };
    assert_eq!(with(&["<|end|>", "<|return|>", "<|call|>"]), [false, true, true]);
    assert_eq!(with(&["<|end|>", "<|return|>"]), [true, true]);
    assert_eq!(with(&["<|end|>", "<|calls|>", "<|flush|>"]), [false, true, true]);
}

#[test]
fn what_files_leave_out_is_said() {
    let missing = without(&gguf(&common::byte_level("x", &["a b"])), "tokenizer.ggml.pre");
    let tokenizer = build(&missing);
    assert!(note(&tokenizer).contains("`tokenizer.ggml.pre` is missing"), "{}", note(&tokenizer));
    assert_eq!(tokenizer.encode("ab", PLAIN), [95]);
    let named = Tokenizer::with_pre_tokenizer(&gguf(&missing), Some("gpt-2")).unwrap();
    assert!(named.notes().is_empty());

    let llama = build(&common::sentencepiece(&["▁", "a"]));
    let twice = llama.encode("<s>a", EncodeOptions { bos: true, special: true });
    assert_eq!(twice[..2], [1, 1]);
    assert!(llama.doubles_bos(&twice));
    assert!(!llama.doubles_bos(&twice[1..]) && !llama.doubles_bos(&[1]));
}

#[test]
fn missing_parts_are_errors_or_defaults() {
    let whole = gguf(&common::sentencepiece(&["▁", "a"]));
    let without = |key: &str| without(&whole, key);
    let error = refusal(&without("tokenizer.ggml.tokens"));
    assert!(error.to_string().contains("`tokenizer.ggml.tokens` is missing"), "{error}");
    // Types are optional: roles and spelling tell the control tokens and the bytes.
    let tokenizer = build(&without("tokenizer.ggml.token_type"));
    assert_eq!(tokenizer.encode("<s>é", SPECIAL), [1, 259, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(tokenizer.decode(&[1, 259, 3 + 0xc3, 3 + 0xa9]), "é");
    // So are roles that have their usual place.
    assert_eq!(build(&without("tokenizer.ggml.bos_token_id")).bos(), Some(1));
    let tokenizer = build(&without("tokenizer.ggml.eos_token_id"));
    assert!(tokenizer.eos() == Some(2) && tokenizer.is_end(2));
    assert_eq!(build(&without("tokenizer.ggml.unknown_token_id")).unk(), Some(0));

    let mut writer = common::byte_level("gpt-2", &["a b"]);
    writer.set("tokenizer.ggml.merges", OwnedValue::F32s(vec![1.0]));
    assert!(refusal(&writer).to_string().contains("strings are needed"));
}

fn owned(value: mtad::gguf::Value<'_>) -> OwnedValue {
    use mtad::gguf::{Value, ValueType};
    match value {
        Value::String(_) => OwnedValue::String(value.as_str().unwrap().to_owned()),
        Value::U32(x) => OwnedValue::U32(x),
        Value::F32(x) => OwnedValue::F32(x),
        Value::Bool(x) => OwnedValue::Bool(x),
        Value::Array(array) => match array.value_type() {
            ValueType::String => OwnedValue::Strings(
                array.iter().map(|text| text.as_str().unwrap().to_owned()).collect(),
            ),
            ValueType::F32 => {
                OwnedValue::F32s(array.iter().map(|x| x.as_f64().unwrap() as f32).collect())
            }
            _ => OwnedValue::I32s(array.iter().map(|x| x.as_i128().unwrap() as i32).collect()),
        },
        other => panic!("the test vocabularies hold no {}", other.value_type()),
    }
}

#[test]
fn bad_merges_are_refused_by_number() {
    for (merge, wanted) in [
        ("a zz", "there is no token \"zz\""),
        ("a d", "there is no token \"ad\""),
        ("ab", "two tokens with a space"),
        ("", "two tokens with a space"),
        (" ", "two tokens with a space"),
        ("a ", "two tokens with a space"),
        ("a b c", "there is no token \"b c\""),
    ] {
        let mut writer = common::byte_level("gpt-2", &["a b"]);
        writer.set("tokenizer.ggml.merges", strings(&["a b", merge]));
        let error = refusal(&writer).to_string();
        assert!(error.contains("merge 1 ") && error.contains(wanted), "{merge:?}: {error}");
    }
    // One that comes twice counts once, at its first place.
    let mut writer = common::byte_level("gpt-2", &["a b", "b c"]);
    writer.set("tokenizer.ggml.merges", strings(&["a b", "b c", "a b"]));
    let tokenizer = build(&writer);
    assert_eq!(tokenizer.token(tokenizer.encode("abc", PLAIN)[0]), "ab");
}

#[test]
fn odd_vocabularies_are_treated_sanely() {
    // Equal texts: the first counts, and all decode.
    let tokenizer = build(&common::sentencepiece(&["▁", "a", "a", "▁a", "▁a", ""]));
    assert_eq!(tokenizer.encode("a", PLAIN), [262]);
    assert_eq!(tokenizer.decode(&[263, 261, 264]), "aa");

    // Bytes that are not UTF-8 in a token: they are its text, which no text has.
    let mut bytes = common::sentencepiece(&["▁", "qqqq", "q"]).to_vec();
    let at = bytes.windows(4).position(|w| w == b"qqqq").unwrap();
    bytes[at] = 0xff;
    let tokenizer =
        Tokenizer::from_gguf(&Gguf::from_vec("test.gguf", bytes.clone()).unwrap()).unwrap();
    assert!(note(&tokenizer).contains("1 of the 262 tokens are not UTF-8"), "{}", note(&tokenizer));
    assert_eq!((tokenizer.token(260), tokenizer.piece(260)), ("\u{fffd}qqq", b"\xffqqq".to_vec()));
    assert_eq!(tokenizer.decode(&[261, 260]), "q\u{fffd}qqq");
    assert_eq!(tokenizer.encode("\u{fffd}qqq", PLAIN)[1..4], [3 + 0xef, 3 + 0xbf, 3 + 0xbd]);
    // Two of them differ where their bytes do.
    bytes[at] = 0xfe;
    let other = Tokenizer::from_gguf(&Gguf::from_vec("test.gguf", bytes).unwrap()).unwrap();
    assert_eq!(tokenizer.first_difference(&other).unwrap().id, 260);

    // No bytes to fall back on: the unknown token; without one the file is refused.
    let mut writer = Writer::new();
    writer
        .set("tokenizer.ggml.model", "llama")
        .set("tokenizer.ggml.tokens", strings(&["?", "▁", "a"]))
        .set("tokenizer.ggml.scores", OwnedValue::F32s(vec![0.0; 3]))
        .set("tokenizer.ggml.token_type", OwnedValue::I32s(vec![NORMAL; 3]));
    assert!(refusal(&writer).to_string().contains("unknown token"));
    writer.set("tokenizer.ggml.token_type", OwnedValue::I32s(vec![UNKNOWN, NORMAL, NORMAL]));
    assert_eq!(build(&writer).encode("axy a", PLAIN), [1, 2, 0, 1, 2]);

    // A vocabulary in which everything joins with everything would need far more memory than the
    // file has.
    let runs: Vec<String> = (1..=800).map(|n| "a".repeat(n)).collect();
    let runs: Vec<&str> = runs.iter().map(String::as_str).collect();
    assert!(refusal(&common::sentencepiece(&runs)).to_string().contains("ways to join"));
}

#[test]
fn any_bytes_in_the_metadata_do_no_harm() {
    // Flip every byte of two small files in turn: an error or a tokenizer that works.
    let files =
        [common::sentencepiece(&["▁", "a", "▁a"]), common::byte_level("default", &["a b", "Ġ a"])];
    for file in files {
        let whole = file.to_vec();
        for at in 0..whole.len() {
            for flip in [0x01, 0x80] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                let Ok(gguf) = Gguf::from_vec("test.gguf", bytes) else { continue };
                let Ok(tokenizer) = Tokenizer::from_gguf(&gguf) else { continue };
                let ids = tokenizer.encode("<s> a\n  é <|endoftext|>", SPECIAL);
                let _ = tokenizer.decode(&ids);
            }
        }
    }
}

#[test]
fn long_runs_take_no_quadratic_time() {
    for name in VOCABULARIES {
        let Some(tokenizer) = open(name) else { return };
        for unit in ["a", " ", "\n", "1", "é", "!"] {
            let text = unit.repeat((1 << 20) / unit.len());
            let start = Instant::now();
            let ids = tokenizer.encode(&text, PLAIN);
            let encoded = start.elapsed();
            assert_eq!(tokenizer.decode(&ids), text);
            println!("{name}: 1 MiB of {unit:?}: {} tokens, {encoded:?}", ids.len());
            assert!(encoded.as_secs() < 20, "{name}, {unit:?}: {encoded:?}");
        }
    }
}
