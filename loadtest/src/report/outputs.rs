//! The outputs of a report: standard output, and the files named by flags.
//!
//! A file is opened before the run, so a path that cannot be written is reported before the work is done. It
//! is replaced as a whole at the end, so its old content stays until the new report is complete. A file that
//! cannot be replaced, such as a mount point, is written in place. Each output is written even if others
//! fail.

use std::{
    fmt, fs,
    io::{self, ErrorKind, Write as _},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, anyhow, bail};
use serde::Serialize;

use super::{Verdict, document::Document, html, print};
use crate::cli::{Common, load::Run};

/// The number of links that the kernel follows in one path.
const MOST_LINKS: usize = 40;

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
    /// Written to a temporary file beside `path`, which is then renamed.
    File { path: PathBuf },
    /// A device, a pipe, or an open descriptor of a process: written to, not replaced.
    Stream { path: PathBuf, stream: fs::File },
}

impl Outputs {
    /// Opens the files of a run.
    pub fn of_run(run: &Run) -> anyhow::Result<Self> {
        Self::open(run.json.as_deref(), run.html.as_deref(), None)
    }

    /// Opens the files of a scenario with rounds.
    pub fn of_common(common: &Common) -> anyhow::Result<Self> {
        Self::open(common.json.as_deref(), common.html.as_deref(), None)
    }

    /// Opens these files without truncating them.
    pub fn open(json: Option<&Path>, html: Option<&Path>, markdown: Option<&Path>) -> anyhow::Result<Self> {
        let mut known: Vec<PathBuf> = Vec::new();
        let mut open = |flag, path: Option<&Path>| {
            let Some(path) = path else { return Ok(None) };
            let output = Output::open(path).context(flag)?;
            if known.iter().any(|other| other == output.path()) {
                bail!("{flag}: two reports cannot both be written to {}", path.display());
            }
            known.push(output.path().to_owned());
            Ok(Some(output))
        };
        Ok(Self {
            json: open("--json", json)?,
            html: open("--html", html)?,
            markdown: open("--results", markdown)?,
        })
    }

    /// Prints `document` and writes it and `report` to the requested files. Tries all of them, then fails if
    /// any failed.
    pub fn deliver(self, document: &Document, report: &impl Serialize) -> anyhow::Result<()> {
        self.write(document, report, || html::page(document), String::new)
    }

    /// The same for a report with its own page or Markdown file.
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

    /// Writes the outputs and returns the outcome of the run.
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
        let target = followed(path).with_context(failed)?;
        let append = || fs::OpenOptions::new().append(true).open(&target);
        let is_open = is_descriptor(&target);
        if is_open || fs::metadata(&target).is_ok_and(|found| !found.is_file()) {
            let stream = match standard_stream(&target) {
                Some(stream) => stream,
                None => append(),
            };
            return Ok(Self::Stream { stream: stream.with_context(failed)?, path: target });
        }
        // A file without write permission is not replaced either.
        let exists = target.exists();
        if exists {
            append().with_context(failed)?;
        }
        // Created and removed again, so a run that fails leaves nothing behind.
        let beside = beside(&target);
        match fs::File::create(&beside).and_then(|_| fs::remove_file(&beside)) {
            Err(error) if !(exists && is_kept_from_replacing(&error)) => Err(error).with_context(failed),
            _ => Ok(Self::File { path: target }),
        }
    }

    /// The path, with all links followed.
    fn path(&self) -> &Path {
        match self {
            Self::File { path } | Self::Stream { path, .. } => path,
        }
    }

    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let path = self.path().display().to_string();
        self.try_write(bytes).with_context(|| format!("cannot write {path}"))
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Stream { stream, .. } => stream.write_all(bytes),
            Self::File { path } => replace(path, bytes),
        }
    }
}

/// Resolves links in the directory of `path` and in its name, so that a link's target is replaced and not the
/// link. A descriptor of a process is not followed: it stands for the open file, not for the file's name.
fn followed(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        let Some(name) = path.file_name() else { return fs::canonicalize(&path) };
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = fs::canonicalize(directory.unwrap_or(Path::new(".")))?;
        let found = directory.join(name);
        match fs::read_link(&found) {
            Ok(target) if !is_descriptor(&found) => path = directory.join(target),
            _ => return Ok(found),
        }
    }
    Err(rustix::io::Errno::LOOP.into())
}

/// Whether `path`, whose directory has no links, is in one of the `/proc` directories that list open
/// descriptors.
fn is_descriptor(path: &Path) -> bool {
    path.starts_with("/proc") && path.parent().is_some_and(|directory| directory.ends_with("fd"))
}

/// Standard output or standard error, if `path` is one of this process's own: a duplicate, which shares its
/// file offset. Opening the file again would start at offset 0 and overwrite what others have written since.
fn standard_stream(path: &Path) -> Option<io::Result<fs::File>> {
    let own = fs::canonicalize("/proc/self/fd").ok()?;
    let copy = match path.strip_prefix(own).ok()?.to_str()? {
        "1" => io::stdout().as_fd().try_clone_to_owned(),
        "2" => io::stderr().as_fd().try_clone_to_owned(),
        _ => return None,
    };
    Some(copy.map(fs::File::from))
}

/// Replaces the content of `path` as a whole; if that is impossible, writes the file in place.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_by(|from, to| fs::rename(from, to), path, bytes)
}

fn replace_by(
    rename: impl FnOnce(&Path, &Path) -> io::Result<()>,
    path: &Path,
    bytes: &[u8],
) -> io::Result<()> {
    match put(rename, path, bytes) {
        Err(error) if is_kept_from_replacing(&error) && path.exists() => fs::write(path, bytes),
        outcome => outcome,
    }
}

/// Whether `error` means that the file cannot be replaced but may still be writable: it is a mount point, as
/// in a container, or its directory is read-only.
fn is_kept_from_replacing(error: &io::Error) -> bool {
    let kinds = [ErrorKind::ResourceBusy, ErrorKind::PermissionDenied, ErrorKind::ReadOnlyFilesystem];
    kinds.contains(&error.kind())
}

fn put(rename: impl FnOnce(&Path, &Path) -> io::Result<()>, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = beside(path);
    let put = || {
        fs::write(&beside, bytes)?;
        if let Ok(found) = fs::metadata(path) {
            fs::set_permissions(&beside, found.permissions())?;
        }
        rename(&beside, path)
    };
    put().inspect_err(|_| {
        // The temporary file may not exist.
        let _: io::Result<()> = fs::remove_file(&beside);
    })
}

/// The temporary file: in the same directory, so that it can be renamed.
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
    fn a_file_keeps_its_content_until_it_is_replaced_as_a_whole() {
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
    fn an_unwritable_path_is_reported_before_the_run() {
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
    fn one_file_by_two_names_is_refused_before_the_run() {
        let directory = directory("names");
        let (json, link) = (directory.join("a.json"), directory.join("link"));
        std::os::unix::fs::symlink("a.json", &link).unwrap();
        for other in [
            json.clone(),
            directory.join("./a.json"),
            link,
            directory.join("../").join(directory.file_name().unwrap()).join("a.json"),
        ] {
            let error = Outputs::open(Some(&json), Some(&other), None).unwrap_err().to_string();
            assert_eq!(error, format!("--html: two reports cannot both be written to {}", other.display()));
        }
        assert_eq!(names(&directory), ["link"]);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn open_descriptors_are_appended_to() {
        let directory = directory("open");
        let log = directory.join("log");
        fs::write(&log, "line\n").unwrap();
        let open = fs::OpenOptions::new().append(true).open(&log).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&open);
        for path in [format!("/dev/fd/{number}"), format!("/proc/self/fd/{number}")] {
            let outputs = Outputs::open(Some(Path::new(&path)), None, None).unwrap();
            outputs.deliver(&Document::default(), &1).unwrap();
        }
        assert_eq!(fs::read_to_string(&log).unwrap(), "line\n1\n1\n");
        assert_eq!(names(&directory), ["log"]);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_mount_point_is_written_in_place() {
        let directory = directory("mount");
        let path = directory.join("a.json");
        fs::write(&path, "what was there before").unwrap();
        replace_by(|_, _| Err(ErrorKind::ResourceBusy.into()), &path, b"new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        // A full disk is no reason to overwrite the existing file in place.
        let error = replace_by(|_, _| Err(ErrorKind::StorageFull.into()), &path, b"newer").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StorageFull);
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(names(&directory), ["a.json"]);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn each_output_is_written_even_if_others_fail() {
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
    fn a_link_is_kept_and_its_target_replaced() {
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
