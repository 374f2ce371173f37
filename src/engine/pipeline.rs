//! A program's stages one after another, and what a pass needs beside the sequences.

use std::ops::Range;
use std::sync::Arc;

use super::scheduler::Post;
use crate::error::Result;
use crate::exec::{self, CacheType, KvCache, Loaded, Rows, Segment, Stage, place};
use crate::graph::{BufferId, Program};
use crate::lm::{Row, TopK};

/// A program with its weights on one or several devices.
pub(super) struct Pipeline {
    program: Arc<Program>,
    stages: Vec<Placed>,
    placement: place::Placement,
}

/// A stage, and the buffers that it takes over from the one before it.
struct Placed {
    stage: Box<dyn Stage>,
    taken_over: Vec<BufferId>,
}

/// The activations of one pass at a time, and the rows that it is of.
pub(super) struct Workspace {
    stages: Vec<Box<dyn exec::Workspace>>,
    /// For each table of rotations, cosine and sine of every pair at every position so far.
    by_position: Vec<Vec<[f32; 2]>>,
    rotations: Vec<Vec<[f32; 2]>>,
    tokens: Vec<u32>,
    ancestors: Vec<u128>,
    segments: Vec<Segment>,
    wanted: Vec<u32>,
    copy: Vec<f32>,
}

impl Pipeline {
    /// Loads a program's weights onto executors, each of which runs so many layers.
    ///
    /// # Errors
    /// As [`crate::exec::Executor::load`] and [`place::cut`].
    pub fn load(
        program: Arc<Program>,
        placement: place::Placement,
        loaded: Loaded<'_>,
    ) -> Result<Self> {
        let layers: Vec<_> = placement.iter().map(|(_, layers)| *layers).collect();
        let ranges = place::cut(&program, &layers)?;
        let mut stages = Vec::new();
        for ((executor, _), ops) in placement.iter().zip(ranges) {
            let taken_over =
                if stages.is_empty() { Vec::new() } else { program.live_at(ops.start) };
            stages
                .push(Placed { stage: executor.clone().load(&program, ops, loaded)?, taken_over });
        }
        Ok(Pipeline { program, stages, placement })
    }

    pub fn program(&self) -> &Program {
        &self.program
    }

    /// What runs it, for people.
    pub fn describe(&self) -> String {
        if let [(only, _)] = &self.placement[..] {
            return only.describe();
        }
        let parts = self.placement.iter();
        let parts =
            parts.map(|(executor, layers)| format!("{layers} layers on {}", executor.describe()));
        parts.collect::<Vec<_>>().join(", ")
    }

    /// An empty cache for each stage.
    pub fn caches(&self, cache_type: CacheType) -> Vec<Box<dyn KvCache>> {
        self.stages.iter().map(|placed| placed.stage.cache(cache_type)).collect()
    }

    /// Room for the passes of one engine.
    pub fn workspace(&self) -> Workspace {
        let tables = self.program.rotaries.len();
        Workspace {
            stages: self.stages.iter().map(|placed| placed.stage.workspace()).collect(),
            by_position: vec![Vec::new(); tables],
            rotations: vec![Vec::new(); tables],
            tokens: Vec::new(),
            ancestors: Vec::new(),
            segments: Vec::new(),
            wanted: Vec::new(),
            copy: Vec::new(),
        }
    }

    /// Runs one pass over what was posted. The logits of the wanted rows, post by post, are left in the workspace.
    ///
    /// # Errors
    /// What the devices report; there is no memory.
    pub fn pass(&self, posts: &mut [&mut Box<Post>], workspace: &mut Workspace) -> Result<()> {
        workspace.lay_out(&self.program, posts);
        let Workspace { stages, rotations, tokens, ancestors, segments, wanted, copy, .. } =
            workspace;
        let rows = Rows { tokens, segments, ancestors, rotations, wanted };
        for (i, Placed { stage, taken_over }) in self.stages.iter().enumerate() {
            if i > 0 {
                let (before, now) = stages.split_at_mut(i);
                for &buffer in taken_over {
                    let handed = before[i - 1].read(buffer, 0..rows.len(), copy)?;
                    now[0].write(buffer, handed)?;
                }
            }
            let mut caches: Vec<&mut dyn KvCache> =
                posts.iter_mut().map(|post| &mut *post.sequence.caches[i]).collect();
            stage.run(&rows, &mut caches, &mut *stages[i])?;
        }
        Ok(())
    }

    /// The logits of some of the wanted rows of the last pass.
    ///
    /// # Errors
    /// What the device reports.
    pub fn logits<'a>(
        &self,
        workspace: &'a mut Workspace,
        rows: Range<usize>,
    ) -> Result<&'a [f32]> {
        let last = workspace.stages.last_mut().expect("a program has a stage");
        last.read(self.program.logits, rows, &mut workspace.copy)
    }

    /// The largest logits of some of the wanted rows of the last pass, where the device finds them.
    ///
    /// # Errors
    /// What the device reports.
    pub fn top_k(
        &self,
        workspace: &mut Workspace,
        rows: Range<usize>,
        k: usize,
        temperature: f32,
        found: &mut TopK,
    ) -> Result<bool> {
        let last = workspace.stages.last_mut().expect("a program has a stage");
        last.top_k(self.program.logits, rows, k, temperature, found)
    }
}

impl Workspace {
    /// Lays the rows of all posts out, one sequence behind another.
    fn lay_out(&mut self, program: &Program, posts: &[&mut Box<Post>]) {
        self.tokens.clear();
        self.ancestors.clear();
        self.segments.clear();
        self.wanted.clear();
        self.rotations.iter_mut().for_each(Vec::clear);
        for post in posts {
            let tree = &post.sequence.tree;
            let (begin, first) = (self.tokens.len(), tree.len() - post.tokens.len());
            self.tokens.extend_from_slice(&post.tokens);
            self.wanted.extend(post.wanted.iter().map(|row| begin as u32 + row));
            for row in (first..tree.len()).map(|row| Row(row as u32)) {
                self.ancestors.push(tree.ancestors(row));
                self.add_rotations(program, tree.position(row));
            }
            let line = tree.committed();
            let rows = begin..self.tokens.len();
            self.segments.push(Segment { rows, line, first_slot: line + first });
        }
    }

    fn add_rotations(&mut self, program: &Program, position: usize) {
        let tables = program.rotaries.iter().zip(&mut self.by_position);
        for ((table, by_position), rotations) in tables.zip(&mut self.rotations) {
            let (pairs, magnitude) = (table.frequencies.len(), table.magnitude);
            while by_position.len() < (position + 1) * pairs {
                let p = (by_position.len() / pairs) as f64;
                by_position.extend(table.frequencies.iter().map(|f| {
                    let (sin, cos) = (p * f).sin_cos();
                    [(magnitude * cos) as f32, (magnitude * sin) as f32]
                }));
            }
            rotations.extend_from_slice(&by_position[position * pairs..][..pairs]);
        }
    }
}
