//! What the border to C costs: seconds per token of the facade and of the C functions, taking
//! turns on the built-in pair, whose tokens are cheaper than any other model's.
//!
//! `cargo run --release --example capi_overhead [PAIRS]`

use std::ffi::{c_char, c_void};
use std::ptr::{null, null_mut};
use std::time::Instant;

use mtad::capi::generation::{mtad_request_init, mtad_session_generate};
use mtad::capi::pair::{mtad_pair_free, mtad_pair_open, mtad_pair_options_init};
use mtad::capi::session::{mtad_session_create, mtad_session_free, mtad_session_prompt};
use mtad::capi::types::{mtad_pair_options, mtad_request, mtad_token};
use mtad::{LoadOptions, Pair, Request, SessionOptions};

const PROMPT: &str = "Once upon a time";
const TOKENS: usize = 200;

/// Counts bytes, so that each token is looked at.
unsafe extern "C" fn hear(token: *const mtad_token, bytes: *mut c_void) -> i32 {
    // SAFETY: both are what `mtad_session_generate` was given or promises.
    unsafe { *bytes.cast::<usize>() += (*token).text_length };
    0
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pairs = std::env::args().nth(1).map_or(Ok(400), |n| n.parse::<usize>())?;
    let options = LoadOptions { threads: 1, ..LoadOptions::default() };
    let pair = Pair::builtin(true, &options, &mut |_, _| true)?;
    let mut session = pair.session(&SessionOptions::default())?;
    let request = Request { max_tokens: Some(TOKENS), ..Request::default() };
    let mut facade = || -> mtad::Result<(f64, usize)> {
        session.prompt(PROMPT, false)?;
        let (start, mut bytes) = (Instant::now(), 0);
        for piece in session.resume(&request)? {
            bytes += piece?.text.len();
        }
        Ok((start.elapsed().as_secs_f64(), bytes))
    };

    let (mut c_pair, mut c_session) = (null_mut(), null_mut());
    // SAFETY: handles and structs are used as mtad.h says; all bytes of the structs may be zero.
    let border = unsafe {
        let mut options: mtad_pair_options = std::mem::zeroed();
        let mut request: mtad_request = std::mem::zeroed();
        mtad_pair_options_init(&mut options, size_of_val(&options));
        mtad_request_init(&mut request, size_of_val(&request));
        options.threads = 1;
        request.max_tokens = TOKENS;
        mtad_pair_open(&options, &mut c_pair, null_mut());
        mtad_session_create(c_pair, null(), &mut c_session);
        move || {
            let prompt = PROMPT.as_ptr().cast::<c_char>();
            mtad_session_prompt(c_session, prompt, PROMPT.len(), 0);
            let (start, mut bytes) = (Instant::now(), 0usize);
            let told = (&raw mut bytes).cast();
            mtad_session_generate(c_session, &request, Some(hear), told, null_mut());
            (start.elapsed().as_secs_f64(), bytes)
        }
    };

    let mut ratios = Vec::new();
    let (mut best_facade, mut best_border) = (f64::INFINITY, f64::INFINITY);
    for turn in 0..pairs {
        let ((a, said), (b, told)) = match turn % 2 {
            0 => (facade()?, border()),
            _ => {
                let b = border();
                (facade()?, b)
            }
        };
        assert!(said == told && said > 0, "both tell the same text");
        ratios.push(b / a);
        (best_facade, best_border) = (best_facade.min(a), best_border.min(b));
    }
    // SAFETY: nobody uses them any more.
    unsafe {
        mtad_session_free(&mut c_session);
        mtad_pair_free(&mut c_pair);
    }
    ratios.sort_by(f64::total_cmp);
    let micros = |seconds: f64| 1e6 * seconds / TOKENS as f64;
    println!(
        "facade {:.2} us/token, C {:.2} us/token at best; C / facade: median {:.4} of {pairs} turns, at best {:.4}",
        micros(best_facade),
        micros(best_border),
        ratios[pairs / 2],
        best_border / best_facade
    );
    Ok(())
}
