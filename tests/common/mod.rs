//! What the tests share.
#![allow(dead_code)]

use std::path::{Path, PathBuf};

/// The folder of reference data: the environment variable `MTAD_SHARED`, or `../shared` beside the
/// project. Without it a test says so and is skipped; with CI=true that is a failure.
pub fn shared() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = match std::env::var_os("MTAD_SHARED") {
        Some(folder) => PathBuf::from(folder),
        None => root.join("../shared"),
    };
    if folder.is_dir() {
        return Some(folder);
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "CI=true, and there is no reference data at {}",
        folder.display()
    );
    println!("skipped: no reference data at {}", folder.display());
    None
}

/// The elements of a numpy file of `<f8` or `<f4`.
pub fn read_npy(path: &Path) -> Vec<f64> {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
    let header = u16::from_le_bytes([bytes[8], bytes[9]]) as usize;
    let text = std::str::from_utf8(&bytes[10..10 + header]).unwrap();
    assert!(text.contains("'fortran_order': False"), "{text}");
    let data = &bytes[10 + header..];
    if text.contains("'<f8'") {
        data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
    } else {
        assert!(text.contains("'<f4'"), "{text}");
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect()
    }
}

/// Normalised mean squared error: sum (x - exact)^2 / sum exact^2.
pub fn nmse(x: &[f32], exact: &[f64]) -> f64 {
    assert_eq!(x.len(), exact.len());
    let error: f64 = x.iter().zip(exact).map(|(&x, e)| (f64::from(x) - e).powi(2)).sum();
    error / exact.iter().map(|e| e * e).sum::<f64>()
}
