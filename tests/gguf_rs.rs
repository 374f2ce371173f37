//! The reader of GGUF headers against the crate `gguf-rs`, on files that both can read.

mod common;

use std::collections::BTreeMap;
use std::io::BufReader;

use common::{gguf, sentencepiece, shared};
use mtad::gguf::Gguf;
use mtad::quant::BlockType;

fn compare(name: &str, ours: &Gguf, bytes: &[u8]) {
    // The container wants to begin behind the magic number.
    let reader = BufReader::new(std::io::Cursor::new(bytes[4..].to_vec()));
    let mut container =
        gguf_rs::GGUFContainer::new(gguf_rs::ByteOrder::LE, Box::new(reader), u64::MAX);
    let theirs = container.decode().unwrap_or_else(|e| panic!("{name}: {e}"));
    let metadata: BTreeMap<_, _> = ours.metadata().collect();
    assert_eq!(metadata.len(), theirs.metadata().len(), "{name}");
    for (key, value) in theirs.metadata() {
        let ours = metadata.get(key.as_str()).unwrap_or_else(|| panic!("{name}: {key}"));
        match value {
            serde_json::Value::String(text) => {
                assert_eq!(ours.as_str(), Some(text.as_str()), "{name}: {key}")
            }
            serde_json::Value::Array(array) => {
                assert_eq!(ours.as_array().map(|a| a.len()), Some(array.len()), "{name}: {key}");
            }
            serde_json::Value::Bool(x) => assert_eq!(ours.as_bool(), Some(*x), "{name}: {key}"),
            serde_json::Value::Number(x) => {
                let (ours, theirs) = (ours.as_f64().unwrap(), x.as_f64().unwrap());
                assert!(
                    (ours - theirs).abs() <= 1e-6 * ours.abs(),
                    "{name}: {key}: {ours} {theirs}"
                );
            }
            other => panic!("{name}: {key} is {other}"),
        }
    }
    assert_eq!(ours.tensors().len(), theirs.tensors().len(), "{name}");
    for ((ours, dims), theirs) in ours.tensors().zip(ours.dims()).zip(theirs.tensors()) {
        assert_eq!(ours.name, theirs.name, "{name}");
        assert_eq!(ours.block_type, BlockType::from_id(theirs.kind).unwrap(), "{name}");
        let shape: Vec<u64> = theirs.shape.iter().copied().filter(|&d| d > 0).collect();
        assert_eq!(dims, &shape[..dims.len()], "{name}: {}", ours.name);
    }
}

#[test]
fn headers_read_alike() {
    let writer = sentencepiece(&["a", "b", "ab"]);
    compare("written here", &gguf(&writer), &writer.to_vec());
    let Some(folder) = shared("vectors/golden") else { return };
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        // gguf-rs has the size of BF16 and IQ4_NL blocks wrong, but reads their headers.
        if path.extension().is_some_and(|e| e == "gguf") {
            let name = path.display().to_string();
            compare(&name, &Gguf::open(&path).unwrap(), &std::fs::read(&path).unwrap());
            seen += 1;
        }
    }
    assert_eq!(seen, 17);
}
