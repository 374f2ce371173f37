//! Streams a text over the facade, leaves it in the middle and goes on from a file.
//!
//! `cargo run --release --example stream [PROMPT]`

use std::io::{Write, stdout};

use mtad::{LoadOptions, Pair, Request, SessionOptions};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let prompt = std::env::args().nth(1).unwrap_or_else(|| "Once upon a time".to_owned());
    // `Pair::open` takes GGUF files instead.
    let pair = Pair::builtin(true, &LoadOptions::default(), &mut |_, _| true)?;
    let mut session = pair.session(&SessionOptions::default())?;
    let request = Request { max_tokens: Some(120), ..Request::default() };

    print!("{prompt}");
    // Any iterator will do; this one is dropped in the middle of the text.
    for piece in session.generate(&prompt, &request)?.take(40) {
        print!("{}", piece?.text);
        stdout().flush()?;
    }

    let file = std::env::temp_dir().join(format!("mtad-stream-{}.session", std::process::id()));
    session.save(&file)?;
    print!("[...]");
    // Here, or in another process, tomorrow.
    let mut session = pair.load_session(&file, &SessionOptions::default())?;
    std::fs::remove_file(&file)?;

    let mut generation = session.resume(&request)?;
    for piece in generation.by_ref() {
        print!("{}", piece?.text);
        stdout().flush()?;
    }
    println!();
    let per_pass = generation.statistics().block_efficiency();
    eprintln!("{per_pass:.2} tokens per pass of the target");
    Ok(())
}
