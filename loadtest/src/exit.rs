//! How a run ends: the one table of exit codes, which `--help` prints and README.md repeats.

use std::{fmt::Write as _, process::ExitCode};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Everything was done and as expected.
    Met = 0,
    /// It was carried out, but an expectation did not hold or a part was not done.
    NotMet = 1,
    /// It could not be carried out.
    Failed = 2,
    /// It was ended early.
    Interrupted = 3,
}

impl Exit {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Met, Self::NotMet, Self::Failed, Self::Interrupted];

    /// The code that a shell sees.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The meaning, in one line.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Met => {
                "everything requested was done, no client was lost, and every expectation (`--expect-…`) was met"
            }
            Self::NotMet => {
                "an expectation was not met, or a part was not done: a line on standard error says which; the report is \
                 written anyway"
            }
            Self::Failed => {
                "the test could not be carried out (a wrong flag, a refused client, a dead publisher), or a report could \
                 not be written"
            }
            Self::Interrupted => {
                "Ctrl-C, SIGTERM, SIGHUP or `--time-limit` ended the run early: the report covers the run up to then, and \
                 no expectation counts as met"
            }
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// The table at the end of `--help`.
pub fn help() -> String {
    let mut text = String::from("Exit codes:\n");
    for exit in Exit::ALL {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {}  {}", exit.code(), exit.meaning().replace('`', ""));
    }
    text.push_str("A second signal ends the process at once, with 128 and the signal's number.");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;

    #[test]
    fn the_readme_and_the_help_of_every_scenario_have_the_same_table() {
        let readme = include_str!("../README.md");
        let is_code = |line: &&str| matches!(line.as_bytes(), [b'|', b' ', b'0'..=b'9', b' ', b'|', ..]);
        let codes = readme.lines().filter(is_code);
        let expected = Exit::ALL.map(|exit| format!("| {} | {} |", exit.code(), exit.meaning()));
        assert_eq!(codes.collect::<Vec<_>>(), expected);
        let command = cli::command();
        for scenario in std::iter::once(&command).chain(command.get_subcommands()) {
            let shown = scenario.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert_eq!(shown, help(), "{}", scenario.get_name());
        }
    }
}
