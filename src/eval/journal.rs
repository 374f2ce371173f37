//! A journal of finished generations: JSON lines in a folder, from which an evaluation goes on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};

use super::Outcome;
use crate::error::{Error, Result};

/// Finished generations, on disk if there is a folder.
#[derive(Debug)]
pub struct Journal {
    file: Option<(PathBuf, File)>,
    outcomes: Vec<Outcome>,
}

impl Journal {
    /// A journal in memory only.
    pub fn in_memory() -> Self {
        Journal { file: None, outcomes: Vec::new() }
    }

    /// Opens or begins the journal of a folder, which is made if it is not there. `fingerprint`
    /// tells apart what must not be mixed. A last line that was cut short is dropped.
    ///
    /// # Errors
    /// The folder cannot be written; its journal is of another fingerprint or is no journal.
    pub fn open(folder: &Path, fingerprint: &str) -> Result<Self> {
        let path = folder.join("journal.jsonl");
        let name = path.display().to_string();
        let io = |e: io::Error| Error::io(&name, e);
        fs::create_dir_all(folder).map_err(|e| Error::io(folder.display().to_string(), e))?;
        let head = json!({"mtad_eval": fingerprint}).to_string();
        let mut outcomes = Vec::new();
        let mut sound = 0;
        if path.exists() {
            let mut reader = BufReader::new(File::open(&path).map_err(io)?);
            let mut line = String::new();
            loop {
                line.clear();
                let n = reader.read_line(&mut line).map_err(io)?;
                if n == 0 || !line.ends_with('\n') {
                    break;
                }
                if sound == 0 && line.trim_end() != head {
                    return Err(Error::invalid(format!(
                        "{name} is of another pair, other tasks or other settings; use another folder, or remove it"
                    )));
                }
                if sound > 0 {
                    read_line(&line, &mut outcomes)
                        .ok_or_else(|| Error::format(&name, format!("no journal: {line:?}")))?;
                }
                sound += n as u64;
            }
        }
        let mut file = OpenOptions::new().create(true).append(true).open(&path).map_err(io)?;
        file.set_len(sound).map_err(io)?;
        if sound == 0 {
            writeln!(file, "{head}").map_err(io)?;
        }
        Ok(Journal { file: Some((path, file)), outcomes })
    }

    /// All that finished, in the order in which it did.
    pub fn outcomes(&self) -> &[Outcome] {
        &self.outcomes
    }

    fn write(&mut self, line: &Json) -> Result<()> {
        match &mut self.file {
            Some((path, file)) => {
                // One write, so that a line is there as a whole or is the last.
                let written = file.write_all(format!("{line}\n").as_bytes());
                written.map_err(|e| Error::io(path.display().to_string(), e))
            }
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

fn read_line(line: &str, outcomes: &mut Vec<Outcome>) -> Option<()> {
    let line: Json = serde_json::from_str(line).ok()?;
    if let Some(index) = line["joules_of"].as_u64() {
        outcomes.get_mut(usize::try_from(index).ok()?)?.joules = line["joules"].as_f64();
    } else {
        outcomes.push(Outcome::from_json(&line)?);
    }
    Some(())
}
