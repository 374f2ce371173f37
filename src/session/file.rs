//! Sessions in files: saved and restored.
//!
//! All numbers are little-endian. A file holds, one after the other:
//!
//! | part | bytes |
//! |---|---|
//! | `MTADSESS`, version (u32), bytes of a cache element (u32) | 16 |
//! | hash of the target, hash of the draft or 0, see [`crate::gguf::Gguf::digest`] | 32 |
//! | flags (1: the seed's numbers begin with the next generation, 2: there is a draft; from bit 32 on, if the text was held to a constraint: 1 + the token that it began at) | 8 |
//! | the generator: seed, numbers drawn | 16 |
//! | tokens of the text, how many of them were spoken, tokens decided beyond them | 24 |
//! | rows and bytes of a row, of the target and of the draft | 32 |
//! | XXH3 of the above | 8 |
//! | the text's tokens (u32); those beyond it (u32, flags u32: 1 drafted, 2 with ln p, 4 forced; ln p f64) | 4 or 16 each |
//! | cache rows of the target, then of the draft, in pieces of at most 128 as [`Lm::save_rows`] writes them | |
//! | XXH3 of all of the above | 8 |
//!
//! Nothing is taken from a file whose length is not what its header says, and a session that was
//! restored from a file whose checksum is wrong is thrown away.

use std::fs::{self, File};
use std::io::{BufReader, Read, Write};
use std::path::Path;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::decode::Origin;
use crate::engine::{Model, SessionOptions};
use crate::error::{Error, Result};
use crate::files::OutputFile;
use crate::lm::{Lm, MAX_TREE};
use crate::sampling::RngState;
use crate::session::generation::{Ahead, Session, Snapshot};
use crate::session::pair::Pair;
use crate::session::prefix::rows_of;

const MAGIC: &[u8; 8] = b"MTADSESS";
const VERSION: u32 = 1;
/// Bytes of the header, its checksum included.
const HEADER: usize = 136;
const FRESH: u64 = 1;
const DRAFT: u64 = 2;
const DRAFTED: u32 = 1;
const SCORED: u32 = 2;
const FORCED: u32 = 4;
/// Of the header's flags, the lowest bit of where a constraint began.
const CONSTRAINED: u32 = 32;
/// More tokens beyond the text than this mean a damaged file: what a limit cuts off is the rest of
/// one block.
const MOST_AHEAD: u64 = 2 * MAX_TREE as u64;
/// A row of more bytes than this means a damaged file: it would be one of a model that cannot be
/// loaded.
const MOST_ROW: u64 = 1 << 26;
/// Bytes of rows that nobody needs, read at a time.
const SKIPPED: usize = 1 << 16;

/// What a file's header says.
#[derive(Debug, Clone, PartialEq)]
struct Header {
    element_bytes: u32,
    target: u128,
    draft: u128,
    flags: u64,
    rng: RngState,
    text: u64,
    spoken: u64,
    ahead: u64,
    rows: [u64; 2],
    row_bytes: [u64; 2],
}

impl Header {
    fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend(self.element_bytes.to_le_bytes());
        out.extend(self.target.to_le_bytes());
        out.extend(self.draft.to_le_bytes());
        let numbers = [
            self.flags,
            self.rng.seed,
            self.rng.draws,
            self.text,
            self.spoken,
            self.ahead,
            self.rows[0],
            self.row_bytes[0],
            self.rows[1],
            self.row_bytes[1],
        ];
        out.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
        out.extend(xxh3_64(&out).to_le_bytes());
        out
    }

    /// Of bytes whose checksum was seen to be right.
    fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let mut fields = Fields(&bytes[12..]);
        let element_bytes = fields.u32();
        let (target, draft) = (fields.u128(), fields.u128());
        let flags = fields.u64();
        let rng = RngState { seed: fields.u64(), draws: fields.u64() };
        let (text, spoken, ahead) = (fields.u64(), fields.u64(), fields.u64());
        let (target_rows, target_bytes) = (fields.u64(), fields.u64());
        let (draft_rows, draft_bytes) = (fields.u64(), fields.u64());
        Header {
            element_bytes,
            target,
            draft,
            flags,
            rng,
            text,
            spoken,
            ahead,
            rows: [target_rows, draft_rows],
            row_bytes: [target_bytes, draft_bytes],
        }
    }

    /// The length of the whole file; `None` if no file is that long.
    fn file_len(&self) -> Option<u64> {
        let mut len = (HEADER + 8) as u64;
        len = len.checked_add(self.text.checked_mul(4)?)?;
        len = len.checked_add(self.ahead.checked_mul(16)?)?;
        for (rows, bytes) in self.rows.iter().zip(self.row_bytes) {
            len = len.checked_add(rows.checked_mul(bytes)?)?;
        }
        Some(len)
    }
}

/// Little-endian numbers, one after the other, of bytes that are long enough.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_first_chunk().expect("the bytes were counted");
        self.0 = rest;
        *head
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn u128(&mut self) -> u128 {
        u128::from_le_bytes(self.take())
    }
}

/// A file with the checksum of what went through so far.
struct Checked<F> {
    file: F,
    name: String,
    sum: Xxh3,
}

impl<F> Checked<F> {
    fn new(file: F, path: &Path) -> Self {
        Checked { file, name: path.display().to_string(), sum: Xxh3::new() }
    }
}

impl<F: Write> Checked<F> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.sum.update(bytes);
        self.file.write_all(bytes).map_err(|e| Error::io(&self.name, e))
    }
}

impl<F: Read> Checked<F> {
    fn get(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact(bytes).map_err(|e| Error::io(&self.name, e))?;
        self.sum.update(bytes);
        Ok(())
    }

    /// `len` bytes, of which the file is known to have so many.
    fn take(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.get(&mut bytes)?;
        Ok(bytes)
    }
}

/// The rows of a line in pieces.
fn pieces(rows: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..rows).step_by(MAX_TREE).map(move |start| start..rows.min(start + MAX_TREE))
}

impl Session {
    /// Writes the session to a file, from which [`Pair::load_session`] makes one that goes on with
    /// the same text, in this or another process: the text as far as it was handed out, the caches
    /// of both models, where the random numbers are, and tokens that were decided beyond the text.
    /// Settings are not part of it.
    ///
    /// The file appears under its name when it is complete; what was there before stays until then.
    /// The first time, the models' files are read once more, to be hashed.
    ///
    /// # Errors
    /// The file cannot be written, or is a model's; what the device reports.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let out = OutputFile::create(path, self.pair.files())?;
        self.write(Checked::new(out, path))?.finish()
    }

    fn write<F: Write>(&self, mut out: Checked<F>) -> Result<F> {
        let snapshot = self.snapshot();
        let text = snapshot.text.len();
        let models = [Some(&self.target), self.draft.as_ref()];
        let count = |count: &dyn Fn(&dyn Lm) -> usize| {
            models.map(|lm| lm.map_or(0, |lm| count(&**lm) as u64))
        };
        let flags = [(snapshot.fresh, FRESH), (self.draft.is_some(), DRAFT)];
        let constrained = snapshot.constrained_from.map_or(0, |start| start as u64 + 1);
        let header = Header {
            element_bytes: self.options.cache_type.bytes() as u32,
            target: self.pair.target().digest(),
            draft: self.pair.draft().map_or(0, Model::digest),
            flags: flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum::<u64>()
                | constrained << CONSTRAINED,
            rng: snapshot.rng,
            text: text as u64,
            spoken: snapshot.spoken as u64,
            ahead: snapshot.ahead.len() as u64,
            rows: count(&|lm| rows_of(lm, text)),
            row_bytes: count(&|lm| lm.row_bytes()),
        };
        out.put(&header.to_bytes())?;
        for token in &snapshot.text {
            out.put(&token.to_le_bytes())?;
        }
        for ahead in &snapshot.ahead {
            let flags = [
                (ahead.origin == Origin::Draft, DRAFTED),
                (ahead.log_prob.is_some(), SCORED),
                (ahead.origin == Origin::Forced, FORCED),
            ];
            let flags: u32 = flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum();
            out.put(&ahead.token.to_le_bytes())?;
            out.put(&flags.to_le_bytes())?;
            out.put(&ahead.log_prob.unwrap_or(0.0).to_le_bytes())?;
        }
        let mut bytes = Vec::new();
        for lm in models.into_iter().flatten() {
            for rows in pieces(rows_of(&**lm, text)) {
                bytes.clear();
                lm.save_rows(rows, &mut bytes)?;
                out.put(&bytes)?;
            }
        }
        let sum = out.sum.digest();
        out.put(&sum.to_le_bytes())?;
        Ok(out.file)
    }
}

impl Pair {
    /// A session from a file that [`Session::save`] wrote, of the same models. A pair without a
    /// draft leaves the draft's rows out; a draft that the file knows nothing of catches up.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a file that is no saved session, cut short or damaged;
    /// [`Error::Unsupported`] for one of another version, of other models or with another cache
    /// type; [`Error::ContextFull`] if the context is too small for it.
    pub fn load_session(
        &self,
        path: impl AsRef<Path>,
        options: &SessionOptions,
    ) -> Result<Session> {
        let path = path.as_ref();
        let name = path.display().to_string();
        let io = |source| Error::io(&name, source);
        // Asked first: opening a FIFO would wait for a writer.
        let meta = fs::metadata(path).map_err(io)?;
        if !meta.is_file() {
            return Err(Error::format(name, "is not a regular file; a saved session is needed"));
        }
        let file = Checked::new(BufReader::new(File::open(path).map_err(io)?), path);
        self.read_session(file, meta.len(), options)
    }

    fn read_session<F: Read>(
        &self,
        mut file: Checked<F>,
        len: u64,
        options: &SessionOptions,
    ) -> Result<Session> {
        let header = read_header(&mut file, len)?;
        let mut session = Session::new(self, options)?;
        self.check_header(&header, &session, &file.name)?;
        let text = file.take(header.text as usize * 4)?;
        let mut fields = Fields(&text);
        let text: Vec<_> = (0..header.text).map(|_| fields.u32()).collect();
        let ahead = file.take(header.ahead as usize * 16)?;
        let mut fields = Fields(&ahead);
        let ahead = (0..header.ahead).map(|_| {
            let (token, flags) = (fields.u32(), fields.u32());
            let log_prob = f64::from_bits(fields.u64());
            let log_prob = (flags & SCORED != 0).then_some(log_prob);
            let origin = match flags {
                _ if flags & DRAFTED != 0 => Origin::Draft,
                _ if flags & FORCED != 0 => Origin::Forced,
                _ => Origin::Target,
            };
            Ahead { token, origin, log_prob }
        });
        let ahead: Vec<_> = ahead.collect();
        let vocab = self.tokenizer().len();
        let tokens = text.iter().copied().chain(ahead.iter().map(|ahead| ahead.token));
        if let Some(token) = tokens.into_iter().find(|&token| token as usize >= vocab) {
            let what = format!("holds the token {token}, and there are {vocab}: it is damaged");
            return Err(Error::format(file.name, what));
        }
        let Session { target, draft, .. } = &mut session;
        let models = [Some(&mut **target), draft.as_mut().map(|draft| &mut **draft)];
        for ((model, rows), bytes) in models.into_iter().zip(header.rows).zip(header.row_bytes) {
            read_rows(&mut file, model, rows as usize, bytes as usize)?;
        }
        let (found, mut stated) = (file.sum.digest(), [0; 8]);
        file.get(&mut stated)?;
        if u64::from_le_bytes(stated) != found {
            return Err(Error::format(
                file.name,
                "is damaged: its checksum is not that of its content",
            ));
        }
        let (spoken, fresh) = (header.spoken as usize, header.flags & FRESH != 0);
        let constrained_from = (header.flags >> CONSTRAINED).checked_sub(1).map(|at| at as usize);
        let rng = header.rng;
        session.restore(Snapshot { text, ahead, spoken, fresh, constrained_from, rng });
        Ok(session)
    }

    /// Whether a session that was saved fits the models and the session that it is restored to.
    fn check_header(&self, header: &Header, session: &Session, name: &str) -> Result<()> {
        let other = |what: &str| Err(Error::unsupported(name, what));
        if header.target != self.target().digest() {
            return other(
                "was saved with another target model; open the model that it was saved with",
            );
        }
        let drafts = [header.flags & DRAFT != 0, session.draft.is_some()];
        if drafts == [true, true] && Some(header.draft) != self.draft().map(Model::digest) {
            return other(
                "was saved with another draft model; open the pair that it was saved with",
            );
        }
        if header.element_bytes as usize != session.options.cache_type.bytes() {
            let bits = 8 * u64::from(header.element_bytes);
            let what = format!(
                "was saved with a cache of type f{bits}, not {}; ask for that type",
                session.options.cache_type.name()
            );
            return other(&what);
        }
        let sizes = [Some(&session.target), session.draft.as_ref()];
        let fits =
            sizes.iter().zip(header.row_bytes).zip(header.rows).all(|((lm, bytes), rows)| {
                let right = lm.is_none_or(|lm| bytes == lm.row_bytes() as u64);
                // The last token is pending.
                (rows == 0 || right) && bytes <= MOST_ROW && rows < header.text.max(1)
            });
        if !fits || header.spoken > header.text {
            return Err(Error::format(name, "is damaged: its rows are not those of its text"));
        }
        if header.ahead > MOST_AHEAD {
            let what = format!(
                "is damaged: {} tokens beyond its text, of which there are {MOST_AHEAD} at most",
                header.ahead
            );
            return Err(Error::format(name, what));
        }
        let (wanted, capacity) = (header.text as usize, session.capacity());
        if wanted > capacity {
            return Err(Error::ContextFull { wanted, capacity });
        }
        Ok(())
    }
}

fn read_header<F: Read>(file: &mut Checked<F>, len: u64) -> Result<Header> {
    let cut = |name: &str, wanted: u64| {
        Err(Error::format(name, format!("is cut short: {len} bytes, of {wanted}")))
    };
    let mut bytes = [0; HEADER];
    let there = len.min(HEADER as u64) as usize;
    file.get(&mut bytes[..there])?;
    let known = there.min(MAGIC.len());
    if bytes[..known] != MAGIC[..known] || there == 0 {
        return Err(Error::format(&file.name, "is not a session saved by mtad"));
    }
    if there < HEADER {
        return cut(&file.name, HEADER as u64);
    }
    let version = Fields(&bytes[8..]).u32();
    if version != VERSION {
        return Err(Error::unsupported(
            &file.name,
            format!("is a saved session of version {version}; this program reads {VERSION}"),
        ));
    }
    let (content, sum) = bytes.split_at(HEADER - 8);
    if sum != xxh3_64(content).to_le_bytes() {
        return Err(Error::format(
            &file.name,
            "is damaged: the checksum of its header is not that of its content",
        ));
    }
    let header = Header::from_bytes(&bytes);
    match header.file_len() {
        Some(wanted) if wanted == len => Ok(header),
        Some(wanted) if wanted > len => cut(&file.name, wanted),
        wanted => Err(Error::format(
            &file.name,
            format!("has {len} bytes where its header says {}", wanted.unwrap_or(u64::MAX)),
        )),
    }
}

/// Gives the rows of one model to it, or to nobody.
fn read_rows<F: Read>(
    file: &mut Checked<F>,
    model: Option<&mut (dyn Lm + 'static)>,
    rows: usize,
    row_bytes: usize,
) -> Result<()> {
    let mut bytes = Vec::new();
    let Some(model) = model else {
        let mut left = rows as u64 * row_bytes as u64;
        while left > 0 {
            bytes.resize(left.min(SKIPPED as u64) as usize, 0);
            file.get(&mut bytes)?;
            left -= bytes.len() as u64;
        }
        return Ok(());
    };
    for piece in pieces(rows) {
        bytes.resize(piece.len() * row_bytes, 0);
        file.get(&mut bytes)?;
        model.load_rows(piece.len(), &bytes)?;
    }
    Ok(())
}

#[cfg(all(test, feature = "builtin-pair"))]
mod tests {
    use super::*;
    use crate::files::faults;
    use crate::session::pair::LoadOptions;

    #[test]
    fn a_session_survives_every_failure() {
        let options =
            LoadOptions { threads: 1, device: "cpu".to_owned(), ..LoadOptions::default() };
        let pair = Pair::builtin(true, &options, &mut |_, _| true).unwrap();
        let mut session = pair.session(&SessionOptions::default()).unwrap();
        session.prompt("Once upon a time there was a dog.", false).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("session");
        session.save(&path).unwrap();
        let before = fs::read(&path).unwrap();
        session.prompt("Once upon a time there was a dog. It was old.", false).unwrap();
        let requests = faults::at_every_request(
            || session.save(&path),
            |n| {
                assert!(fs::read(&path).unwrap() == before, "failure {n}");
                assert_eq!(folder.path().read_dir().unwrap().count(), 1, "failure {n}");
            },
        );
        assert!(requests >= 4, "{requests}");
        assert!(fs::read(&path).unwrap() != before);
        let restored = pair.load_session(&path, &SessionOptions::default()).unwrap();
        assert_eq!(restored.tokens(), session.tokens());
    }
}
