//! The process's allocator, and how soon it gives freed memory back to the system.
//!
//! The system's allocator keeps what a crowd of slow readers needed. jemalloc gives it back, but by default only while
//! the process goes on allocating, and after ten seconds. Set at run time and not by `JEMALLOC_SYS_WITH_MALLOC_CONF`,
//! so that it holds wherever and however the program is built.

use tikv_jemalloc_ctl::{Access as _, AsName as _, Error};
use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// How long freed pages are kept for the next allocation, in milliseconds. They go back bit by bit during this time.
const DECAY_MS: isize = 1000;

/// Has freed memory go back to the system within [about a second](DECAY_MS), also while the process is idle.
///
/// Call it while there is one thread: arenas of threads that begin later inherit the setting. A thread of the
/// allocator's own does the work.
pub fn give_back_soon() -> Result<(), Error> {
    // The first arena is this thread's. It exists already.
    for key in ["arenas.dirty_decay_ms\0", "arena.0.dirty_decay_ms\0"] {
        key.name().write(DECAY_MS)?;
    }
    "max_background_threads\0".name().write(1_usize)?;
    "background_thread\0".name().write(true)
}
