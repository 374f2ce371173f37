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

    // The same text with another purpose is another token.
    let mut writer = common::sentencepiece(&["▁", "a", "b"]);
    let mut types = vec![UNKNOWN, CONTROL, CONTROL];
    types.extend([BYTE; 256]);
    types.extend([NORMAL, NORMAL, USER_DEFINED]);
    writer.set("tokenizer.ggml.token_type", OwnedValue::I32s(types));
    assert_eq!(target.first_difference(&build(&writer)).unwrap().id, 261);
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

    let error = refusal(&common::byte_level("tekken", &["a b"]));
    assert!(matches!(error, Error::Unsupported { .. }));
    assert!(error.to_string().contains("\"tekken\"") && error.to_string().contains("`gpt-2`"));

    let error = refusal(Writer::new().set("general.architecture", "llama"));
    assert!(error.to_string().contains("`tokenizer.ggml.model` is missing"), "{error}");
}

#[test]
fn damaged_vocabularies_are_errors_that_say_what() {
    type Damage = fn(&mut Writer);
    let cases: [(&str, Damage); 12] = [
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
        ("`tokenizer.ggml.bos_token_id` is 261", |w| {
            w.set("tokenizer.ggml.bos_token_id", 261u32);
        }),
        ("`tokenizer.ggml.eos_token_id` is 4294967295", |w| {
            w.set("tokenizer.ggml.eos_token_id", u32::MAX);
        }),
        ("`tokenizer.ggml.eot_token_id` is 1000", |w| {
            w.set("tokenizer.ggml.eot_token_id", 1000u32);
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

#[test]
fn missing_parts_are_errors_or_defaults() {
    let without = |key: &str| {
        let mut writer = Writer::new();
        let whole = common::sentencepiece(&["▁", "a"]);
        for (k, value) in gguf(&whole).metadata() {
            if k != key {
                writer.set(k, owned(value));
            }
        }
        writer
    };
    let error = refusal(&without("tokenizer.ggml.scores"));
    assert!(error.to_string().contains("`tokenizer.ggml.scores` is missing"), "{error}");
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

    // Bytes that are not UTF-8 in a token.
    let mut bytes = common::sentencepiece(&["▁", "qqqq"]).to_vec();
    let at = bytes.windows(4).position(|w| w == b"qqqq").unwrap();
    bytes[at] = 0xff;
    let error = Gguf::from_vec("test.gguf", bytes).and_then(|g| Tokenizer::from_gguf(&g));
    assert!(error.unwrap_err().to_string().contains("not valid UTF-8"));

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
