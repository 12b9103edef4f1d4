//! The `tidegate` command. Everything it does is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate::cli::main(tidegate::serve::run)
}
