//! A pass under way: the verbs of a forward pass as dispatches, and what becomes of several at once.
//!
//! Products of bytes do what follows them as well where they can: they add up the residual and prepare the norm,
//! or SwiGLU, or rotate queries and keys and store keys and values. The verbs come one by one, so products are put
//! off until the verb after them is known, and recorded with it as their *ending* or without. A norm is put
//! off until it is known what reads it: products take its rows as bytes without the factor of each row, which
//! they apply themselves, so that nothing has to wait for the sum over a whole row.

use std::sync::Arc;

use super::device::{Arena, Op, Storage};
use super::shaders::{
    Arithmetic, COLUMNS, Ending, Frame, MAX_HEAD, MOST_OUTPUTS, PATH_WORDS, QUERIES, SPLIT, Shader,
    TILE_COLUMNS,
};
use super::{Agreement, Buffer, CHUNK, Cache, Embedding, Gpu, Matrix, NO_BIAS, Variants, Vector};
use crate::backend::{CacheShape, Pass, RotaryPairs, Rows};
use crate::error::{Error, Result};
use crate::quant::BlockType;

/// More rows of activations than these go in tiles: two columns of eight cost less than a tile.
const MOST_UNTILED_ROWS: usize = 16;

/// The fewest rows of which several share what attention reads.
const LEAST_SHARING: usize = 32;

/// Rows of activations as products read them.
#[derive(Debug, Clone)]
struct Operand {
    rows: usize,
    width: usize,
    stride: usize,
    /// In single precision.
    floats: Arc<Storage>,
    /// As bytes or halves.
    rounded: Option<Rounded>,
}

/// Rows of activations as bytes or halves.
#[derive(Debug, Clone)]
pub(super) struct Rounded {
    /// The buffer that has them in single precision.
    id: u64,
    values: Arc<Storage>,
    scales: Arc<Storage>,
    /// What is still to be applied to them.
    norm: Option<NormFactors>,
}

/// How products find the factors of a norm.
#[derive(Debug, Clone, Copy, Default)]
struct NormFactors {
    /// Where sums of squares begin among the scales: never at 0.
    squares: u32,
    inverse_width: f32,
    epsilon: f32,
}

/// A norm of rows of activations.
#[derive(Debug)]
struct Norm {
    x: Arc<Storage>,
    weight: Arc<Storage>,
    epsilon: f32,
    rows: usize,
    width: usize,
    stride: usize,
    out: Arc<Storage>,
}

/// A product with one matrix, or with several that lie together.
#[derive(Debug)]
struct Product {
    shader: Shader,
    /// Weights, activations, their scales, and biases.
    inputs: [Arc<Storage>; 4],
    outputs: Vec<Arc<Storage>>,
    params: ProductParams,
    /// How many matrices, each with an output.
    matrices: usize,
    cost: usize,
}

/// Parameters of a product: those of `shaders/product.wgsl`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct ProductParams {
    chunks: u32,
    row_bytes: u32,
    rows: u32,
    begins: u32,
    columns: u32,
    x_stride: u32,
    squares: u32,
    inverse_width: f32,
    epsilon: f32,
    first: u32,
    bias_at: u32,
    add: u32,
    out_stride: u32,
    second_stride: u32,
    third_stride: u32,
    second: u32,
    third: u32,
    out_squares: u32,
    above: u32,
    head_dim: u32,
    pairs: u32,
    halves: u32,
    rotations_at: u32,
    first_slot: u32,
    kv_pairs: u32,
}

/// A pass under way: dispatches are recorded, and submitted when it ends.
pub struct GpuPass<'p> {
    gpu: &'p Gpu,
    rows: Rows<'p>,
    pub(super) arena: Arena,
    /// Where each row's path is.
    paths_at: u32,
    /// Where the rotations are.
    rotations_at: u32,
    /// Rows that lie as bytes beside their buffer, if it was the last to be written; which of two places
    /// they are in.
    pub(super) rounded: Option<Rounded>,
    other_bytes: bool,
    /// A norm that is put off: what reads it says how it is best made.
    norm: Option<Norm>,
    /// The buffer of a norm that products took as bytes: nothing was written to it.
    unwritten: Option<u64>,
    /// Products of the last verb that are put off: the verb that follows may become a part of them.
    products: Vec<Product>,
    /// The first thing that went wrong.
    failed: Option<Error>,
}

impl<'p> GpuPass<'p> {
    pub(super) fn new(gpu: &'p Gpu, rows: Rows<'p>) -> Self {
        let mut arena = gpu.device.arena();
        let data = &mut arena.work.data;
        data.extend_from_slice(rows.tokens);
        let paths_at = data.len() as u32;
        for &path in rows.paths {
            let mut words = [0; PATH_WORDS];
            words[0] = path.count_ones();
            let (mut left, mut i) = (path, 0);
            while left != 0 {
                words[1 + i / 4] |= left.trailing_zeros() << (8 * (i % 4));
                left &= left - 1;
                i += 1;
            }
            data.extend_from_slice(&words);
        }
        let rotations_at = data.len() as u32;
        data.extend(rows.rotations.iter().flatten().map(|x| x.to_bits()));
        GpuPass {
            gpu,
            rows,
            arena,
            paths_at,
            rotations_at,
            rounded: None,
            other_bytes: false,
            norm: None,
            unwritten: None,
            products: Vec::new(),
            failed: None,
        }
    }

    /// Submits what was recorded, unless recording it failed.
    pub(in crate::backend) fn end<R>(mut self, recorded: Result<R>) -> Result<R> {
        self.end_norm();
        self.end_products();
        let device = &self.gpu.device;
        let result = match self.failed {
            Some(error) => Err(error),
            None => recorded.and_then(|r| device.submit(&mut self.arena).map(|()| r)),
        };
        device.give_back(self.arena);
        result
    }

    pub(super) fn dispatch(
        &mut self,
        shader: Shader,
        buffers: &[&Arc<Storage>],
        params: &[u32],
        groups: [usize; 3],
        cost: usize,
    ) {
        if groups.contains(&0) {
            return;
        }
        self.end_norm();
        self.end_products();
        self.rounded = None;
        if self.failed.is_none()
            && let Err(error) = self.gpu.device.submit_early(&mut self.arena)
        {
            self.failed = Some(error);
        }
        self.push(shader, buffers, params, groups, cost);
    }

    fn push(
        &mut self,
        shader: Shader,
        buffers: &[&Arc<Storage>],
        params: &[u32],
        groups: [usize; 3],
        cost: usize,
    ) {
        self.check_written(buffers);
        let device = &self.gpu.device;
        let buffers: Vec<&Storage> = buffers.iter().map(|buffer| &***buffer).collect();
        let work = &mut self.arena.work;
        let at = work.ops.len() * device.params_step();
        work.params.resize(at + device.params_step(), 0);
        work.params[at..][..4 * params.len()].copy_from_slice(bytemuck::cast_slice(params));
        work.ops.push(Op {
            shader,
            pipeline: device.pipeline(shader),
            group: device.group(shader.access(), &buffers),
            groups: groups.map(|n| n as u32),
            shape: None,
            cost: cost as u64,
        });
    }

    /// Fails if something is to use the buffer of a norm that products took as bytes.
    fn check_written(&mut self, buffers: &[&Arc<Storage>]) {
        if buffers.iter().any(|buffer| self.unwritten == Some(buffer.id)) {
            self.fail("was to read a norm after the products that it is for".to_owned());
        }
    }

    /// Makes room for `rows` rows, and says that there are as many.
    fn set_rows(&mut self, buffer: &mut Buffer, rows: usize) {
        if rows > buffer.capacity || buffer.storage.is_none() {
            // A few sizes, so that buffers settle: one token, a few drafted ones, a prompt.
            let capacity = if rows <= 8 { 8 } else { rows.next_multiple_of(128) };
            let bytes = 4 * (capacity * buffer.stride) as u64;
            if bytes > self.gpu.device.binding_limit() {
                self.fail(format!("cannot hold {capacity} rows of {} numbers", buffer.width));
                buffer.rows = rows;
                // (Bound by what is still recorded, which will not run.)
                buffer.storage.get_or_insert_with(|| self.gpu.device.storage(16));
                return;
            }
            if buffer.storage.replace(self.gpu.device.storage(bytes)).is_some() {
                self.gpu.device.replaced();
            }
            buffer.capacity = capacity;
        }
        buffer.rows = rows;
        self.unwritten = self.unwritten.filter(|&id| id != buffer.storage().id);
    }

    fn fail(&mut self, what: String) {
        let error = self.gpu.device.fault(what);
        self.failed.get_or_insert(error);
    }

    /// One of the arena's buffers, with room for so many floats.
    pub(super) fn scratch(&mut self, which: usize, floats: usize) -> Arc<Storage> {
        let bytes = 4 * floats.max(1) as u64;
        let place = &mut self.arena.scratch[which];
        match place {
            Some(storage) if storage.raw.size() >= bytes => storage.clone(),
            _ => {
                if place.is_some() {
                    self.gpu.device.replaced();
                }
                place.insert(self.gpu.device.storage(bytes.next_power_of_two())).clone()
            }
        }
    }

    /// Products of the same rows with matrices of which each follows the one before.
    fn product(&mut self, x: &Operand, to: &mut [(&Matrix, &mut Buffer)], add: bool) {
        for (matrix, out) in &mut *to {
            assert_eq!((matrix.cols, matrix.rows), (x.width, out.width));
            if add {
                assert_eq!(out.rows, x.rows);
            } else {
                self.set_rows(out, x.rows);
            }
        }
        if self.failed.is_some() {
            return;
        }
        let matrix = to[0].0;
        let Variants { padded, .. } = self.gpu.variants;
        let Agreement { columns, tiles } = matrix.agreement;
        let widest = COLUMNS[COLUMNS.len() - 1];
        // The least that is enough, or the largest.
        let fits = COLUMNS.iter().copied().find(|&n| n as usize >= x.rows).unwrap_or(widest);
        let (frame, columns) = match tiles && x.rows > MOST_UNTILED_ROWS {
            true => (Frame::Tiled, TILE_COLUMNS),
            false if padded || !columns => (Frame::Matmul, widest),
            false => (Frame::Matmul, fits),
        };
        let arithmetic = self.gpu.arithmetic_with(matrix.block);
        // All rows of several matrices, or the parts of one.
        let several = to.len() > 1;
        let shader = Shader {
            arithmetic,
            columns,
            subgroups: self.gpu.subgroups && frame == Frame::Matmul,
            ending: if several { Ending::Three } else { Ending::One },
            ..Shader::weights(frame, matrix.block)
        };
        let [nothing, no_second, no_third] = &self.gpu.nothing;
        let (no_second, no_third) = (no_second.clone(), no_third.clone());
        let bias = matrix.bias.as_ref().map_or(nothing, |bias| &bias.floats).clone();
        let (values, scales, norm) = match &x.rounded {
            Some(rounded) if arithmetic != Arithmetic::F32 => {
                (rounded.values.clone(), rounded.scales.clone(), rounded.norm)
            }
            _ => (x.floats.clone(), nothing.clone(), None),
        };
        let norm = norm.unwrap_or_default();
        let all_rows: usize = to.iter().map(|(matrix, _)| matrix.rows).sum();
        let output = |i: usize| to.get(i).map(|(_, out)| &**out);
        let second = if several { matrix.rows } else { all_rows };
        let third = to.get(1).map_or(all_rows, |(matrix, _)| second + matrix.rows);
        let stride = |i: usize| output(i).map_or(0, |out| out.stride as u32);
        for part in &matrix.parts.parts {
            let rows = if several { all_rows } else { part.rows };
            let bias_at = matrix.bias.as_ref().map_or(NO_BIAS, |bias| bias.at + part.first);
            let params = ProductParams {
                chunks: matrix.cols.div_ceil(CHUNK) as u32,
                row_bytes: matrix.row_bytes as u32,
                rows: rows as u32,
                begins: part.begins as u32,
                columns: x.rows as u32,
                x_stride: (if arithmetic == Arithmetic::Int8 {
                    x.stride / CHUNK
                } else {
                    x.stride / 4
                }) as u32,
                squares: norm.squares,
                inverse_width: norm.inverse_width,
                epsilon: norm.epsilon,
                first: part.first as u32,
                bias_at: bias_at as u32,
                add: u32::from(add),
                out_stride: stride(0),
                second_stride: stride(1),
                third_stride: stride(2),
                second: second as u32,
                third: third as u32,
                ..ProductParams::default()
            };
            let mut outputs = vec![to[0].1.storage().clone()];
            if several {
                let others = [(1, &no_second), (2, &no_third)];
                outputs.extend(
                    others.map(|(i, none)| output(i).map_or(none, Buffer::storage).clone()),
                );
            }
            let product = Product {
                shader,
                inputs: [part.bytes.clone(), values.clone(), scales.clone(), bias.clone()],
                outputs,
                params,
                matrices: to.len(),
                cost: rows * matrix.cols * x.rows,
            };
            self.check_written(&product.inputs.each_ref());
            self.products.push(product);
        }
        if to.iter().any(|(_, out)| self.is_rounded(out)) {
            self.rounded = None;
        }
    }

    fn record(&mut self, product: &Product) {
        let Product { shader, params, .. } = product;
        let column_groups = (params.columns as usize).div_ceil(shader.columns as usize);
        let row_groups = match shader.ending {
            Ending::Swiglu => params.second as usize / CHUNK,
            _ => (params.rows as usize).div_ceil(shader.group_rows()),
        };
        let groups = match shader.frame {
            Frame::Tiled => [column_groups, row_groups, 1],
            _ => [row_groups, column_groups, 1],
        };
        let buffers: Vec<_> = product.inputs.iter().chain(&product.outputs).collect();
        self.push(*shader, &buffers, bytemuck::cast_slice(&[*params]), groups, product.cost);
        if let Some(op) = self.arena.work.ops.last_mut() {
            op.shape = Some([params.rows, params.chunks * CHUNK as u32]);
        }
    }

    /// Records the products that were put off as they are.
    fn end_products(&mut self) {
        for product in std::mem::take(&mut self.products) {
            self.record(&product);
        }
    }

    /// Records the products that were put off with another ending, which `change` gives what it needs.
    fn end_products_with(&mut self, ending: Ending, mut change: impl FnMut(&mut Product)) {
        for mut product in std::mem::take(&mut self.products) {
            product.shader.ending = ending;
            change(&mut product);
            self.record(&product);
        }
    }

    /// Whether a product can have another ending.
    fn can_fuse(&self, product: &Product) -> bool {
        let Shader { frame, arithmetic, .. } = product.shader;
        self.gpu.variants.fused && frame == Frame::Matmul && arithmetic == Arithmetic::Int8
    }

    /// Whether the products that were put off have these outputs, one after another, and can have another ending.
    fn are_fusible(&self, outputs: &[&Buffer]) -> bool {
        // (Parts of a matrix have one output together, which is no match.)
        let made = self.products.iter().flat_map(|product| &product.outputs[..product.matrices]);
        self.products.iter().all(|product| self.can_fuse(product))
            && made.map(|storage| storage.id).eq(outputs.iter().map(|out| out.storage().id))
    }

    /// Rows of a table: those of the tokens, or those of the positions, which are added.
    fn look_up(&mut self, table: &Embedding, by_position: bool, out: &Buffer) {
        assert_eq!(table.cols, out.width);
        let n = self.rows.len();
        let chunks = table.cols.div_ceil(CHUNK);
        for part in &table.parts.parts {
            let params = [
                table.cols,
                chunks,
                table.row_bytes,
                part.first,
                part.rows,
                out.stride / 4,
                usize::from(by_position),
                self.rows.line,
                self.paths_at as usize,
            ];
            self.dispatch(
                Shader::weights(Frame::Embed, table.block),
                &[&part.bytes, out.storage()],
                &params.map(|n| n as u32),
                [chunks.div_ceil(64), n, 1],
                n * table.cols,
            );
        }
    }

    /// Rows of activations as products with matrices of some types want them: they are rounded to bytes or
    /// halves, unless that has been done.
    fn operand(&mut self, x: &Buffer, matrices: impl Iterator<Item = BlockType>) -> Operand {
        let mut wanted = matrices.map(|block| self.gpu.arithmetic_with(block)).collect::<Vec<_>>();
        wanted.dedup();
        let mut operand = Operand {
            rows: x.rows,
            width: x.width,
            stride: x.stride,
            floats: x.storage().clone(),
            rounded: None,
        };
        if wanted == [Arithmetic::Int8]
            && self.norm.as_ref().is_some_and(|norm| norm.out.id == x.storage().id)
        {
            self.round_norm();
        }
        self.end_norm();
        match wanted.into_iter().find(|&arithmetic| arithmetic != Arithmetic::F32) {
            Some(Arithmetic::F16) => {
                let halves = self.scratch(1, x.rows * x.stride / 2);
                let scales = self.scratch(2, x.rows);
                self.dispatch(
                    Shader { arithmetic: Arithmetic::F16, ..Shader::plain(Frame::Halve) },
                    &[x.storage(), &halves, &scales],
                    &[x.stride4()],
                    [x.rows, 1, 1],
                    x.rows * x.stride,
                );
                operand.rounded = Some(Rounded { id: 0, values: halves, scales, norm: None });
            }
            Some(_) if self.is_rounded(x) => operand.rounded.clone_from(&self.rounded),
            Some(_) => {
                let rounded = self.room_for_bytes(x);
                let blocks = x.stride / CHUNK;
                self.dispatch(
                    Shader::plain(Frame::Quantize),
                    &[x.storage(), &rounded.values, &rounded.scales],
                    &[x.stride4(), blocks as u32],
                    [blocks.div_ceil(64), x.rows, 1],
                    x.rows * x.stride,
                );
                operand.rounded = Some(rounded);
            }
            None => {}
        }
        operand
    }

    /// Whether the rows of a buffer lie beside it as bytes.
    fn is_rounded(&self, x: &Buffer) -> bool {
        let id = x.storage.as_ref().map(|storage| storage.id);
        self.rounded.as_ref().is_some_and(|rounded| Some(rounded.id) == id)
    }

    /// Where the rows of `x` lie as blocks of bytes, with their scales and sums of squares. (Two places in turns:
    /// a product reads one while it writes another.)
    fn room_for_bytes(&mut self, x: &Buffer) -> Rounded {
        self.room_for_rows(x.storage(), x.rows, x.stride)
    }

    fn room_for_rows(&mut self, x: &Storage, rows: usize, stride: usize) -> Rounded {
        let blocks = stride / CHUNK;
        self.other_bytes = !self.other_bytes;
        let [values, scales] = if self.other_bytes { [1, 2] } else { [4, 5] };
        let values = self.scratch(values, rows * blocks * 8);
        let scales = self.scratch(scales, rows * (blocks * 3 + 1));
        Rounded { id: x.id, values, scales, norm: None }
    }

    /// Records a norm that was put off, as its rows in single precision.
    fn end_norm(&mut self) {
        let Some(norm) = self.norm.take() else { return };
        let shader = Shader { subgroups: self.gpu.subgroups, ..Shader::plain(Frame::RmsNorm) };
        self.dispatch(
            shader,
            &[&norm.x, &norm.weight, &norm.out],
            &[norm.width as u32, (norm.stride / 4) as u32, norm.epsilon.to_bits()],
            [norm.rows, 1, 1],
            norm.rows * norm.stride,
        );
    }

    /// Has a norm that was put off written as bytes, without the factors of its rows: by the product before it if
    /// there is one.
    fn round_norm(&mut self) {
        let Some(norm) = self.norm.take() else { return };
        let Norm { rows, width, stride, .. } = norm;
        let mut rounded = self.room_for_rows(&norm.out, rows, stride);
        let squares = (2 * rows * stride / CHUNK) as u32;
        let factors =
            NormFactors { squares, inverse_width: 1.0 / width as f32, epsilon: norm.epsilon };
        let is_residual = |product: &Product| {
            product.outputs[0].id == norm.x.id
                && product.params.add != 0
                && product.params.rows as usize == width
                && width % CHUNK == 0
        };
        if matches!(&self.products[..], [product] if self.can_fuse(product) && is_residual(product))
        {
            self.end_products_with(Ending::Norm, |product| {
                product.params.out_squares = squares;
                let more = [&norm.weight, &rounded.values, &rounded.scales];
                product.outputs.extend(more.map(Arc::clone));
            });
        } else {
            self.activations(
                Shader::plain(Frame::Weigh),
                &[&norm.x, &norm.weight],
                Some(&rounded),
                &[(stride / 4) as u32, squares],
                [(stride / 4).div_ceil(64), rows, 1],
                rows * stride,
            );
        }
        rounded.norm = Some(factors);
        self.rounded = Some(rounded);
        self.unwritten = Some(norm.out.id);
    }

    /// Room for the rows of `out` as bytes, if products want them and a frame can write them along.
    fn room_along(&mut self, out: &Buffer, can: bool) -> Option<Rounded> {
        (can && self.gpu.arithmetic == Arithmetic::Int8).then(|| self.room_for_bytes(out))
    }

    /// Runs a frame over rows of activations that products read next: where these want bytes it writes them too,
    /// which saves a dispatch.
    fn activations(
        &mut self,
        shader: Shader,
        buffers: &[&Arc<Storage>],
        rounded: Option<&Rounded>,
        params: &[u32],
        groups: [usize; 3],
        cost: usize,
    ) {
        let mut buffers = buffers.to_vec();
        let mut shader = Shader { subgroups: self.gpu.subgroups, ..shader };
        if let Some(rounded) = rounded {
            buffers.extend([&rounded.values, &rounded.scales]);
            shader.arithmetic = Arithmetic::Int8;
        }
        self.dispatch(shader, &buffers, params, groups, cost);
    }

    /// Makes room for the rows of this pass in a layer.
    pub(super) fn reserve(&mut self, cache: &mut Cache, layer: usize) {
        let wanted = self.rows.first_slot + self.rows.len();
        let words = cache.words();
        let now = cache.slots[layer];
        if wanted <= now {
            return;
        }
        let limit = self.gpu.device.binding_limit() as usize / (4 * words);
        if wanted > limit {
            return self.fail(format!("holds {limit} rows of context, {wanted} are wanted"));
        }
        let slots = wanted.max(2 * now).next_multiple_of(256).min(limit);
        let device = &self.gpu.device;
        let new = [(); 2].map(|()| device.storage(4 * (slots * words) as u64));
        if let Some(old) = cache.layers[layer].replace(new.clone()) {
            let bytes = 4 * (now * words) as u64;
            self.arena.work.copies.extend(old.into_iter().zip(new).map(|(a, b)| (a, b, bytes)));
            device.replaced();
        }
        cache.slots[layer] = slots;
    }
}

impl Pass<Gpu> for GpuPass<'_> {
    fn embed(&mut self, table: &Embedding, out: &mut Buffer) {
        let n = self.rows.len();
        self.set_rows(out, n);
        self.look_up(table, false, out);
    }

    fn add_positions(&mut self, table: &Embedding, x: &mut Buffer) {
        assert_eq!(x.rows, self.rows.len());
        self.look_up(table, true, x);
    }

    fn write(&mut self, rows: &[f32], out: &mut Buffer) {
        assert_eq!(rows.len() % out.width, 0);
        self.set_rows(out, rows.len() / out.width);
        self.rounded = None;
        if self.failed.is_some() {
            return;
        }
        let device = &self.gpu.device;
        if out.stride == out.width {
            return device.write(out.storage(), 0, rows);
        }
        for (i, row) in rows.chunks_exact(out.width).enumerate() {
            device.write(out.storage(), 4 * (i * out.stride) as u64, row);
        }
    }

    fn rms_norm(&mut self, x: &Buffer, weight: &Vector, epsilon: f32, out: &mut Buffer) {
        assert_eq!((x.width, x.width), (out.width, weight.len));
        self.end_norm();
        self.set_rows(out, x.rows);
        let Buffer { rows, width, stride, .. } = *x;
        let (x, weight, out) = (x.storage().clone(), weight.floats.clone(), out.storage().clone());
        self.norm = Some(Norm { x, weight, epsilon, rows, width, stride, out });
    }

    fn layer_norm(
        &mut self,
        x: &Buffer,
        weight: &Vector,
        bias: &Vector,
        epsilon: f32,
        out: &mut Buffer,
    ) {
        assert_eq!([x.width; 3], [out.width, weight.len, bias.len]);
        self.set_rows(out, x.rows);
        let rounded = self.room_along(out, true);
        self.activations(
            Shader::plain(Frame::LayerNorm),
            &[x.storage(), &weight.floats, &bias.floats, out.storage()],
            rounded.as_ref(),
            &[x.width as u32, x.stride4(), epsilon.to_bits()],
            [x.rows, 1, 1],
            x.rows * x.stride,
        );
        self.rounded = rounded;
    }

    fn linear(&mut self, x: &Buffer, to: &mut [(&Matrix, &mut Buffer)]) {
        let x = &self.operand(x, to.iter().map(|(matrix, _)| matrix.block));
        self.end_products();
        let mut first = 0;
        while first < to.len() {
            let mut end = first + 1;
            while end < to.len().min(first + MOST_OUTPUTS) && to[end].0.follows(to[end - 1].0) {
                end += 1;
            }
            self.product(x, &mut to[first..end], false);
            first = end;
        }
    }

    fn linear_add(&mut self, x: &Buffer, weight: &Matrix, out: &mut Buffer) {
        let x = &self.operand(x, std::iter::once(weight.block));
        self.end_products();
        self.product(x, &mut [(weight, out)], true);
    }

    fn rotate_and_store(
        &mut self,
        q: &mut Buffer,
        k: &mut Buffer,
        v: &Buffer,
        pairs: RotaryPairs,
        cache: &mut Cache,
        layer: usize,
    ) {
        let CacheShape { kv_heads, head_dim, .. } = cache.shape;
        if head_dim % 2 != 0 || head_dim > MAX_HEAD {
            return self.fail(format!(
                "runs heads of up to {MAX_HEAD} elements, an even number, not of {head_dim}"
            ));
        }
        self.reserve(cache, layer);
        let n = self.rows.len();
        let Some([keys, values]) = &cache.layers[layer] else { return };
        if self.failed.is_some() {
            return;
        }
        let (heads, rotated) = (q.width / head_dim, self.rows.rotations.len() / n);
        let halves = usize::from(pairs == RotaryPairs::Halves);
        if head_dim % 4 == 0 && rotated % 2 == 0 && self.are_fusible(&[q, k, v]) {
            let (second, third) = (q.width as u32, (q.width + k.width) as u32);
            let (rotations_at, first_slot) = (self.rotations_at, self.rows.first_slot as u32);
            let mut above = 0;
            self.end_products_with(Ending::Rotate, |product| {
                product.shader.cache_f16 = cache.is_f16();
                product.outputs = vec![q.storage().clone(), keys.clone(), values.clone()];
                product.params = ProductParams {
                    out_stride: q.stride as u32,
                    second,
                    third,
                    above,
                    head_dim: head_dim as u32,
                    pairs: rotated as u32,
                    halves: halves as u32,
                    rotations_at,
                    first_slot,
                    kv_pairs: (kv_heads * head_dim / 2) as u32,
                    ..product.params
                };
                above += product.params.rows;
            });
            return;
        }
        let params = [
            heads,
            kv_heads,
            head_dim,
            rotated,
            q.stride,
            k.stride,
            self.rows.first_slot,
            self.rotations_at as usize,
            halves,
        ];
        let threads = heads * rotated + kv_heads * head_dim;
        self.dispatch(
            Shader::cache(Frame::RotateStore, cache.is_f16()),
            &[q.storage(), k.storage(), v.storage(), keys, values],
            &params.map(|n| n as u32),
            [threads.div_ceil(64), n, 1],
            n * threads,
        );
    }

    fn attend(
        &mut self,
        q: &Buffer,
        cache: &Cache,
        layer: usize,
        window: Option<usize>,
        out: &mut Buffer,
    ) {
        assert_eq!((q.width, q.rows), (out.width, self.rows.len()));
        self.set_rows(out, q.rows);
        let Some([keys, values]) = &cache.layers[layer] else { return };
        if self.failed.is_some() {
            return;
        }
        let CacheShape { kv_heads, head_dim, .. } = cache.shape;
        let heads = q.width / head_dim;
        let line = self.rows.line;
        let deepest = self.rows.paths.iter().map(|path| path.count_ones()).max().unwrap_or(0);
        let splits = (line + deepest as usize).div_ceil(SPLIT);
        // One split is written where it belongs; several are merged.
        let row_floats = if splits > 1 { heads * splits * (head_dim + 2) } else { 0 };
        let fit = match row_floats {
            0 => q.rows,
            floats => self.gpu.partial_limit / (4 * floats),
        };
        // Rows of a chain share what they read, if there are many: few had better be many workgroups.
        let columns =
            if q.rows >= LEAST_SHARING && is_chain(self.rows.paths) { QUERIES } else { 1 };
        let whole = (fit / columns as usize).max(1) * columns as usize;
        let at_once = if fit < q.rows { whole } else { q.rows };
        let partial = self.scratch(0, at_once * row_floats);
        let scale = 1.0 / (head_dim as f32).sqrt();
        // What is read at once has up to 16 bytes, and does not go beyond a head.
        let most = if cache.is_f16() { 4 } else { 2 };
        let pairs = [4, 2, 1].into_iter().find(|n| *n <= most && head_dim / 2 % n == 0);
        let pairs = pairs.map_or(1, |n| n as u32);
        // A block of bytes is of one head then.
        let whole_blocks = head_dim % CHUNK == 0;
        let rounded = self.room_along(out, whole_blocks);
        let window = window.map_or(u32::MAX, |window| u32::try_from(window).unwrap_or(u32::MAX));
        for first in (0..q.rows).step_by(at_once) {
            let rows = at_once.min(q.rows - first);
            let params = [
                (heads / kv_heads) as u32,
                kv_heads as u32,
                head_dim as u32,
                q.stride as u32,
                line as u32,
                self.paths_at,
                scale.to_bits(),
                first as u32,
                (first + rows) as u32,
                splits as u32,
                window,
            ];
            self.activations(
                Shader { pairs, columns, ..Shader::cache(Frame::Attend, cache.is_f16()) },
                &[q.storage(), keys, values, &partial, out.storage()],
                rounded.as_ref(),
                &params,
                [heads, rows.div_ceil(columns as usize), splits],
                2 * rows * (line + deepest as usize) * q.width,
            );
            if splits > 1 {
                let params = [
                    head_dim as u32,
                    q.stride as u32,
                    line as u32,
                    self.paths_at,
                    first as u32,
                    splits as u32,
                    window,
                ];
                self.activations(
                    Shader::plain(Frame::Combine),
                    &[&partial, out.storage()],
                    rounded.as_ref(),
                    &params,
                    [heads, rows, 1],
                    rows * splits * q.width,
                );
            }
        }
        self.rounded = rounded;
    }

    fn swiglu(&mut self, gate: &mut Buffer, up: &Buffer) {
        assert_eq!((gate.stride, gate.rows), (up.stride, up.rows));
        let is_one = self.products.len() == 1 && gate.width.is_multiple_of(CHUNK);
        if is_one && self.are_fusible(&[gate, up]) {
            let rounded = self.room_for_bytes(gate);
            self.end_products_with(Ending::Swiglu, |product| {
                product.outputs =
                    vec![gate.storage().clone(), rounded.values.clone(), rounded.scales.clone()];
            });
            self.rounded = Some(rounded);
            return;
        }
        let rounded = self.room_along(gate, true);
        self.activations(
            Shader::plain(Frame::Swiglu),
            &[gate.storage(), up.storage()],
            rounded.as_ref(),
            &[gate.stride4()],
            [(gate.stride / 4).div_ceil(64), gate.rows, 1],
            gate.rows * gate.stride,
        );
        self.rounded = rounded;
    }

    fn relu(&mut self, x: &mut Buffer) {
        self.dispatch(
            Shader::plain(Frame::Relu),
            &[x.storage()],
            &[x.stride4()],
            [(x.stride / 4).div_ceil(64), x.rows, 1],
            x.rows * x.stride,
        );
    }

    fn gather(&mut self, x: &Buffer, rows: &[u32], out: &mut Buffer) {
        assert_eq!(x.width, out.width);
        assert!(rows.iter().all(|&row| (row as usize) < x.rows));
        self.set_rows(out, rows.len());
        let at = self.arena.work.data.len() as u32;
        self.arena.work.data.extend_from_slice(rows);
        self.dispatch(
            Shader::plain(Frame::Gather),
            &[x.storage(), out.storage()],
            &[x.stride4(), at],
            [(x.stride / 4).div_ceil(64), rows.len(), 1],
            rows.len() * x.stride,
        );
    }
}

/// Whether each row sees what the one before it does, in the same order, and more.
fn is_chain(paths: &[u128]) -> bool {
    paths.windows(2).all(|two| {
        let more = two[0] ^ two[1];
        // (All that is new comes behind all that was.)
        more & two[0] == 0 && more.trailing_zeros() >= 128 - two[0].leading_zeros()
    })
}

#[cfg(test)]
mod tests {
    use super::is_chain;

    #[test]
    fn rows_of_a_chain_see_what_those_before_them_do_and_more_behind_it() {
        assert!(is_chain(&[]) && is_chain(&[0b1]) && is_chain(&[0b1, 0b11, 0b10_0111]));
        assert!(is_chain(&[0b10, 0b10, 0b1010, u128::MAX << 3 & !0b100 | 0b1010]));
        for no_chain in [[0b1, 0b10], [0b11, 0b1], [0b101, 0b111], [1 << 127, 1 << 127 | 1]] {
            assert!(!is_chain(&no_chain), "{no_chain:?}");
        }
    }
}
