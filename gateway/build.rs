//! Tells the program which revision it was built from.
//!
//! The variable `BUILD_REVISION` sets it, for builds without a repository, such as that of the image, and for
//! reproducible builds. Otherwise a release build asks git. Other builds don't, because each commit would
//! then recompile everything.

use std::{env, path::Path, process::Command};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=BUILD_REVISION");
    let given = env::var_os("BUILD_REVISION").and_then(|given| given.into_string().ok());
    let is_release = env::var_os("PROFILE").is_some_and(|profile| profile == "release");
    let revision = given
        .map(|given| given.trim().to_owned())
        .filter(|given| !given.is_empty())
        .or_else(|| is_release.then(ask_git).flatten());
    println!("cargo::rustc-env=TIDEGATE_REVISION={}", revision.as_deref().unwrap_or("unknown"));
}

/// The checked-out commit.
fn ask_git() -> Option<String> {
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    // Commits and checkouts append to this log. If the path did not exist, cargo would rerun this script on
    // every build.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]).filter(|log| Path::new(log).exists()) {
        println!("cargo::rerun-if-changed={log}");
    }
    Some(commit)
}

fn git(arguments: &[&str]) -> Option<String> {
    let output =
        Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}
