//! The activations of a pass.

use std::ops::Range;

use super::LANES;
use super::matmul::ActivationLayout;
use crate::error::{Error, Result};
use crate::exec::{self, Rows};
use crate::graph::{BufferId, BufferShape, Op, Program};

/// Activations: rows of `width` f32, each padded with zeros to whole vectors.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    pub width: usize,
    pub stride: usize,
    pub data: Vec<f32>,
}

impl Buffer {
    pub fn new(width: usize) -> Self {
        Buffer { width, stride: width.next_multiple_of(LANES), data: Vec::new() }
    }

    pub fn rows(&self) -> usize {
        self.data.len() / self.stride
    }

    /// Makes room for `rows` rows. Old contents stay: every operation writes whole rows.
    pub fn set_rows(&mut self, rows: usize) -> Result<()> {
        let len = rows * self.stride;
        if let Some(more) = len.checked_sub(self.data.len()) {
            reserve(&mut self.data, more)?;
        }
        self.data.resize(len, 0.0);
        Ok(())
    }

    /// Gives it another width, and so many rows. Allocates nothing where there is room.
    pub fn shape(&mut self, width: usize, rows: usize) {
        (self.width, self.stride) = (width, width.next_multiple_of(LANES));
        self.data.resize(rows * self.stride, 0.0);
    }

    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.stride..][..self.stride]
    }

    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.stride..][..self.stride]
    }
}

/// Room for `more` elements.
fn reserve<T>(to: &mut Vec<T>, more: usize) -> Result<()> {
    let bytes = (more * size_of::<T>()) as u64;
    to.try_reserve(more).map_err(|_| Error::no_memory("the activations of a pass", bytes))
}

/// Rows as kernels read them: quantized, and laid out in tiles.
pub(super) type Quantized = Vec<(ActivationLayout, Vec<u32>)>;

/// The buffers of a program.
#[derive(Debug)]
pub(super) struct Workspace {
    pub shapes: Vec<BufferShape>,
    pub buffers: Vec<Buffer>,
    pub quantized: Quantized,
    /// What the experts of a mixture work on: their rows, gates and what is gated. As wide as the widest; mixtures of
    /// several widths share them.
    pub expert: [Buffer; 3],
    /// Their widest widths; 0 where there are no experts.
    expert_widths: [usize; 3],
    /// Elements of the widest row that is multiplied with a matrix.
    widest_input: usize,
}

impl Workspace {
    /// Room for nothing yet.
    pub fn new(program: &Program, ops: Range<usize>) -> Self {
        let mut widest_input = 0;
        let mut expert_widths = [0; 3];
        for op in &program.ops[ops] {
            match op {
                Op::Linear { x, .. } | Op::LinearAdd { x, .. } => {
                    widest_input = widest_input.max(program.buffer(*x).width);
                }
                Op::Experts { x, experts, .. } => {
                    let width = program.buffer(*x).width;
                    let inner = program.weight(experts.experts[0].up).tensor.view().rows;
                    widest_input = widest_input.max(width).max(inner);
                    let [rows, gates, _] = expert_widths;
                    let inner = inner.max(gates);
                    expert_widths = [width.max(rows), inner, inner];
                }
                _ => {}
            }
        }
        Workspace {
            shapes: program.buffers.clone(),
            buffers: program.buffers.iter().map(|shape| Buffer::new(shape.width)).collect(),
            quantized: Vec::new(),
            expert: [1; 3].map(Buffer::new),
            expert_widths,
            widest_input,
        }
    }

    /// Makes room for the rows of a pass, so that its operations cannot fail.
    ///
    /// # Errors
    /// There is no memory.
    pub fn reserve(&mut self, rows: &Rows<'_>) -> Result<()> {
        for (shape, buffer) in self.shapes.iter().zip(&mut self.buffers) {
            buffer.set_rows(rows.count(shape.rows))?;
        }
        for (buffer, &width) in self.expert.iter_mut().zip(&self.expert_widths) {
            let len = rows.len() * width.next_multiple_of(LANES);
            let more = len.saturating_sub(buffer.data.len());
            reserve(&mut buffer.data, more)?;
        }
        // (At most twice an f32 for each element, and of so few layouts that each has one here.)
        for (_, quantized) in &mut self.quantized {
            reserve(
                quantized,
                (2 * rows.len() * self.widest_input).saturating_sub(quantized.len()),
            )?;
        }
        Ok(())
    }
}

impl exec::Workspace for Workspace {
    fn write(&mut self, buffer: BufferId, rows: &[f32]) -> Result<()> {
        let buffer = &mut self.buffers[buffer.index()];
        assert_eq!(rows.len() % buffer.width, 0);
        buffer.set_rows(rows.len() / buffer.width)?;
        let width = buffer.width;
        for (i, row) in rows.chunks_exact(width).enumerate() {
            buffer.row_mut(i)[..width].copy_from_slice(row);
        }
        Ok(())
    }

    fn read<'a>(
        &'a mut self,
        buffer: BufferId,
        rows: Range<usize>,
        copy: &'a mut Vec<f32>,
    ) -> Result<&'a [f32]> {
        let buffer = &self.buffers[buffer.index()];
        if buffer.stride == buffer.width {
            return Ok(&buffer.data[rows.start * buffer.stride..rows.end * buffer.stride]);
        }
        copy.clear();
        reserve(copy, rows.len() * buffer.width)?;
        rows.for_each(|i| copy.extend_from_slice(&buffer.row(i)[..buffer.width]));
        Ok(copy)
    }
}
