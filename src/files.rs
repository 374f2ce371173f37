//! Files as the program writes them, every one: models, sessions, arrays, tables, reports, journals
//! and what is kept for a later run.
//!
//! A new file is written under a random name beside its place, synced, and renamed ([`OutputFile`]):
//! until it is whole, what was there before is untouched, and nothing incomplete ever has the final
//! name. Only what was made here is removed when something fails. A process that is killed leaves a
//! file `NAME.RANDOM.part` behind, which stands in nobody's way.
//!
//! - Symbolic links are followed: what they lead to is written, and they stay.
//! - A file that is there keeps its mode, and its owner where the system allows it; one that is
//!   read-only is refused, for root too.
//! - Character devices (`/dev/null`), pipes and `/dev/stdout` cannot be replaced and are written to.
//!   Folders, sockets and disks are refused.
//! - No output may be one of the inputs, by whatever name.
//!
//! A file that grows by records ([`GrowingFile`]) cannot be renamed into place: there a record that
//! could not be written whole is cut off again.

use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// Bytes that are held back so that the system is asked rarely.
const BUFFER: usize = 1 << 20;

/// The most bytes of a file's name that the name of its part begins with: names end at 255 bytes.
const MOST_STEM: usize = 200;

/// As many links as Linux follows.
const MOST_LINKS: usize = 40;

/// A file that is being written. It appears under its name with [`OutputFile::finish`], and not
/// at all if it is dropped before.
#[derive(Debug)]
pub(crate) struct OutputFile {
    name: String,
    sink: BufWriter<Sink>,
}

/// Where the bytes go.
#[derive(Debug)]
enum Sink {
    /// To a new file beside `place`.
    Beside { part: NamedTempFile, place: PathBuf },
    /// To what cannot be replaced.
    Stream(File),
}

/// What is at a path.
#[derive(Debug)]
enum Found {
    /// Nothing.
    Nothing,
    /// A regular file.
    File(Metadata),
    /// A standard stream of this process, by whatever name. (Other systems have no names for them.)
    #[cfg_attr(not(unix), allow(dead_code))]
    Standard(File),
    /// What can only be written to. (Not opened: a FIFO waits for a reader.)
    Stream,
}

impl OutputFile {
    /// Begins a file that must be none of `inputs`. The file at `path` is looked at now, so that one
    /// that cannot be written is refused before the work is done.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is an input or no name for a file; [`Error::Io`] if it cannot be
    /// written.
    pub fn create<'a>(path: &Path, inputs: impl IntoIterator<Item = &'a Path>) -> Result<Self> {
        Self::begin(path, inputs, true)
    }

    /// The same for a file that is meant to be read again: devices and pipes are refused.
    ///
    /// # Errors
    /// As [`OutputFile::create`].
    pub fn create_regular(path: &Path) -> Result<Self> {
        Self::begin(path, [], false)
    }

    fn begin<'a>(
        path: &Path,
        inputs: impl IntoIterator<Item = &'a Path>,
        may_stream: bool,
    ) -> Result<Self> {
        let name = path.display().to_string();
        let io = |e| Error::io(&name, e);
        let ends_open = name.chars().next_back().is_some_and(std::path::is_separator);
        if path.file_name().is_none() || ends_open || path.is_dir() {
            return Err(Error::invalid(format!("{name} is no name for a file to write")));
        }
        let place = follow(path).map_err(io)?;
        let found = look(&place).map_err(io)?;
        let sink = match found {
            Found::Stream | Found::Standard(_) if !may_stream => {
                return Err(io(io::Error::other("is no regular file, which is needed here")));
            }
            Found::Standard(file) => Sink::Stream(file),
            // (At its end: a regular file that is open as a descriptor has its content.)
            Found::Stream => {
                let file = OpenOptions::new().append(true).open(&place);
                Sink::Stream(file.map_err(io)?)
            }
            Found::Nothing => Sink::beside(place, None).map_err(io)?,
            Found::File(meta) => {
                check_inputs(&place, inputs)?;
                check_writable(&place, &meta).map_err(io)?;
                Sink::beside(place, Some(&meta)).map_err(io)?
            }
        };
        Ok(OutputFile { name, sink: BufWriter::with_capacity(BUFFER, sink) })
    }

    /// Refuses inputs that are known only now.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is one of them.
    pub fn is_none_of<'a>(&self, inputs: impl IntoIterator<Item = &'a Path>) -> Result<()> {
        match self.sink.get_ref() {
            Sink::Beside { place, .. } => check_inputs(place, inputs),
            Sink::Stream(_) => Ok(()),
        }
    }

    /// The error for what writing to it returned.
    pub fn error(&self, source: io::Error) -> Error {
        Error::io(&self.name, source)
    }

    /// Gives the file its name, with all that was written in it on the disk.
    ///
    /// # Errors
    /// What the system says. Then what was there before still is.
    pub fn finish(self) -> Result<()> {
        let OutputFile { name, sink } = self;
        let finished = sink.into_inner().map_err(io::IntoInnerError::into_error);
        finished.and_then(Sink::finish).map_err(|e| Error::io(name, e))
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sink.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

impl Sink {
    fn beside(place: PathBuf, replaced: Option<&Metadata>) -> io::Result<Self> {
        let stem = place.file_name().and_then(|name| name.to_str());
        let stem = stem.filter(|stem| stem.len() <= MOST_STEM).unwrap_or("mtad");
        let prefix = format!("{stem}.");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".part");
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let part = ask(|| builder.tempfile_in(folder(&place)))?;
        if let Some(meta) = replaced {
            keep_owner_and_mode(part.as_file(), meta)?;
        }
        Ok(Sink::Beside { part, place })
    }

    fn file(&mut self) -> &mut File {
        match self {
            Sink::Beside { part, .. } => part.as_file_mut(),
            Sink::Stream(file) => file,
        }
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Sink::Stream(mut file) => file.flush(),
            Sink::Beside { part, place } => {
                ask(|| part.as_file().sync_all())?;
                ask(|| part.persist(&place).map_err(|e| e.error))?;
                // The name is there; some file systems cannot be asked to keep it through a power
                // cut, and then nothing is lost but that.
                #[cfg(unix)]
                let _ = File::open(folder(&place)).and_then(|folder| folder.sync_all());
                Ok(())
            }
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        ask_to_write(self.file(), bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file().flush()
    }
}

/// A file that grows by records, such as a journal, and is this process's alone while it is open.
#[derive(Debug)]
pub(crate) struct GrowingFile {
    name: String,
    file: File,
    len: u64,
}

impl GrowingFile {
    /// Opens a file, or begins an empty one.
    ///
    /// # Errors
    /// It is no regular file, cannot be written, or is open in another process.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let io = |e| Error::io(&name, e);
        // Asked first: opening a FIFO would wait for its other end.
        match look(&follow(path).map_err(io)?).map_err(io)? {
            Found::Nothing => {}
            Found::File(meta) => check_writable(path, &meta).map_err(io)?,
            _ => return Err(io(io::Error::other("is no regular file, which is needed here"))),
        }
        let file = ask(|| OpenOptions::new().create(true).read(true).append(true).open(path));
        let file = file.map_err(io)?;
        // (Some network file systems have no locks; then nobody can know.)
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            let what = "is in use by another process; wait for it, or name another folder";
            return Err(io(io::Error::new(io::ErrorKind::ResourceBusy, what)));
        }
        let len = file.metadata().map_err(io)?.len();
        Ok(GrowingFile { name, file, len })
    }

    /// Its name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is in it. To be read before anything is added.
    pub fn reader(&mut self) -> BufReader<&mut File> {
        BufReader::new(&mut self.file)
    }

    /// Keeps the first bytes only.
    ///
    /// # Errors
    /// What the system says.
    pub fn truncate(&mut self, len: u64) -> Result<()> {
        ask(|| self.file.set_len(len)).map_err(|e| Error::io(&self.name, e))?;
        self.len = len;
        Ok(())
    }

    /// Adds a record, as a whole or not at all.
    ///
    /// # Errors
    /// What the system says.
    pub fn append(&mut self, record: &[u8]) -> Result<()> {
        let mut left = record;
        let mut written = Ok(());
        while !left.is_empty() && written.is_ok() {
            match ask_to_write(&mut self.file, left) {
                Ok(n) => left = &left[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => written = Err(e),
            }
        }
        let written = written.and_then(|()| ask(|| self.file.sync_data()));
        match written {
            Ok(()) => {
                self.len += record.len() as u64;
                Ok(())
            }
            Err(error) => {
                // Half a record would spoil the next one. If this fails, too, who opens the file
                // next finds it at its end.
                let _ = self.file.set_len(self.len);
                Err(Error::io(&self.name, error))
            }
        }
    }
}

impl Drop for GrowingFile {
    fn drop(&mut self) {
        // Closing would do, but for a process that another thread is just starting: until it has
        // become what it runs, it has all files of this one.
        let _ = self.file.unlock();
    }
}

/// The content of a regular file of at most so many bytes. Anything else is refused before it is
/// opened: a FIFO would wait for a writer.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] for what is no regular file, or a longer one.
pub(crate) fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let name = path.display().to_string();
    let io = |e| Error::io(&name, e);
    let meta = fs::metadata(path).map_err(io)?;
    if !meta.is_file() {
        return Err(Error::format(name, "is not a regular file"));
    }
    // (It may grow after it was asked.)
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(most + 1).read_to_end(&mut bytes)).map_err(io)?;
    if meta.len() > most || bytes.len() as u64 > most {
        let what = format!("has {} bytes; at most {most} are read", meta.len());
        return Err(Error::format(name, what));
    }
    Ok(bytes)
}

/// Whether a path leads to what standard output is.
pub(crate) fn is_standard_output(path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::fd::AsFd;
        let output = io::stdout().as_fd().try_clone_to_owned().map(File::from);
        let output = output.and_then(|file| file.metadata());
        output.is_ok_and(|output| fs::metadata(path).is_ok_and(|meta| id(&meta) == id(&output)))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        false
    }
}

/// Refuses an output that is an input, by whatever name.
///
/// # Errors
/// [`Error::Invalid`] with the input.
pub(crate) fn check_inputs<'a>(
    output: &Path,
    inputs: impl IntoIterator<Item = &'a Path>,
) -> Result<()> {
    match inputs.into_iter().find(|input| is_same(input, output)) {
        Some(input) => {
            let input = input.display();
            Err(Error::invalid(format!("{input} is the input; name another output file")))
        }
        None => Ok(()),
    }
}

/// Whether two paths lead to one file.
fn is_same(a: &Path, b: &Path) -> bool {
    #[cfg(unix)]
    let same = match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => id(&a) == id(&b),
        _ => false,
    };
    #[cfg(not(unix))]
    let same = same_file::is_same_file(a, b).unwrap_or(false);
    same
}

/// What tells a file from every other: device and inode.
#[cfg(unix)]
fn id(meta: &Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    (meta.dev(), meta.ino())
}

/// The folder that a file is in.
fn folder(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether a path names an open descriptor (`/dev/fd/3`) rather than a file.
fn is_descriptor(path: &Path) -> bool {
    fs::canonicalize(folder(path)).is_ok_and(|folder| {
        folder == Path::new("/dev/fd") || folder.starts_with("/proc") && folder.ends_with("fd")
    })
}

/// The end of a chain of symbolic links, whether it is there or not.
fn follow(path: &Path) -> io::Result<PathBuf> {
    let mut at = path.to_owned();
    for _ in 0..MOST_LINKS {
        let is_link = fs::symlink_metadata(&at).is_ok_and(|meta| meta.is_symlink());
        if !is_link || is_descriptor(&at) {
            return Ok(at);
        }
        at = folder(&at).join(fs::read_link(&at)?);
    }
    Err(io::Error::other("leads from one symbolic link to the next without end"))
}

/// What is at the end of a chain of links.
fn look(place: &Path) -> io::Result<Found> {
    let meta = match fs::metadata(place) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(e) => return Err(e),
    };
    #[cfg(unix)]
    {
        use std::os::fd::AsFd;
        use std::os::unix::fs::FileTypeExt;
        // A redirected stream has a place in its file, which a copy of the descriptor shares.
        let (output, error) = (io::stdout(), io::stderr());
        for stream in [output.as_fd(), error.as_fd()] {
            let stream = File::from(stream.try_clone_to_owned()?);
            if id(&stream.metadata()?) == id(&meta) {
                return Ok(Found::Standard(stream));
            }
        }
        let kind = meta.file_type();
        let what = match () {
            () if kind.is_fifo() || kind.is_char_device() => return Ok(Found::Stream),
            () if kind.is_file() && is_descriptor(place) => return Ok(Found::Stream),
            () if kind.is_file() => return Ok(Found::File(meta)),
            () if kind.is_dir() => "a folder",
            () if kind.is_socket() => "a socket",
            () if kind.is_block_device() => "a disk",
            () => "no file",
        };
        Err(io::Error::other(format!("is {what}, which is not written to")))
    }
    #[cfg(not(unix))]
    Ok(match meta.is_file() {
        true => Found::File(meta),
        false => Found::Stream,
    })
}

/// Renaming asks for the folder's permission alone; whoever made a file read-only meant the file.
fn check_writable(place: &Path, meta: &Metadata) -> io::Result<()> {
    if meta.permissions().readonly() {
        let what = "is read-only; make it writable, or name another file";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
    }
    OpenOptions::new().write(true).open(place).map(drop)
}

/// Makes a new file what the one that it replaces was.
fn keep_owner_and_mode(file: &File, replaced: &Metadata) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
        let new = file.metadata()?;
        if (new.uid(), new.gid()) != (replaced.uid(), replaced.gid()) {
            // Only root may give files away; whoever else may write here becomes the owner.
            let _ = fchown(file, Some(replaced.uid()), Some(replaced.gid()));
        }
        file.set_permissions(PermissionsExt::from_mode(replaced.permissions().mode() & 0o777))
    }
    #[cfg(not(unix))]
    {
        let _ = (file, replaced);
        Ok(())
    }
}

/// Asks the system for something that may fail. Tests make it fail.
fn ask<T>(act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    #[cfg(test)]
    if faults::strikes() {
        return Err(faults::error());
    }
    act()
}

/// The same for a write, of which a part may be done.
fn ask_to_write(file: &mut File, bytes: &[u8]) -> io::Result<usize> {
    #[cfg(test)]
    if faults::strikes() {
        // A disk that gets full takes some of it first.
        let _ = file.write(&bytes[..bytes.len() / 2]);
        return Err(faults::error());
    }
    file.write(bytes)
}

/// Failures on purpose: one of the things that this thread asks the system for goes wrong.
#[cfg(test)]
pub(crate) mod faults {
    use std::cell::Cell;
    use std::io;

    thread_local! {
        /// Requests until the one that fails; none if there are no more.
        static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
    }

    pub(super) fn strikes() -> bool {
        LEFT.with(|left| match left.get() {
            Some(0) => {
                left.set(None);
                true
            }
            Some(n) => {
                left.set(Some(n - 1));
                false
            }
            None => false,
        })
    }

    pub(super) fn error() -> io::Error {
        io::Error::new(io::ErrorKind::StorageFull, "no space left (on purpose)")
    }

    /// Does `work` again and again, with its first request to the system failing, its second, and
    /// so on, until none is left to fail. `check` looks at what each failure left behind. Returns how
    /// many requests there were.
    pub(crate) fn at_every_request<T, E: std::fmt::Display>(
        mut work: impl FnMut() -> Result<T, E>,
        mut check: impl FnMut(u32),
    ) -> u32 {
        for n in 0.. {
            LEFT.set(Some(n));
            let result = work();
            if LEFT.take().is_some() {
                // All requests were made, and none failed.
                assert!(result.is_ok(), "fails without a reason");
                return n;
            }
            match result {
                Ok(_) => panic!("failure {n} is not reported"),
                Err(error) => {
                    assert!(error.to_string().contains("on purpose"), "failure {n}: {error}");
                }
            }
            check(n);
        }
        unreachable!("the numbers do not end")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, bytes: &[u8]) -> Result<()> {
        let mut file = OutputFile::create(path, [])?;
        file.write_all(bytes).map_err(|e| file.error(e))?;
        file.finish()
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn every_failure_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let bytes = vec![7; 3 * BUFFER + 5];
        // Begin, four writes, sync, rename.
        let requests = faults::at_every_request(
            || write(&path, &bytes),
            |n| assert!(names(folder.path()).is_empty(), "failure {n}"),
        );
        assert!(requests >= 4, "{requests}");
        assert!(fs::read(&path).unwrap() == bytes);
        fs::write(&path, "precious").unwrap();
        let again = faults::at_every_request(
            || write(&path, &bytes),
            |n| {
                assert_eq!(fs::read(&path).unwrap(), b"precious", "failure {n}");
                assert_eq!(names(folder.path()), ["file"], "failure {n}");
            },
        );
        assert_eq!(again, requests);
        assert!(fs::read(&path).unwrap() == bytes);
    }

    #[test]
    fn what_is_not_finished_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut file = OutputFile::create(&path, []).unwrap();
        file.write_all(b"half").unwrap();
        let there = names(folder.path());
        assert!(
            matches!(&there[..], [part] if part.starts_with("file.") && part.ends_with(".part"))
        );
        drop(file);
        assert!(names(folder.path()).is_empty());
        // A name as long as names may be.
        let long = folder.path().join("x".repeat(255));
        write(&long, b"whole").unwrap();
        assert_eq!(fs::read(&long).unwrap(), b"whole");
    }

    #[test]
    fn threads_that_write_one_file_do_not_meet() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::thread::scope(|scope| {
            for i in 0..4u8 {
                let path = &path;
                scope.spawn(move || (0..50).for_each(|_| write(path, &[i; 1000]).unwrap()));
            }
        });
        let bytes = fs::read(&path).unwrap();
        assert!(bytes.len() == 1000 && bytes.iter().all(|b| *b == bytes[0]));
        assert_eq!(names(folder.path()), ["file"]);
    }

    #[test]
    fn names_of_no_file_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let within = |name: &str| folder.path().join(name);
        for path in [folder.path().to_owned(), within("new/"), within(".."), PathBuf::new()] {
            assert!(matches!(write(&path, b""), Err(Error::Invalid(_))), "{path:?}");
        }
        assert!(matches!(write(&within("missing/file"), b""), Err(Error::Io { .. })));
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn an_output_is_no_input() {
        let folder = tempfile::tempdir().unwrap();
        let [input, link] = ["input", "link"].map(|name| folder.path().join(name));
        fs::write(&input, "precious").unwrap();
        fs::hard_link(&input, &link).unwrap();
        for output in [&input, &link, &folder.path().join("./input")] {
            let error = OutputFile::create(output, [&*input]).unwrap_err();
            assert!(error.to_string().contains("is the input"), "{error}");
        }
        assert!(is_same(&input, &link) && !is_same(&input, &folder.path().join("none")));
        assert_eq!(names(folder.path()), ["input", "link"]);
    }

    #[test]
    fn only_short_regular_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        let error = read(&path, 4).unwrap_err().to_string();
        assert!(error.contains("has 5 bytes; at most 4"), "{error}");
        assert!(matches!(read(folder.path(), 5), Err(Error::Format { .. })));
        assert!(matches!(read(&folder.path().join("none"), 5), Err(Error::Io { .. })));
    }

    #[test]
    fn records_are_added_whole_or_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "one\n").unwrap();
        let mut file = GrowingFile::open(&path).unwrap();
        let error = GrowingFile::open(&path).unwrap_err();
        assert!(error.to_string().contains("in use"), "{error}");
        let requests = faults::at_every_request(
            || file.append(b"two\n"),
            |n| assert_eq!(fs::read(&path).unwrap(), b"one\n", "failure {n}"),
        );
        assert!(requests >= 2);
        file.append(b"three\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one\ntwo\nthree\n");
        drop(file);
        let mut file = GrowingFile::open(&path).unwrap();
        file.truncate(4).unwrap();
        file.append(b"4\n").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one\n4\n");
    }

    #[cfg(unix)]
    mod unix {
        use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
        use std::os::unix::net::UnixListener;
        use std::process::Command;

        use super::*;

        fn mode(path: &Path) -> u32 {
            fs::metadata(path).unwrap().permissions().mode() & 0o777
        }

        #[test]
        fn links_are_followed_and_stay() {
            let folder = tempfile::tempdir().unwrap();
            let within = |name: &str| folder.path().join(name);
            fs::create_dir(within("there")).unwrap();
            fs::write(within("there/file"), "old").unwrap();
            symlink("there", within("folder")).unwrap();
            symlink("folder/file", within("link")).unwrap();
            symlink(within("link"), within("second")).unwrap();
            symlink("../there/new", within("there/dangling")).unwrap();
            symlink("loop", within("loop")).unwrap();
            write(&within("second"), b"new").unwrap();
            write(&within("folder/dangling"), b"made").unwrap();
            assert_eq!(fs::read(within("there/file")).unwrap(), b"new");
            assert_eq!(fs::read(within("there/new")).unwrap(), b"made");
            for link in ["folder", "link", "second", "there/dangling"] {
                assert!(fs::symlink_metadata(within(link)).unwrap().is_symlink(), "{link}");
            }
            assert!(matches!(write(&within("loop"), b""), Err(Error::Io { .. })));
            assert_eq!(names(&within("there")), ["dangling", "file", "new"]);
        }

        #[test]
        fn modes_stay_and_read_only_files_are_refused() {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("file");
            // New files are as the umask wants them.
            write(&path, b"new").unwrap();
            let plain = folder.path().join("plain");
            fs::write(&plain, "").unwrap();
            assert_eq!(mode(&path), mode(&plain));
            for bits in [0o640, 0o600, 0o755] {
                fs::set_permissions(&path, PermissionsExt::from_mode(bits)).unwrap();
                write(&path, b"newer").unwrap();
                assert_eq!(mode(&path), bits);
            }
            let owner = fs::metadata(&path).unwrap().uid();
            assert_eq!(owner, fs::metadata(&plain).unwrap().uid());
            fs::set_permissions(&path, PermissionsExt::from_mode(0o444)).unwrap();
            for error in [write(&path, b"x").unwrap_err(), GrowingFile::open(&path).unwrap_err()] {
                assert!(error.to_string().contains("is read-only"), "{error}");
            }
            assert_eq!(fs::read(&path).unwrap(), b"newer");
        }

        #[test]
        fn what_is_no_file_is_written_to_or_refused() {
            let folder = tempfile::tempdir().unwrap();
            let within = |name: &str| folder.path().join(name);
            let null = Path::new("/dev/null");
            write(null, b"gone").unwrap();
            symlink(null, within("null")).unwrap();
            write(&within("null"), b"gone").unwrap();
            assert!(fs::metadata(null).unwrap().file_type().is_char_device());
            let error = write(Path::new("/dev/full"), b"x").unwrap_err();
            assert!(error.to_string().contains("No space left"), "{error}");

            let fifo = within("fifo");
            assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
            let reader = std::thread::spawn({
                let fifo = fifo.clone();
                move || fs::read(fifo).unwrap()
            });
            write(&fifo, b"through").unwrap();
            assert_eq!(reader.join().unwrap(), b"through");
            assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());
            // What is to be read again is a regular file, and no FIFO is waited for.
            assert!(read(&fifo, 5).unwrap_err().to_string().contains("regular file"));
            assert!(
                OutputFile::create_regular(&fifo).is_err() && GrowingFile::open(&fifo).is_err()
            );

            let socket = within("socket");
            let _listener = UnixListener::bind(&socket).unwrap();
            let error = write(&socket, b"x").unwrap_err();
            assert!(error.to_string().contains("is a socket"), "{error}");
            assert_eq!(names(folder.path()), ["fifo", "null", "socket"]);
            assert!(OutputFile::create_regular(null).is_err());
        }

        #[test]
        fn open_descriptors_are_added_to() {
            use std::os::fd::AsRawFd;
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("file");
            fs::write(&path, "first ").unwrap();
            let open = OpenOptions::new().append(true).open(&path).unwrap();
            write(Path::new(&format!("/dev/fd/{}", open.as_raw_fd())), b"second").unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"first second");
            assert_eq!(names(folder.path()), ["file"]);
        }
    }
}
