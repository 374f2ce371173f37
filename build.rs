//! Keeps the library for C to functions of its own.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // `llguidance` has functions for C, too, which would be exported beside ours.
    let system = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let hidden = match system.as_str() {
        "linux" | "android" | "freebsd" => "-Wl,--exclude-libs,ALL",
        "macos" | "ios" => "-Wl,-unexported_symbol,_llg_*",
        _ => return,
    };
    println!("cargo::rustc-cdylib-link-arg={hidden}");
}
