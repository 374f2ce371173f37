//! A journal of finished generations: JSON lines in a folder, from which an evaluation goes on.

use std::fs;
use std::io::BufRead;
use std::path::Path;

use serde_json::{Value as Json, json};

use super::Outcome;
use crate::error::{Error, Result};
use crate::files::GrowingFile;

/// Finished generations, on disk if there is a folder.
#[derive(Debug)]
pub struct Journal {
    file: Option<GrowingFile>,
    outcomes: Vec<Outcome>,
}

impl Journal {
    /// A journal in memory only.
    pub fn in_memory() -> Self {
        Journal { file: None, outcomes: Vec::new() }
    }

    /// The name of the file in its folder.
    pub const FILE: &str = "journal.jsonl";

    /// Opens or begins the journal of a folder, which is made if it is not there. `fingerprint`
    /// tells apart what must not be mixed. A last line that was cut short, wherever it was, is
    /// dropped.
    ///
    /// # Errors
    /// The folder cannot be written; its journal is of another fingerprint, is no journal, or is
    /// written by another process.
    pub fn open(folder: &Path, fingerprint: &str) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|e| Error::io(folder.display().to_string(), e))?;
        let mut file = GrowingFile::open(&folder.join(Self::FILE))?;
        let name = file.name().to_owned();
        let head = format!("{}\n", json!({"mtad_eval": fingerprint}));
        let other = || {
            Error::invalid(format!(
                "{name} is of another pair, other tasks or other settings; choose another file, or remove it"
            ))
        };
        let mut outcomes = Vec::new();
        let mut sound = 0;
        let mut reader = file.reader();
        let mut line = Vec::new();
        loop {
            line.clear();
            // (Bytes: a line that was cut may end inside a character.)
            let n = reader.read_until(b'\n', &mut line).map_err(|e| Error::io(&name, e))?;
            let is_whole = line.ends_with(b"\n");
            // What is cut away must have been written here.
            if sound == 0 && !head.as_bytes().starts_with(&line) {
                return Err(other());
            }
            if !is_whole {
                break;
            }
            if sound > 0 {
                read_line(&line, &mut outcomes).ok_or_else(|| {
                    let line = String::from_utf8_lossy(&line).into_owned();
                    Error::format(&name, format!("no journal: {line:?}"))
                })?;
            }
            sound += n as u64;
        }
        drop(reader);
        file.truncate(sound)?;
        if sound == 0 {
            file.append(head.as_bytes())?;
        }
        Ok(Journal { file: Some(file), outcomes })
    }

    /// All that finished, in the order in which it did.
    pub fn outcomes(&self) -> &[Outcome] {
        &self.outcomes
    }

    fn write(&mut self, line: &Json) -> Result<()> {
        match &mut self.file {
            Some(file) => file.append(format!("{line}\n").as_bytes()),
            None => Ok(()),
        }
    }

    /// Takes a generation down.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn push(&mut self, outcome: Outcome) -> Result<()> {
        self.write(&outcome.json())?;
        self.outcomes.push(outcome);
        Ok(())
    }

    /// Takes down what a generation consumed, which is known only when meters have stopped.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_joules(&mut self, index: usize, joules: f64) -> Result<()> {
        self.outcomes[index].joules = Some(joules);
        self.write(&json!({"joules_of": index, "joules": joules}))
    }
}

fn read_line(line: &[u8], outcomes: &mut Vec<Outcome>) -> Option<()> {
    let line: Json = serde_json::from_slice(line).ok()?;
    if let Some(index) = line["joules_of"].as_u64() {
        outcomes.get_mut(usize::try_from(index).ok()?)?.joules = line["joules"].as_f64();
    } else {
        outcomes.push(Outcome::from_json(&line)?);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::faults;

    fn outcome(text: &str) -> Outcome {
        let json = json!({
            "arm": "sample", "task": 0, "repeat": 0, "text": text, "tokens": 3, "prompt_tokens": 2,
            "accepted_lengths": [], "drafted_lengths": [], "prompt_seconds": 0.5, "seconds": 0.5,
            "stop": "eos",
        });
        Outcome::from_json(&json).unwrap_or_else(|| panic!("{json}"))
    }

    fn texts(journal: &Journal) -> Vec<&str> {
        journal.outcomes().iter().map(|outcome| outcome.text.as_str()).collect()
    }

    #[test]
    fn a_journal_cut_anywhere_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(Journal::FILE);
        let mut journal = Journal::open(folder.path(), "print").unwrap();
        journal.push(outcome("one")).unwrap();
        journal.push(outcome("für 🦙")).unwrap();
        drop(journal);
        let whole = fs::read(&path).unwrap();
        let mut kept = std::collections::BTreeSet::new();
        for len in 0..=whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            let mut journal = Journal::open(folder.path(), "print").unwrap();
            let sound = journal.outcomes().len();
            assert_eq!(texts(&journal), &["one", "für 🦙"][..sound], "cut at {len}");
            kept.insert(sound);
            journal.push(outcome("next")).unwrap();
            drop(journal);
            let again = Journal::open(folder.path(), "print").unwrap();
            assert_eq!(texts(&again).last(), Some(&"next"), "cut at {len}");
            assert_eq!(again.outcomes().len(), sound + 1, "cut at {len}");
        }
        assert_eq!(kept.into_iter().collect::<Vec<_>>(), [0, 1, 2]);
    }

    #[test]
    fn what_is_no_journal_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(Journal::FILE);
        drop(Journal::open(folder.path(), "print").unwrap());
        let other = fs::read(&path).unwrap();
        for bytes in [&other[..], b"notes of mine", b"notes\nof mine\n", b"\xff\xfe", b"{}"] {
            fs::write(&path, bytes).unwrap();
            let error = Journal::open(folder.path(), "another").unwrap_err();
            assert!(error.to_string().contains("of another pair"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
        // A line in the middle that is no outcome.
        let spoiled = [&other[..], b"\xff\n{}\n"].concat();
        fs::write(&path, &spoiled).unwrap();
        let error = Journal::open(folder.path(), "print").unwrap_err();
        assert!(error.to_string().contains("no journal"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), spoiled);
    }

    #[test]
    fn a_line_that_cannot_be_written_spoils_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(Journal::FILE);
        let mut journal = Journal::open(folder.path(), "print").unwrap();
        journal.push(outcome("one")).unwrap();
        let before = fs::read(&path).unwrap();
        let requests = faults::at_every_request(
            || journal.push(outcome("two")),
            |n| assert_eq!(fs::read(&path).unwrap(), before, "failure {n}"),
        );
        assert_eq!(requests, 2, "a write and a sync");
        assert_eq!(texts(&journal), ["one", "two"]);
        drop(journal);
        assert_eq!(texts(&Journal::open(folder.path(), "print").unwrap()), ["one", "two"]);
    }
}
