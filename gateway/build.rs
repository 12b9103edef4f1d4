//! Tells the program which revision it was built from.
//!
//! `BUILD_REVISION` says it: where there is no repository, as in the image's build, and where a build is to be
//! reproduced. Otherwise a release build asks git. Other builds do not: each commit would compile everything anew.

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

/// The commit that is checked out.
fn ask_git() -> Option<String> {
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    // A commit and a checkout add a line to it. A path that is not there would have cargo run this every time.
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
