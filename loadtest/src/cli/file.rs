//! Flags from a TOML file.
//!
//! A key is a flag's long name without its dashes; a value is what would follow it on the command line. Flags
//! from the file precede those of the command line, so the command line wins. The flags' own parser checks
//! every key separately, so one run of the program reports all errors.

use std::{ffi::OsString, fs, path::Path};

use anyhow::{Context, bail};
use clap::{Args, Command, CommandFactory, FromArgMatches, error::ErrorKind};
use toml::{Table, Value};

use super::{Cli, load::GroupArgs};

/// The key that holds tables instead of a value, and the flag that takes each table as words.
const GROUP: &str = "group";

/// `arguments` with the flags of `--config FILE`, if given, inserted before them.
pub fn expand(arguments: Vec<OsString>) -> anyhow::Result<Vec<OsString>> {
    let Some(path) = find(&arguments) else { return Ok(arguments) };
    let Some(scenario) = arguments.get(1).and_then(|name| name.to_str()) else { return Ok(arguments) };
    let command = Cli::command();
    let Some(command) = command.find_subcommand(scenario) else { return Ok(arguments) };
    let path = Path::new(&path);
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let flags = match read(&text, command) {
        Ok(flags) => flags,
        Err(wrong) => bail!("{} is not valid:\n  {}", path.display(), wrong.join("\n  ")),
    };
    let (front, back) = arguments.split_at(2);
    Ok(front
        .iter()
        .cloned()
        .chain(flags.into_iter().map(OsString::from))
        .chain(back.iter().cloned())
        .collect())
}

/// Parses one group of `mixed` as it is written after `--group`.
pub fn group(words: &str) -> anyhow::Result<GroupArgs> {
    let command = GroupArgs::augment_args(Command::new(GROUP).no_binary_name(true));
    let mut arguments = Vec::new();
    for word in words.split_whitespace() {
        let (key, value) =
            word.split_once('=').with_context(|| format!("--group: {word} is not key=value"))?;
        arguments.push(format!("--{key}={value}"));
    }
    let matches = command.try_get_matches_from(arguments);
    let matches = matches.map_err(|error| anyhow::anyhow!("--group {words}: {}", first_line(&error)))?;
    Ok(GroupArgs::from_arg_matches(&matches)?)
}

/// The flags that `text` stands for, or everything that is wrong with it.
fn read(text: &str, command: &Command) -> Result<Vec<String>, Vec<String>> {
    let table: Table = text.parse().map_err(|error: toml::de::Error| vec![error.to_string()])?;
    let (mut flags, mut wrong) = (Vec::new(), Vec::new());
    for (key, value) in &table {
        let mut own = Vec::new();
        match value {
            Value::Array(groups) if key == GROUP && groups.iter().all(Value::is_table) => {
                for (number, group) in (1..).zip(groups.iter().filter_map(Value::as_table)) {
                    match read_group(group) {
                        Ok(words) => own.extend([format!("--{GROUP}"), words]),
                        Err(words) => {
                            wrong.extend(words.iter().map(|words| format!("{GROUP} {number}: {words}")));
                        }
                    }
                }
            }
            value => match written(key, value) {
                Ok(words) => own = words,
                Err(words) => wrong.push(words),
            },
        }
        if let Err(words) = tried(command, key, &own) {
            wrong.push(words);
        }
        flags.extend(own);
    }
    if wrong.is_empty() { Ok(flags) } else { Err(wrong) }
}

fn read_group(table: &Table) -> Result<String, Vec<String>> {
    let command = GroupArgs::augment_args(Command::new(GROUP));
    let (mut words, mut wrong) = (Vec::new(), Vec::new());
    for (key, value) in table {
        match written(key, value).and_then(|flags| tried(&command, key, &flags)) {
            Err(problem) => wrong.push(problem),
            Ok(()) => match text(value) {
                Some(text) if !text.contains(char::is_whitespace) => words.push(format!("{key}={text}")),
                _ => wrong.push(format!("{key}: expected a value without spaces")),
            },
        }
    }
    if wrong.is_empty() { Ok(words.join(" ")) } else { Err(wrong) }
}

/// The value as command-line arguments.
fn written(key: &str, value: &Value) -> Result<Vec<String>, String> {
    match value {
        Value::Boolean(true) => Ok(vec![format!("--{key}")]),
        Value::Boolean(false) => Ok(Vec::new()),
        Value::Array(values) => {
            let texts: Option<Vec<_>> = values.iter().map(text).collect();
            let texts = texts.ok_or_else(|| format!("{key}: expected a list of plain values"))?;
            Ok(vec![format!("--{key}={}", texts.join(","))])
        }
        value => match text(value) {
            Some(text) => Ok(vec![format!("--{key}={text}")]),
            None => Err(format!("{key}: expected a plain value")),
        },
    }
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Integer(number) => Some(number.to_string()),
        Value::Float(number) => Some(number.to_string()),
        Value::Boolean(_) | Value::Datetime(_) | Value::Array(_) | Value::Table(_) => None,
    }
}

/// Checks that `command` accepts these flags.
fn tried(command: &Command, key: &str, flags: &[String]) -> Result<(), String> {
    let known = command.get_arguments().any(|flag| flag.get_long() == Some(key) && !flag.is_hide_set());
    if !known || key == "config" {
        return Err(format!("{key}: no such key for {}", command.get_name()));
    }
    let words = std::iter::once(command.get_name().to_owned()).chain(flags.iter().cloned());
    match command.clone().try_get_matches_from(words) {
        Err(error) if error.kind() != ErrorKind::MissingRequiredArgument => {
            Err(format!("{key}: {}", first_line(&error)))
        }
        _ => Ok(()),
    }
}

fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

fn find(arguments: &[OsString]) -> Option<OsString> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == "--config" {
            return arguments.next().cloned();
        }
        if let Some(path) = argument.to_str().and_then(|text| text.strip_prefix("--config=")) {
            return Some(path.into());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Scenario;

    fn flags(scenario: &str, text: &str) -> Result<Vec<String>, Vec<String>> {
        read(text, Cli::command().find_subcommand(scenario).unwrap())
    }

    #[test]
    fn a_file_gives_the_same_settings_as_flags() {
        let text = "members = 7\nrate = 2.5\nduration = \"3s\"\nno-echo = true\nquiet = false\nserver-pid = [1, 2]\n";
        let mut words = vec!["tidegate-loadtest".to_owned(), "fanout".to_owned()];
        words.extend(flags("fanout", text).unwrap());
        words.extend(["--members".to_owned(), "8".to_owned()]);
        let Scenario::Fanout(args) = Cli::try_parse_from(words).unwrap().scenario else { panic!() };
        assert_eq!((args.members, args.run.server_pid), (8, vec![1, 2]), "the command line wins");
        assert_eq!((args.pace.rate, args.pace.no_echo, args.run.quiet), (2.5, true, false));
    }

    #[test]
    fn all_errors_of_a_file_are_reported_at_once() {
        let wrong =
            flags("fanout", "membres = 7\nrate = 0\nduration = \"soon\"\nsize = [[1]]\nconfig = \"x\"\n");
        let wrong = wrong.unwrap_err();
        assert_eq!(wrong.len(), 5, "{wrong:?}");
        for (words, key) in wrong.iter().zip(["config:", "duration:", "membres:", "rate:", "size:"]) {
            assert!(words.starts_with(key), "{words}");
        }
        assert!(flags("fanout", "members = ").unwrap_err()[0].contains("TOML"), "no TOML at all");
        assert!(flags("fanout", "at-once = 3").is_err(), "a flag of another scenario");
    }

    #[test]
    fn groups_are_tables_or_words() {
        let text =
            "[[group]]\nname = \"big\"\nmembers = 500\n[[group]]\nrate = 2\npublishers = \"members\"\n";
        let flags_of = flags("mixed", text).unwrap();
        assert_eq!(flags_of, ["--group", "members=500 name=big", "--group", "publishers=members rate=2"]);
        let big = group(&flags_of[1]).unwrap();
        assert_eq!((big.name.as_deref(), big.members), (Some("big"), 500));
        let wrong = flags("mixed", "[[group]]\nmember = 1\nrate = \"x\"\n").unwrap_err();
        assert_eq!(wrong.len(), 2, "{wrong:?}");
        assert!(wrong.iter().all(|words| words.starts_with("group 1: ")), "{wrong:?}");
        assert!(group("members").is_err() && group("colour=red").is_err());
    }

    #[test]
    fn the_example_file_in_the_readme_is_valid() {
        let readme = include_str!("../../README.md");
        let (_, file) = readme.split_once("```toml\n").unwrap();
        let (file, _) = file.split_once("```").unwrap();
        assert!(flags("mixed", file).unwrap().contains(&"members=5000 name=big rate=10".to_owned()));
    }
}
