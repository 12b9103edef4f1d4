//! Which events are logged.
//!
//! The syntax is that of tracing-subscriber's `EnvFilter`, which accepts any word as a target: with `debgu`
//! instead of `debug`, a node would log nothing. This module knows which levels and targets exist, and
//! refuses others.

use std::{fmt, str::FromStr, sync::Arc};

use tracing_subscriber::EnvFilter;

use super::{error::quote, suggest::suggest};

/// The levels, from no output to the most detailed.
const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Targets that log events: the modules of this crate, and the crates it uses that log with `tracing`.
const TARGETS: &[&str] = &[
    "tidegate",
    "tidegate::auth",
    "tidegate::budget",
    "tidegate::cli",
    "tidegate::clock",
    "tidegate::config",
    "tidegate::crypto",
    "tidegate::delivery",
    "tidegate::descriptors",
    "tidegate::drain",
    "tidegate::driver",
    "tidegate::file",
    "tidegate::framing",
    "tidegate::health",
    "tidegate::history",
    "tidegate::http1",
    "tidegate::hub",
    "tidegate::limits",
    "tidegate::node",
    "tidegate::protocol",
    "tidegate::reload",
    "tidegate::request",
    "tidegate::room_map",
    "tidegate::serve",
    "tidegate::server",
    "tidegate::session",
    "tidegate::settings",
    "tidegate::shard",
    "tidegate::shrink",
    "tidegate::telemetry",
    "tidegate::timeout",
    "tidegate::tls",
    "tidegate::traffic",
    "tidegate::vocabulary",
    "tidegate::watch",
    "tidegate::websocket",
    "broker_bridge",
    "hyper_util",
];

/// A log filter: directives of `tracing_subscriber::EnvFilter` with only existing levels and targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFilter(Arc<str>);

/// Why a text is not a [`LogFilter`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a level, or target=level, such as info,tidegate::auth=debug: {0}")]
pub struct InvalidLogFilter(String);

impl LogFilter {
    /// The filter for a subscriber.
    pub fn to_env_filter(&self) -> EnvFilter {
        EnvFilter::try_new(&*self.0).expect("`from_str` has parsed the directives")
    }
}

impl FromStr for LogFilter {
    type Err = InvalidLogFilter;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // The parser of tracing-subscriber 0.3.23 slices inside multi-byte characters and panics. Targets are
        // module paths, so ASCII is enough.
        if !text.is_ascii() || text.trim().is_empty() {
            return Err(InvalidLogFilter("the text is empty or not ASCII".to_owned()));
        }
        // The parser does not skip spaces either.
        let directives: Vec<_> = text.split(',').map(str::trim).collect();
        for directive in &directives {
            check(directive).map_err(InvalidLogFilter)?;
        }
        let filter = directives.join(",");
        match EnvFilter::try_new(&filter) {
            Ok(_) => Ok(Self(Arc::from(filter))),
            Err(_) => Err(InvalidLogFilter(format!("{} cannot be parsed", quote(text)))),
        }
    }
}

impl fmt::Display for LogFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks `level`, `target`, `target=level` or `target[span]=level`. Does not check span names.
fn check(directive: &str) -> Result<(), String> {
    let (target, level) = if let Some((target, rest)) = directive.split_once('[') {
        (target, rest.rsplit_once(']').map_or("", |(_, end)| end).strip_prefix('='))
    } else if let Some((target, level)) = directive.split_once('=') {
        (target, Some(level))
    } else if is_level(directive) {
        ("", Some(directive))
    } else if is_target(directive) {
        (directive, None)
    } else {
        let near = did_you_mean(directive, LEVELS.iter().chain(TARGETS).copied());
        return Err(format!(
            "{} is neither a level ({}) nor a target of this program{near}",
            quote(directive),
            LEVELS.join(", ")
        ));
    };
    if let Some(level) = level.filter(|level| !is_level(level)) {
        let near = did_you_mean(level, LEVELS.into_iter());
        return Err(format!("{} is not a level ({}){near}", quote(level), LEVELS.join(", ")));
    }
    if !target.is_empty() && !is_target(target) {
        let near = did_you_mean(target, TARGETS.iter().copied());
        return Err(format!("nothing in this program logs as {}{near}", quote(target)));
    }
    Ok(())
}

fn is_level(text: &str) -> bool {
    LEVELS.iter().any(|level| level.eq_ignore_ascii_case(text)) || matches!(text.as_bytes(), [b'0'..=b'5'])
}

/// Whether any event's target starts with this text, which is how a filter compares. All modules of this
/// crate are known; of other crates, only the crate's name.
fn is_target(text: &str) -> bool {
    let is_within = |known: &str| {
        known != "tidegate" && text.strip_prefix(known).is_some_and(|rest| rest.starts_with("::"))
    };
    !text.is_empty() && TARGETS.iter().any(|known| known.starts_with(text) || is_within(known))
}

fn did_you_mean<'a>(text: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    match suggest(&text.to_ascii_lowercase(), known).as_slice() {
        [] => String::new(),
        near => format!("; did you mean {}?", near.join(" or ")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn filters_with_known_levels_and_targets_are_accepted() {
        for text in [
            "info",
            "off",
            "INFO",
            "5",
            "warn,tidegate=debug",
            "warn, tidegate::auth=debug",
            "tidegate::auth=trace",
            "tidegate::shard::connection=debug",
            "tidegate::auth",
            "broker_bridge::redis=debug",
            "info,[connection{id=3}]=debug",
            "tidegate[connection]=debug",
            "info,[connection]",
        ] {
            let filter: LogFilter = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            drop(filter.to_env_filter());
            assert_eq!(filter.to_string(), text.replace(' ', ""));
        }
    }

    #[test]
    fn filters_that_would_silence_the_node_are_refused() {
        for (wrong, hint) in [
            ("", "the text is empty"),
            ("  ", "the text is empty"),
            (" Ａ=", "not ASCII"),
            ("debgu", r#""debgu" is neither a level (off, error, warn, info, debug, trace)"#),
            ("debgu", "did you mean debug?"),
            ("Debgu", "did you mean debug?"),
            ("info,tidegate::auth=debgu", r#""debgu" is not a level"#),
            ("tidegate=loud", r#""loud" is not a level"#),
            ("tidegate=", "is not a level"),
            ("info,tidegate::atuh=debug", "did you mean tidegate::auth?"),
            ("info,tidegate::nothing=debug", r#"nothing in this program logs as "tidegate::nothing""#),
            ("info,tidegates=debug", "did you mean tidegate?"),
            ("info,centrifugo=debug", "nothing in this program logs as"),
            ("info,debgu", "did you mean debug?"),
            ("info,", "is neither"),
            ("a=b=c", "is not a level"),
            ("6", "is neither"),
            ("info,[{", "cannot be parsed"),
        ] {
            let error = wrong.parse::<LogFilter>().expect_err(wrong).to_string();
            assert!(error.starts_with("expected a level"), "{error}");
            assert!(error.contains(hint), "{wrong}: {error}");
        }
    }

    #[test]
    fn each_module_is_a_log_target() {
        let modules = include_str!("../lib.rs").lines().filter_map(|line| {
            let line = line.strip_prefix("pub ").unwrap_or(line);
            Some(format!("tidegate::{}", line.strip_prefix("mod ")?.strip_suffix(';')?))
        });
        let own: Vec<_> = TARGETS.iter().filter(|target| target.starts_with("tidegate::")).collect();
        assert_eq!(own, modules.collect::<Vec<_>>().iter().collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn junk_never_panics(text in any::<String>(), near in "[a-z:=,\\[\\]{}]{0,30}") {
            for text in [text, near] {
                if let Ok(filter) = text.parse::<LogFilter>() {
                    drop(filter.to_env_filter());
                }
            }
        }
    }
}
