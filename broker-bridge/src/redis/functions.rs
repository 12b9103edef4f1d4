//! The library of functions in Redis that appends publications to the logs of rooms, and how it gets there.
//!
//! The text is `functions.lua`; its head documents every function, key and option. It contains no configuration, so all
//! nodes of one version load the same text, and loading it twice changes nothing. Needs Redis 7.0 or later.
//!
//! # Versions
//!
//! The library counts its versions ([`VERSION`]). A newer one accepts every call that an older one accepts. A node loads
//! its own version if the server has none or an older one, and works with a newer one, so the newest version wins
//! during a rolling upgrade. One interleaving remains: two nodes of different versions both find a third, older one,
//! and the newer node is the first to replace it. Then the server has the version in between. The newer node learns it
//! at the next [`Loading`], or from the error `BADOPTION unknown option` as soon as it matters.
//!
//! # Without permission
//!
//! Where nodes may not load functions, an administrator does it, before each upgrade of the nodes:
//! `tidegate print-functions | redis-cli -x FUNCTION LOAD REPLACE`.

use std::sync::Arc;

use redis::{RedisError, Value, aio::MultiplexedConnection};

/// The library's text, for `FUNCTION LOAD`.
pub const TEXT: &str = include_str!("functions.lua");

/// The version of [`TEXT`], which the function `tidegate_version` returns. It goes up with each change of the text.
pub const VERSION: i64 = 2;

/// Loads the library through `connection` unless the server has this version or a newer one.
pub async fn load(connection: &mut MultiplexedConnection) -> Result<Loaded, LoadError> {
    let mut loading = Loading::new();
    loop {
        let [name, arguments @ ..] = loading.command() else { unreachable!("a command has a name") };
        let mut command = redis::Cmd::new();
        command.arg(*name).arg(arguments);
        let answer = connection.send_packed_command(&command).await?;
        let error = match &answer {
            Value::ServerError(error) => match error.details() {
                Some(details) => format!("{} {details}", error.code()),
                None => error.code().to_owned(),
            },
            _ => String::new(),
        };
        let said = match answer {
            Value::ServerError(_) => Said::Error(&error),
            Value::Int(number) => Said::Integer(number),
            _ => Said::Other,
        };
        if let Some(loaded) = loading.answer(said)? {
            return Ok(loaded);
        }
    }
}

/// Loads the library, one command and one answer at a time, over any connection: send [`command`](Self::command), pass
/// its answer to [`answer`](Self::answer), and repeat until that returns an outcome. At most four commands.
#[derive(Debug)]
pub struct Loading(Step);

/// The command that waits for its answer.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// Asks for the version.
    Ask,
    /// Loads the text where no library was found.
    Load,
    /// Asks for the version once more: somebody else has loaded a library of this name in the meantime, or it is a
    /// different library.
    AskAgain,
    /// Loads the text in place of this version.
    Replace(i64),
}

/// What the server said to one command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said<'a> {
    /// An integer.
    Integer(i64),
    /// Anything else but an error.
    Other,
    /// An error, `CODE text`.
    Error(&'a str),
}

/// The library is on the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// Its version is [`VERSION`], and was before.
    Already,
    /// It has just been loaded, perhaps in place of an older version.
    Now {
        /// The version before.
        replaced: Option<i64>,
    },
    /// It is this newer version.
    Newer(i64),
}

/// Why the library cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The node's user lacks a permission.
    #[error(
        "the Redis user of the node may not load functions ({text}): permit +fcall and +function|load, or run \
         `tidegate print-functions | redis-cli -x FUNCTION LOAD REPLACE` as an administrator"
    )]
    Forbidden {
        /// What the server said.
        text: Arc<str>,
        /// The older version that is on the server, and works.
        present: Option<i64>,
    },
    /// The server has no functions.
    #[error("the server does not know functions: Redis 7.0 or later is needed")]
    TooOld,
    /// Somebody else's library uses the name `tidegate`, or the name of one of its functions.
    #[error(
        "a different library on the Redis server uses the names of Tidegate's ({0}): find it with FUNCTION LIST, and \
         rename or delete it"
    )]
    Stranger(Arc<str>),
    /// The server answered with another error. Its code says whether a retry may succeed.
    #[error("the server said: {0}")]
    Refused(Arc<str>),
    /// The connection failed.
    #[error("{0}")]
    Connection(#[from] RedisError),
}

const ASK: &[&[u8]] = &[b"FCALL", b"tidegate_version", b"0"];
const LOAD: &[&[u8]] = &[b"FUNCTION", b"LOAD", TEXT.as_bytes()];
const REPLACE: &[&[u8]] = &[b"FUNCTION", b"LOAD", b"REPLACE", TEXT.as_bytes()];

impl Loading {
    /// Nothing is known about the server yet.
    #[expect(clippy::new_without_default, reason = "a process, not a value")]
    pub fn new() -> Self {
        Self(Step::Ask)
    }

    /// The command to send, part by part.
    pub fn command(&self) -> &'static [&'static [u8]] {
        match self.0 {
            Step::Ask | Step::AskAgain => ASK,
            Step::Load => LOAD,
            Step::Replace(_) => REPLACE,
        }
    }

    /// Takes the answer to the command. `Ok(None)`: there is another command to send.
    pub fn answer(&mut self, said: Said<'_>) -> Result<Option<Loaded>, LoadError> {
        self.0 = match (self.0, said) {
            (Step::Ask | Step::AskAgain, Said::Integer(version)) => match version {
                VERSION => return Ok(Some(Loaded::Already)),
                newer if newer > VERSION => return Ok(Some(Loaded::Newer(newer))),
                older => Step::Replace(older),
            },
            (Step::Ask | Step::AskAgain, Said::Other) => {
                return Err(LoadError::Stranger("tidegate_version returns no number".into()));
            }
            (Step::Ask, Said::Error(text)) if text.contains("Function not found") => Step::Load,
            (Step::AskAgain, Said::Error(text)) if text.contains("Function not found") => {
                return Err(LoadError::Stranger("a library named tidegate has no tidegate_version".into()));
            }
            (Step::Load, Said::Error(text)) if is_name_taken(text) => Step::AskAgain,
            (Step::Replace(_), Said::Error(text)) if is_name_taken(text) => {
                return Err(LoadError::Stranger(text.into()));
            }
            (step, Said::Error(text)) => return Err(failure(step, text)),
            (Step::Load, _) => return Ok(Some(Loaded::Now { replaced: None })),
            (Step::Replace(before), _) => return Ok(Some(Loaded::Now { replaced: Some(before) })),
        };
        Ok(None)
    }
}

/// Whether a library or a function of this name exists.
fn is_name_taken(text: &str) -> bool {
    text.ends_with("already exists")
}

fn failure(step: Step, text: &str) -> LoadError {
    let present = match step {
        Step::Replace(version) => Some(version),
        Step::Ask | Step::AskAgain | Step::Load => None,
    };
    if text.starts_with("NOPERM") {
        LoadError::Forbidden { text: text.into(), present }
    } else if text.starts_with("ERR unknown command") {
        LoadError::TooOld
    } else {
        LoadError::Refused(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_contains_its_version() {
        assert!(
            TEXT.contains(&format!("\nlocal VERSION = {VERSION}\n")),
            "functions.lua has another version"
        );
        assert!(TEXT.starts_with("#!lua name=tidegate\n") && TEXT.ends_with('\n'));
    }

    type Command = &'static [&'static [u8]];

    /// The commands that follow these answers, and the outcome.
    fn after(answers: &[Said<'_>]) -> (Vec<Command>, Result<Option<Loaded>, String>) {
        let mut loading = Loading::new();
        let mut commands = vec![loading.command()];
        let mut outcome = Ok(None);
        for said in answers {
            outcome = loading.answer(*said).map_err(|error| error.to_string());
            if outcome == Ok(None) {
                commands.push(loading.command());
            }
        }
        (commands, outcome)
    }

    const NOT_FOUND: Said<'_> = Said::Error("ERR Function not found");
    const TAKEN: Said<'_> = Said::Error("ERR Library 'tidegate' already exists");

    #[test]
    fn only_an_older_version_is_replaced() {
        let outcome = |answers: &[Said<'_>]| after(answers).1.unwrap().unwrap();
        assert_eq!(outcome(&[Said::Integer(VERSION)]), Loaded::Already);
        assert_eq!(outcome(&[Said::Integer(VERSION + 1)]), Loaded::Newer(VERSION + 1));
        assert_eq!(outcome(&[NOT_FOUND, Said::Other]), Loaded::Now { replaced: None });
        let older = Said::Integer(VERSION - 1);
        assert_eq!(outcome(&[older, Said::Other]), Loaded::Now { replaced: Some(VERSION - 1) });
        // Another node was faster.
        assert_eq!(outcome(&[NOT_FOUND, TAKEN, Said::Integer(VERSION)]), Loaded::Already);
        assert_eq!(outcome(&[NOT_FOUND, TAKEN, Said::Integer(VERSION + 1)]), Loaded::Newer(VERSION + 1));
        assert_eq!(after(&[NOT_FOUND, TAKEN, older]).0, [ASK, LOAD, ASK, REPLACE]);
    }

    #[test]
    fn each_refusal_says_what_to_do() {
        let refusal = |answers: &[Said<'_>]| after(answers).1.unwrap_err();
        for (answers, words) in [
            (&[NOT_FOUND, TAKEN, NOT_FOUND][..], "rename or delete it"),
            (&[Said::Other], "rename or delete it"),
            (
                &[NOT_FOUND, Said::Error("ERR Function tidegate_open already exists"), NOT_FOUND],
                "rename or delete it",
            ),
            (
                &[Said::Integer(VERSION - 1), Said::Error("ERR Function tidegate_open already exists")],
                "tidegate_open",
            ),
            (&[Said::Error("ERR unknown command 'FCALL', with args beginning with: ")], "Redis 7.0"),
            (
                &[Said::Error("NOPERM this user has no permissions to run the 'fcall' command")],
                "permit +fcall and +function|load",
            ),
            (
                &[
                    NOT_FOUND,
                    Said::Error("NOPERM User x has no permissions to run the 'function|load' command"),
                ],
                "tidegate print-functions | redis-cli -x FUNCTION LOAD REPLACE",
            ),
            (&[NOT_FOUND, Said::Error("READONLY You can't write against a read only replica.")], "READONLY"),
        ] {
            let refusal = refusal(answers);
            assert!(refusal.contains(words), "{answers:?}: {refusal}");
        }
    }
}
