//! Where a report goes: standard output, and the files that flags name.
//!
//! A file is opened before the run, so that a path that cannot be written is told before the work is done, and it is
//! replaced as a whole at the end, so that what it held stays until there is something better. Each output is written
//! whatever became of the others.

use std::{
    fmt, fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow, bail};
use serde::Serialize;

use super::{Verdict, document::Document, html, print};
use crate::cli::{Common, load::Run};

/// The outputs of a run.
#[derive(Debug, Default)]
pub struct Outputs {
    json: Option<Output>,
    html: Option<Output>,
    markdown: Option<Output>,
}

/// One file.
#[derive(Debug)]
enum Output {
    /// Written beside `path`, and renamed into its place.
    File { path: PathBuf },
    /// A device, a pipe or a socket, which cannot be replaced.
    Stream { path: PathBuf, stream: fs::File },
}

impl Outputs {
    /// Opens the files of a run.
    pub fn of_run(run: &Run) -> anyhow::Result<Self> {
        Self::open(run.json.as_deref(), run.html.as_deref(), None)
    }

    /// Opens the files of a run in rounds.
    pub fn of_common(common: &Common) -> anyhow::Result<Self> {
        Self::open(common.json.as_deref(), common.html.as_deref(), None)
    }

    /// Opens these files, and truncates none.
    pub fn open(json: Option<&Path>, html: Option<&Path>, markdown: Option<&Path>) -> anyhow::Result<Self> {
        let paths: Vec<&Path> = [json, html, markdown].into_iter().flatten().collect();
        for (number, path) in paths.iter().enumerate() {
            if paths.iter().skip(number + 1).any(|other| other == path) {
                bail!("two reports cannot both be written to {}", path.display());
            }
        }
        let open = |flag, path: Option<&Path>| path.map(|path| Output::open(path).context(flag)).transpose();
        Ok(Self {
            json: open("--json", json)?,
            html: open("--html", html)?,
            markdown: open("--results", markdown)?,
        })
    }

    /// Prints `document` and writes it and `report` where they are asked for. Fails if any of that did, after all of
    /// it was tried.
    pub fn deliver(self, document: &Document, report: &impl Serialize) -> anyhow::Result<()> {
        self.write(document, report, || html::page(document), String::new)
    }

    /// The same for a report with a page, or a Markdown file, of its own.
    pub fn write(
        mut self,
        shown: &impl fmt::Display,
        report: &impl Serialize,
        page: impl FnOnce() -> String,
        markdown: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        let mut failures = Vec::new();
        let mut note = |outcome: anyhow::Result<()>| failures.extend(outcome.err());
        note(print(shown).context("cannot print the report"));
        if let Some(output) = &mut self.json {
            note(serde_json::to_vec_pretty(report).context("the report as JSON").and_then(|mut json| {
                json.push(b'\n');
                output.write(&json)
            }));
        }
        if let Some(output) = &mut self.html {
            note(output.write(page().as_bytes()));
        }
        if let Some(output) = &mut self.markdown {
            note(output.write(markdown().as_bytes()));
        }
        if failures.is_empty() {
            return Ok(());
        }
        let words: Vec<_> = failures.iter().map(|failure| format!("{failure:#}")).collect();
        Err(anyhow!("{}", words.join("\n")))
    }

    /// The same, and what the run came to.
    pub fn conclude(
        self,
        document: &Document,
        report: &impl Serialize,
        interrupted: Option<&str>,
    ) -> anyhow::Result<Verdict> {
        self.deliver(document, report)?;
        Ok(Verdict::of(&document.expectations, interrupted))
    }
}

impl Output {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let failed = || format!("cannot write {}", path.display());
        // The target of a link is replaced, not the link.
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if fs::metadata(&target).is_ok_and(|found| !found.is_file()) {
            let stream = fs::OpenOptions::new().write(true).open(&target).with_context(failed)?;
            return Ok(Self::Stream { path: path.to_owned(), stream });
        }
        // A file that may not be written is not replaced either.
        if target.exists() {
            fs::OpenOptions::new().append(true).open(&target).with_context(failed)?;
        }
        // Made and removed again: a run that fails leaves nothing behind, however it ends.
        let beside = beside(&target);
        fs::File::create(&beside).with_context(failed)?;
        fs::remove_file(&beside).with_context(failed)?;
        Ok(Self::File { path: target })
    }

    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let path = match self {
            Self::File { path } | Self::Stream { path, .. } => path.display().to_string(),
        };
        self.try_write(bytes).with_context(|| format!("cannot write {path}"))
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Stream { stream, .. } => stream.write_all(bytes),
            Self::File { path } => replace(path, bytes),
        }
    }
}

/// Replaces what `path` holds as a whole.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = beside(path);
    let put = || {
        fs::write(&beside, bytes)?;
        if let Ok(found) = fs::metadata(path) {
            fs::set_permissions(&beside, found.permissions())?;
        }
        fs::rename(&beside, path)
    };
    put().inspect_err(|_| {
        // It may not even have been made.
        let _: io::Result<()> = fs::remove_file(&beside);
    })
}

/// Where a file is written before it has its place: in the same directory, so that it can be renamed.
fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("outputs-{name}-{}", process::run_id()));
        fs::create_dir(&path).unwrap();
        path
    }

    fn names(directory: &Path) -> Vec<String> {
        let found = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            found.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_a_file_held_stays_until_it_is_replaced_as_a_whole() {
        let directory = directory("replaced");
        let (json, html) = (directory.join("a.json"), directory.join("a.html"));
        fs::write(&json, "old").unwrap();
        let outputs = Outputs::open(Some(&json), Some(&html), None).unwrap();
        assert_eq!(fs::read_to_string(&json).unwrap(), "old");
        assert_eq!(names(&directory), ["a.json"], "a run that fails leaves nothing behind");
        outputs.deliver(&Document::default(), &"new").unwrap();
        assert_eq!(fs::read_to_string(&json).unwrap(), "\"new\"\n");
        assert_eq!(names(&directory), ["a.html", "a.json"]);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_path_that_cannot_be_written_is_told_at_once() {
        let directory = directory("refused");
        let (good, bad) = (directory.join("a.json"), directory.join("absent/a.html"));
        let error = format!("{:#}", Outputs::open(Some(&good), Some(&bad), None).unwrap_err());
        assert!(error.starts_with("--html: cannot write ") && error.contains("absent/a.html"), "{error}");
        assert!(Outputs::open(Some(&directory), None, None).is_err(), "a directory");
        assert!(Outputs::open(Some(&good), Some(&good), None).is_err(), "twice the same");
        assert!(names(&directory).is_empty());
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn each_output_is_written_whatever_became_of_the_others() {
        let directory = directory("each");
        let (json, html) = (directory.join("gone/a.json"), directory.join("a.html"));
        fs::create_dir(directory.join("gone")).unwrap();
        let outputs = Outputs::open(Some(&json), Some(&html), Some(Path::new("/dev/full"))).unwrap();
        fs::remove_dir_all(directory.join("gone")).unwrap();
        let document = Document::default();
        let page = || html::page(&document);
        let error = outputs.write(&document, &1, page, || "text".into()).unwrap_err().to_string();
        assert!(error.contains("gone/a.json") && error.contains("/dev/full"), "{error}");
        assert!(fs::read_to_string(&html).unwrap().starts_with("<!doctype html>"));
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_link_stays_one_and_its_target_is_replaced() {
        let directory = directory("link");
        let (link, target) = (directory.join("link"), directory.join("target"));
        fs::write(&target, "old").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let outputs = Outputs::open(Some(&link), None, None).unwrap();
        outputs.deliver(&Document::default(), &1).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&target).unwrap(), "1\n");
        fs::remove_dir_all(directory).unwrap();
    }
}
