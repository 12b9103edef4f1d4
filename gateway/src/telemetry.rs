//! Logging.
//!
//! Owns how an event becomes a line on standard error. Each module decides what to log and at which level, by
//! these rules:
//!
//! - the field for an error is `error`;
//! - events of a connection or a session happen in a span that carries its id, at level error, so that no
//!   filter removes the ids from the remaining lines;
//! - payloads, tokens and secrets are never fields or parts of a message.
//!
//! A JSON line contains `timestamp` (RFC 3339, UTC), `level`, `target`, `message`, the event's own fields,
//! and `spans`: the fields of each enclosing span, outermost first.
//!
//! Lines go through a bounded queue ([`queue`]) to a dedicated thread. If nobody reads the log, lines are
//! dropped and counted; nothing else happens. The same applies to panic messages.

mod queue;

use std::{
    backtrace::{Backtrace, BacktraceStatus},
    io::{self, IsTerminal},
    panic::{self, PanicHookInfo},
    thread,
    time::Duration,
};

use tracing::{Dispatch, dispatcher::SetGlobalDefaultError};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    fmt::{self, MakeWriter},
    layer::SubscriberExt,
    reload,
};

pub use self::queue::dropped_lines;
use self::queue::{Queue, Stderr};
use crate::config::{Log, LogFilter, LogFormat};

/// How long the process waits at its end for the log to be read.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Decides which events are logged. Can be changed at runtime.
#[derive(Clone, Debug)]
pub struct Filter(reload::Handle<EnvFilter, Registry>);

impl Filter {
    /// Applies `filter` from now on. Has no effect once the log is gone.
    pub fn set(&self, filter: &LogFilter) {
        // Fails only if the subscriber no longer exists.
        self.0.reload(filter.to_env_filter()).ok();
    }
}

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// Another subscriber is already installed, and stays.
    #[error(transparent)]
    Taken(#[from] SetGlobalDefaultError),
    /// The thread that writes the log could not be started.
    #[error("cannot start the log thread: {0}")]
    Thread(#[from] io::Error),
}

/// The log of this process. Dropping it waits up to one second until all lines have been written.
#[derive(Debug)]
pub struct Logging {
    /// Decides what is logged.
    pub filter: Filter,
    queue: Queue,
}

impl Drop for Logging {
    fn drop(&mut self) {
        self.queue.flush(LAST_WORDS);
    }
}

/// Logs to standard error from now on, for the whole process, including panics.
pub fn init(log: &Log) -> Result<Logging, InitError> {
    let queue = Queue::start(Stderr, dropped_lines().clone(), |lines| {
        tracing::warn!(lines, "log lines are missing here: the log was not read fast enough");
    })?;
    // Colours only for terminals; the layer itself honours `NO_COLOR`.
    let (dispatch, filter) = dispatch(log, queue.clone(), io::stderr().is_terminal());
    tracing::dispatcher::set_global_default(dispatch)?;
    let last_resort = queue.clone();
    panic::set_hook(Box::new(move |panic| log_panic(panic, &last_resort)));
    Ok(Logging { filter, queue })
}

/// Logs a panic. The standard library would write directly to standard error and wait for its reader.
fn log_panic(panic: &PanicHookInfo<'_>, queue: &Queue) {
    let thread = thread::current();
    let name = thread.name().unwrap_or("<unnamed>");
    let payload = panic.payload();
    let said = payload.downcast_ref::<&str>().copied();
    let said = said.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    let location = panic.location().map(tracing::field::display);
    let backtrace = Backtrace::capture();
    let captured = backtrace.status() == BacktraceStatus::Captured;
    if tracing::enabled!(tracing::Level::ERROR) {
        let backtrace = captured.then(|| tracing::field::display(&backtrace));
        tracing::error!(thread = name, location, backtrace, error = said, "a thread panicked");
    } else {
        // Log it even if the filter suppresses errors.
        let place = panic.location().map(|location| format!(" at {location}")).unwrap_or_default();
        let backtrace = if captured { format!("{backtrace}\n") } else { String::new() };
        queue.push(format!("thread {name:?} panicked{place}: {said}\n{backtrace}").as_bytes());
    }
}

/// Builds what [`init`] installs, writing to `writer`.
pub fn dispatch<W>(log: &Log, writer: W, is_terminal: bool) -> (Dispatch, Filter)
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let lines = fmt::layer().with_writer(writer).with_target(true);
    let lines = if is_terminal { lines } else { lines.with_ansi(false) };
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match log.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => {
            lines.json().flatten_event(true).with_current_span(false).with_span_list(true).boxed()
        }
    };
    let (filter, handle) = reload::Layer::new(log.filter.to_env_filter());
    (Dispatch::new(tracing_subscriber::registry().with(lines.with_filter(filter))), Filter(handle))
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::Value;
    use tracing::{dispatcher::with_default, error, error_span, info, info_span};

    use super::*;

    /// The lines that `events` log.
    fn lines(format: LogFormat, filter: &str, events: impl FnOnce()) -> Vec<String> {
        lines_with(format, filter, |_| events())
    }

    fn lines_with(format: LogFormat, filter: &str, events: impl FnOnce(Filter)) -> Vec<String> {
        let written = Arc::new(Mutex::new(Vec::new()));
        let log = Log { format, filter: filter.parse().unwrap() };
        let writer = Arc::clone(&written);
        let writer = move || Shared(Arc::clone(&writer));
        let (dispatch, filter) = dispatch(&log, writer, false);
        with_default(&dispatch, || events(filter));
        let written = written.lock().unwrap();
        std::str::from_utf8(&written).unwrap().lines().map(str::to_owned).collect()
    }

    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn trouble() {
        let _connection = error_span!("connection", connection = 7).entered();
        let _session = error_span!("session", session = "0af3").entered();
        error!(error = %io::Error::other("it broke\non two lines"), attempt = 2, "cannot publish");
    }

    #[test]
    fn a_json_line_contains_the_ids_and_the_error() {
        let lines = lines(LogFormat::Json, "info", trouble);
        let [line] = lines.as_slice() else { panic!("{lines:?}") };
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line["level"], "ERROR");
        assert_eq!(line["target"], module_path!());
        assert_eq!(line["message"], "cannot publish");
        assert_eq!(line["error"], "it broke\non two lines");
        assert_eq!(line["attempt"], 2);
        assert_eq!(line["spans"][0]["connection"], 7);
        assert_eq!(line["spans"][1]["session"], "0af3");
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'), "{line}");
    }

    #[test]
    fn a_text_line_contains_the_ids_and_the_error() {
        let line = lines(LogFormat::Text, "info", trouble).join("\n");
        for part in
            ["ERROR", "connection=7", "session=\"0af3\"", module_path!(), "cannot publish", "attempt=2"]
        {
            assert!(line.contains(part), "{part} is missing: {line}");
        }
        assert!(line.split(' ').next().unwrap().ends_with('Z'), "the time is UTC: {line}");
        assert!(!line.contains('\u{1b}'), "no colour outside a terminal: {line}");
    }

    #[test]
    fn the_filter_applies_and_spans_keep_their_ids() {
        let events = || {
            info!(target: "tidegate::auth", "one");
            info!(target: "tidegate::hub", "two");
            let _span = info_span!("quiet", id = 1).entered();
            let _span = error_span!("loud", id = 2).entered();
            error!(target: "tidegate::hub", "three");
        };
        let logged = |filter| -> Vec<Value> {
            lines(LogFormat::Json, filter, events)
                .iter()
                .map(|line| serde_json::from_str(line).unwrap())
                .collect()
        };
        let messages = |lines: &[Value]| lines.iter().map(|line| line["message"].clone()).collect::<Vec<_>>();
        assert_eq!(messages(&logged("info")), ["one", "two", "three"]);
        assert_eq!(messages(&logged("warn,tidegate::auth=info")), ["one", "three"]);
        assert_eq!(messages(&logged("off")), <[Value; 0]>::default());
        let lines = logged("warn");
        assert_eq!(lines[0]["spans"].as_array().map(Vec::len), Some(1), "{lines:?}");
        assert_eq!(lines[0]["spans"][0]["id"], 2);
    }

    #[test]
    fn a_new_filter_applies_at_once() {
        let event = || info!(target: "tidegate::reload", "said");
        let lines = lines_with(LogFormat::Json, "warn", |filter| {
            event();
            filter.set(&"warn,tidegate::reload=info".parse().unwrap());
            event();
            event();
            filter.set(&"off".parse().unwrap());
            event();
        });
        assert_eq!(lines.len(), 2, "{lines:?}");
    }
}
