//! The `tidegate` command. Everything it does is in the library, except for the allocator.

mod allocator;

use std::{
    io::{self, Write as _},
    process::ExitCode,
};

fn main() -> ExitCode {
    tidegate::cli::main(|loaded| {
        if let Err(error) = allocator::give_back_soon() {
            // A node that keeps memory longer is still better than none. There is no log yet.
            let _ = writeln!(io::stderr(), "freed memory goes back to the system late: {error}");
        }
        tidegate::serve::run(loaded)
    })
}
