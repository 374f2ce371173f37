//! The command `mtad`: maps what the command line returns to an exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    mtad::cli::main()
}
