//! Files that an operator provides: configuration, secrets, certificates, keys.
//!
//! Owns the rules that apply to all of them, and makes sure that a read blocks nobody. Does not interpret
//! contents.
//!
//! A file must be a regular file, or a link to one: reading a FIFO or a device may block forever. It must be
//! UTF-8 and of bounded size. A byte-order mark at its beginning is not part of the text. A file with a
//! single value ([`read_value`]) has one line. Line breaks around it are not part of the value; everything
//! else is.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
    time::Duration,
};

use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

/// The maximum size of a file with a single value or a few certificates, in bytes.
pub const MAX_SMALL: usize = 64 * 1024;
/// The maximum size of any other file, in bytes. It is read every few seconds.
pub const MAX: usize = 1024 * 1024;

/// The time limit for reading a file.
const DEADLINE: Duration = Duration::from_secs(10);
/// The maximum number of hung reads, each with its own thread.
const MAX_HUNG: usize = 4;

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The operating system reports an error.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is not a regular file.
    #[error("it is {0}, not a regular file")]
    Kind(&'static str),
    /// It is too large.
    #[error("it is larger than {} KiB", .max / 1024)]
    TooLarge {
        /// The maximum size in bytes.
        max: usize,
    },
    /// It is text in another encoding.
    #[error("it is {0}, not UTF-8")]
    Encoding(&'static str),
    /// It is not text.
    #[error("it is not UTF-8 text: byte {at} is invalid")]
    NotText {
        /// The position of the byte, from 0.
        /// The position of the byte, counted from 0.
        at: usize,
    },
    /// It holds more than one value.
    #[error("it has {lines} lines; expected one")]
    Lines {
        /// The number of lines from the first to the last that is not empty.
        lines: usize,
    },
    /// It contains no value.
    #[error("it is empty")]
    Empty,
}

/// Reads the text of a file of at most `max` bytes.
pub fn read_text(path: &Path, max: usize) -> Result<String, FileError> {
    // Without NONBLOCK, opening a FIFO without a writer would block.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(open(path, flags, Mode::empty()).map_err(io::Error::from)?);
    let kind = FileType::from_raw_mode(fstat(&file).map_err(io::Error::from)?.st_mode);
    if kind != FileType::RegularFile {
        return Err(FileError::Kind(name(kind)));
    }
    let mut bytes = Vec::new();
    if file.take(max as u64 + 1).read_to_end(&mut bytes)? > max {
        return Err(FileError::TooLarge { max });
    }
    text(bytes)
}

/// Reads the value in a file of one line.
pub fn read_value(path: &Path) -> Result<String, FileError> {
    let text = read_text(path, MAX_SMALL)?;
    let value = text.trim_matches(['\r', '\n']);
    let lines = value.lines().count();
    // The caller knows what it expects and reports a key instead of a secret better.
    let is_pem = value.contains("-----BEGIN ");
    match lines {
        0 => Err(FileError::Empty),
        1 => Ok(value.to_owned()),
        _ if is_pem => Ok(value.to_owned()),
        _ => Err(FileError::Lines { lines }),
    }
}

fn text(bytes: Vec<u8>) -> Result<String, FileError> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        return Err(FileError::Encoding("UTF-16"));
    }
    let mut text = String::from_utf8(bytes)
        .map_err(|error| FileError::NotText { at: error.utf8_error().valid_up_to() })?;
    // NUL bytes usually mean UTF-16 without a byte-order mark.
    if let Some(at) = text.find('\0') {
        return Err(FileError::NotText { at });
    }
    if text.starts_with('\u{feff}') {
        text.remove(0);
    }
    Ok(text)
}

fn name(kind: FileType) -> &'static str {
    match kind {
        FileType::Directory => "a directory",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        _ => "something else",
    }
}

/// Why a file's contents are unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Hung {
    /// The read has exceeded its deadline.
    #[error("the file system has not answered within {}s", .0.as_secs())]
    Deadline(Duration),
    /// Too many earlier reads still hang.
    #[error("the file system has not answered {MAX_HUNG} earlier attempts")]
    TooMany,
    /// The read has panicked, or the runtime is shutting down.
    #[error("the read was aborted")]
    Lost,
}

/// Reads from file systems that may not answer, such as NFS. A hung read is left behind with its thread, and
/// the next read gets another thread, up to a maximum.
#[derive(Debug)]
pub struct Reads {
    deadline: Duration,
    hung: Vec<JoinHandle<()>>,
}

impl Default for Reads {
    fn default() -> Self {
        Self { deadline: DEADLINE, hung: Vec::new() }
    }
}

impl Reads {
    /// Whether any read hangs. Periodic reads should wait until none does.
    pub fn hang(&mut self) -> bool {
        self.hung.retain(|read| !read.is_finished());
        !self.hung.is_empty()
    }

    /// Runs `read`, which may block, and returns its result.
    pub async fn run<T: Send + 'static>(
        &mut self,
        read: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Hung> {
        if self.hang() && self.hung.len() >= MAX_HUNG {
            return Err(Hung::TooMany);
        }
        let (tell, told) = oneshot::channel();
        let reading = tokio::task::spawn_blocking(move || drop(tell.send(read())));
        let Ok(found) = timeout(self.deadline, told).await else {
            self.hung.push(reading);
            return Err(Hung::Deadline(self.deadline));
        };
        found.map_err(|_| Hung::Lost)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::net::UnixListener, sync::mpsc::sync_channel};

    use rustix::fs::{CWD, mknodat};

    use super::*;

    fn said<T: std::fmt::Debug>(result: Result<T, FileError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn only_regular_files_are_read_and_reads_never_block() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        let socket = dir.path().join("socket");
        let _socket = UnixListener::bind(&socket).unwrap();
        for (path, what) in [
            (fifo.as_path(), "it is a FIFO, not a regular file"),
            (dir.path(), "it is a directory, not a regular file"),
            (Path::new("/dev/zero"), "it is a device, not a regular file"),
            (socket.as_path(), "No such device or address"),
            (&dir.path().join("none"), "No such file or directory"),
        ] {
            let error = said(read_text(path, MAX));
            assert!(error.starts_with(what), "{}: {error}", path.display());
        }
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        fs::write(&file, "text").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(read_text(&link, 4).unwrap(), "text");
        assert_eq!(said(read_text(&link, 3)), "it is larger than 0 KiB");
    }

    #[test]
    fn a_byte_order_mark_and_line_ends_are_not_part_of_a_value() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("value");
        let read = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            read_value(&path)
        };
        for sound in [
            &b"a value"[..],
            b"a value\n",
            b"a value\r\n",
            b"a value\n\n\n",
            b"\r\na value\r\n\r\n",
            b"\xef\xbb\xbfa value",
            b"\xef\xbb\xbfa value\r\n",
        ] {
            assert_eq!(read(sound).unwrap(), "a value", "{sound:?}");
        }
        // Spaces are part of the value.
        assert_eq!(read(b" a\tvalue \n").unwrap(), " a\tvalue ");
        for (wrong, error) in [
            (&b""[..], "it is empty"),
            (b"\n\r\n", "it is empty"),
            (b"\xef\xbb\xbf\n", "it is empty"),
            (b"one\ntwo\n", "it has 2 lines; expected one"),
            (b"one\r\n\r\ntwo", "it has 3 lines; expected one"),
            (b"\xff\xfea\0 \0", "it is UTF-16, not UTF-8"),
            (b"\xfe\xff\0a\0 ", "it is UTF-16, not UTF-8"),
            (b"a\0 \0", "it is not UTF-8 text: byte 1 is invalid"),
            (b"caf\xe9", "it is not UTF-8 text: byte 3 is invalid"),
        ] {
            assert_eq!(said(read(wrong)), error, "{wrong:?}");
        }
        let pem = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n";
        assert_eq!(read(pem.as_bytes()).unwrap(), pem.trim_end());
    }

    #[tokio::test]
    async fn a_hung_read_is_abandoned_and_the_next_one_works() {
        let mut reads = Reads { deadline: Duration::from_millis(20), ..Reads::default() };
        assert_eq!(reads.run(|| 1).await, Ok(1));
        let mut answers = Vec::new();
        for number in 0..MAX_HUNG {
            let (answer, answered) = sync_channel::<()>(1);
            answers.push(answer);
            let hung = reads.run(move || answered.recv().is_ok()).await;
            assert_eq!(hung, Err(Hung::Deadline(reads.deadline)), "{number}");
            if number + 1 < MAX_HUNG {
                reads.deadline = Duration::from_secs(10);
                assert_eq!(reads.run(|| 2).await, Ok(2), "{number}");
                reads.deadline = Duration::from_millis(20);
            }
        }
        assert!(reads.hang());
        assert_eq!(reads.run(|| 3).await, Err(Hung::TooMany), "threads do not pile up");
        answers.clear();
        while reads.hang() {
            tokio::task::yield_now().await;
        }
        reads.deadline = Duration::from_secs(10);
        assert_eq!(reads.run(|| 4).await, Ok(4));
    }
}
