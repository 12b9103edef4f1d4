//! Whatever the configuration: no panic, no secret in an error or in the configuration's debug output, and
//! one line for each error.
//!
//! An input has parts, each ended by a zero byte: the value of a secret key, the file, the environment and
//! the flags (the last two in lines of `NAME=VALUE`). In the first part, `$` is replaced by a word that must
//! never be shown; its first letter chooses the layer and the key.
#![no_main]

use std::{collections::BTreeMap, path::PathBuf};

use libfuzzer_sys::fuzz_target;
use tidegate::config::{Config, Sources};

const WORD: &str = "hunter2";
/// Keys whose values are hidden: secrets, values that may contain a password, and possibly misspelt secrets.
const KEYS: [&str; 4] = ["auth.hs256_secret", "broker.url", "auth.hs256_secrt", "passwords.mine"];

fuzz_target!(|input: &[u8]| {
    let Ok(input) = std::str::from_utf8(input) else { return };
    // The configuration would read a named file, which might block forever.
    if input.contains(WORD) || (input.contains('/') && input.to_ascii_lowercase().contains("_file")) {
        return;
    }
    let mut parts = input.split('\0');
    let mut part = || parts.next().unwrap_or_default();
    let (secret, file, environment, flags) = (part(), part(), part(), part());
    let lines = |text: &str| -> Vec<(String, String)> {
        let split = text.lines().filter_map(|line| line.split_once('='));
        split.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    };
    let mut file = file.to_owned();
    let mut environment: BTreeMap<String, String> = lines(environment).into_iter().collect();
    let mut flags = lines(flags);

    let mut letters = secret.chars();
    let choice = letters.next().map_or(0, |letter| letter as usize);
    let value = letters.as_str().replace('$', WORD);
    let key = KEYS[choice % KEYS.len()];
    match choice / KEYS.len() % 4 {
        0 => flags.push((key.to_owned(), value)),
        1 => {
            let name = format!("TIDEGATE_{}", key.replace('.', "__").to_uppercase());
            environment.insert(name, value);
        }
        // On a line of its own, because other lines may be shown.
        2 => file = format!("{key} = \"{}\n{file}", value.replace(['\n', '\r'], " ")),
        _ => file = format!("{key} = {}\n{file}", value.replace(['\n', '\r'], " ")),
    }
    let file = Some((PathBuf::from("tidegate.toml"), file));
    match Config::load(&Sources { file, env: environment, flags }) {
        // The user and host of a valid address may be shown.
        Ok(_) if key == "broker.url" && !is_password(secret) => {}
        Ok(config) => assert!(!format!("{config:?}").contains(WORD), "a configuration shows a secret"),
        Err(errors) => {
            let text = errors.to_string();
            assert!(!text.contains(WORD), "an error shows a secret: {text}");
            assert!(text.lines().count() == errors.iter().count(), "one line each: {text}");
        }
    }
});

fn is_password(url: &str) -> bool {
    url.matches('$').count() == 1 && url.matches(":$@").count() == 1
}
