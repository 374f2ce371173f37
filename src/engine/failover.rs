//! Going on when a device is lost: the session's rows are evaluated again, on another.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::notes::Notes;
use super::{Model, SessionOptions};
use crate::error::{Error, Result};
use crate::lm::tree::rows_of;
use crate::lm::{Batch, KeptRows, Lm, Outputs, Row, Token, Want, extend};

/// Another place for a model, which is loaded there when it is needed.
pub(super) struct Standby {
    load: Box<dyn Fn() -> Result<Model> + Send + Sync>,
    loaded: Mutex<Option<Model>>,
    notes: Arc<Notes>,
}

impl Standby {
    pub fn new(
        notes: Arc<Notes>,
        load: impl Fn() -> Result<Model> + Send + Sync + 'static,
    ) -> Self {
        Standby { load: Box::new(load), loaded: Mutex::default(), notes }
    }

    /// The model, and a note of why it is there.
    fn model(&self, why: &Error) -> Result<Model> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(model) = &*loaded {
            return Ok(model.clone());
        }
        let model = (self.load)()?;
        self.notes.tell(format!("{why}; went on with {}", model.device().describe()));
        Ok(loaded.insert(model).clone())
    }
}

/// A session that outlives its device.
pub(super) struct Failover {
    lm: Box<dyn Lm>,
    standby: Arc<Standby>,
    options: SessionOptions,
    /// Whether `lm` is on the standby device already.
    moved: bool,
    line: Vec<Token>,
    /// Whether rows were restored, whose tokens nobody told: then there is no way back.
    restored: bool,
    /// The uncommitted rows: tokens, parents, and ancestors as bits.
    tree: Vec<(Token, Option<Row>, u128)>,
    outputs: Outputs,
}

/// Rows that are kept, and where they are.
struct Kept {
    rows: KeptRows,
    standby: Arc<Standby>,
    moved: bool,
}

impl Failover {
    pub fn new(lm: Box<dyn Lm>, standby: Arc<Standby>, options: SessionOptions) -> Self {
        Failover {
            lm,
            standby,
            options,
            moved: false,
            line: Vec::new(),
            restored: false,
            tree: Vec::new(),
            outputs: Outputs::default(),
        }
    }

    /// Whether to do again what failed: the device is lost, and the session now is on another.
    fn goes_on(&mut self, error: Error) -> Result<()> {
        if self.moved || self.restored || !matches!(error, Error::DeviceLost { .. }) {
            return Err(error);
        }
        let mut lm = self.standby.model(&error)?.session(&self.options)?;
        extend(&mut *lm, &self.line)?;
        let mut batch = Batch::new();
        for &(token, parent, _) in &self.tree {
            batch.push(token, parent, Want::Nothing);
        }
        lm.eval(&batch)?;
        (self.lm, self.moved) = (lm, true);
        Ok(())
    }
}

impl Lm for Failover {
    fn vocab_size(&self) -> usize {
        self.lm.vocab_size()
    }

    fn committed(&self) -> usize {
        self.lm.committed()
    }

    fn capacity(&self) -> usize {
        self.lm.capacity()
    }

    fn eval(&mut self, batch: &Batch<'_>) -> Result<&Outputs> {
        loop {
            // (A copy, because a session that may yet be replaced cannot be borrowed from.)
            match self.lm.eval(batch) {
                Ok(outputs) => break self.outputs.assign(outputs),
                Err(error) => self.goes_on(error)?,
            }
        }
        for (&token, &parent) in batch.tokens.iter().zip(&batch.parents) {
            let above = parent.map_or(0, |Row(p)| self.tree[p as usize].2);
            self.tree.push((token, parent, above | 1 << self.tree.len()));
        }
        Ok(&self.outputs)
    }

    fn commit(&mut self, tip: Option<Row>) -> Result<()> {
        while let Err(error) = self.lm.commit(tip) {
            // The session it happened to has committed the rows; the new one has not.
            self.goes_on(error)?;
        }
        let path = tip.map_or(0, |Row(r)| self.tree[r as usize].2);
        self.line.extend(rows_of(path).map(|Row(r)| self.tree[r as usize].0));
        self.tree.clear();
        Ok(())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.lm.truncate(len)?;
        self.line.truncate(len);
        self.restored &= len > 0;
        self.tree.clear();
        Ok(())
    }

    fn row_bytes(&self) -> usize {
        self.lm.row_bytes()
    }

    fn save_rows(&self, rows: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        self.lm.save_rows(rows, out)
    }

    fn load_rows(&mut self, count: usize, bytes: &[u8]) -> Result<()> {
        self.lm.load_rows(count, bytes)?;
        self.restored = true;
        self.tree.clear();
        Ok(())
    }
    fn keep_rows(&self, count: usize) -> Result<KeptRows> {
        let rows = self.lm.keep_rows(count)?;
        let (bytes, standby) = (rows.bytes(), self.standby.clone());
        Ok(KeptRows::new(count, bytes, Kept { rows, standby, moved: self.moved }))
    }

    fn adopt_rows(&mut self, kept: &KeptRows, tokens: &[Token]) -> Result<()> {
        let own = |kept: &&Kept| Arc::ptr_eq(&kept.standby, &self.standby);
        let Some(own) = kept.held::<Kept>().filter(own) else {
            return Err(Error::invalid("the rows that were kept are of another model"));
        };
        kept.check(tokens.len(), self.capacity())?;
        if own.moved != self.moved {
            // They are on the other device.
            self.truncate(0)?;
            return extend(self, tokens);
        }
        match self.lm.adopt_rows(&own.rows, tokens) {
            Ok(()) => {
                self.line = tokens.to_vec();
                self.restored = false;
                self.tree.clear();
                Ok(())
            }
            Err(error @ Error::DeviceLost { .. }) => {
                // (What the line was is not to be evaluated again.)
                self.truncate(0)?;
                self.goes_on(error)?;
                extend(self, tokens)
            }
            Err(error) => Err(error),
        }
    }
}
