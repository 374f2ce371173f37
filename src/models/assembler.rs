//! Operations over tensors by name: what a family writes its forward pass with.

use std::sync::Arc;

use super::config::{Hyperparameters, Mixture};
use super::tensors::Tensors;
use crate::error::Result;
use crate::gguf::{Gguf, SharedTensor};
use crate::graph::{
    Activation, Attention, BufferId, Builder, Expert, Experts, Gating, KvShape, Norm, NormKind,
    Program, RotaryId, RotaryTable, Routing, WeightId,
};

/// The embedding, of which the logits may be made too.
const EMBEDDING: &str = "token_embd.weight";

/// Builds the program of one file. Tensors are named without what all of a layer's names begin with.
pub struct Assembler<'a> {
    keys: Hyperparameters<'a>,
    tensors: Tensors,
    graph: Builder,
    /// What tensor names of the layer begin with.
    prefix: String,
}

impl<'a> Assembler<'a> {
    /// Nothing built yet, of a file with these hyperparameters.
    ///
    /// # Errors
    /// The file does not say for how many positions the model was trained.
    pub fn new(file: &Arc<Gguf>, keys: Hyperparameters<'a>) -> Result<Self> {
        let context = keys.required("context_length")?;
        if !keys.flag("attention.causal", true)? {
            let what =
                "attends to what comes later (`attention.causal` is false), which is not run";
            return Err(keys.unsupported(what.to_owned()));
        }
        Ok(Assembler {
            keys,
            tensors: Tensors::new(file),
            graph: Builder::new(file.name(), context),
            prefix: String::new(),
        })
    }

    /// The file's hyperparameters.
    pub fn keys(&self) -> Hyperparameters<'a> {
        self.keys
    }

    /// The operations built so far, for those that need no tensor.
    pub fn graph(&mut self) -> &mut Builder {
        &mut self.graph
    }

    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Begins layer `i`: names are those of its tensors from now on. Returns its number in the cache.
    pub fn begin_layer(&mut self, i: usize, kv: KvShape) -> usize {
        self.prefix = format!("blk.{i}.");
        self.graph.begin_layer(kv)
    }

    /// Ends the layers: names are whole from now on. Returns the rows of `x` whose logits are wanted.
    pub fn end_layers(&mut self, x: BufferId) -> BufferId {
        self.prefix.clear();
        self.graph.select_rows(x)
    }

    /// Whether the file has a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.has(&self.full(name))
    }

    /// The tensor called `name`, with `rows` outputs and `cols` inputs.
    ///
    /// # Errors
    /// As [`Tensors::take`].
    pub fn tensor(&mut self, name: &str, rows: usize, cols: usize) -> Result<SharedTensor> {
        self.tensors.take(&self.full(name), rows, cols)
    }

    /// The numbers of the vector called `name`, if the file has it.
    ///
    /// # Errors
    /// As [`Tensors::floats`].
    pub fn floats(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>> {
        self.tensors.floats(&self.full(name), len)
    }

    /// The vector called `name`.
    ///
    /// # Errors
    /// As [`Tensors::take`].
    pub fn vector(&mut self, name: &str, len: usize) -> Result<WeightId> {
        let tensor = self.tensor(name, 1, len)?;
        Ok(self.graph.vector(tensor))
    }

    /// The matrix `name.weight` with `rows` outputs and `cols` inputs, and with `name.bias` if the file has it.
    ///
    /// # Errors
    /// As [`Tensors::take`].
    pub fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<WeightId> {
        let tensor = self.tensor(&format!("{name}.weight"), rows, cols)?;
        let bias = self.tensors.find(&self.full(&format!("{name}.bias")), 1, rows)?;
        self.graph.matrix(tensor, bias)
    }

    /// Rows of the embedding of width `width` for the tokens, each times `scale`.
    ///
    /// # Errors
    /// There is no embedding, or it has another width.
    pub fn embed(&mut self, width: usize, scale: f32) -> Result<BufferId> {
        let rows = self.tensors.rows(EMBEDDING);
        let table = self.tensors.take(EMBEDDING, rows, width)?;
        let table = self.graph.table(table);
        self.graph.embed(table, scale)
    }

    /// RMSNorm of whole rows by the vector `name.weight`.
    ///
    /// # Errors
    /// As [`Assembler::vector`].
    pub fn rms_norm(&mut self, x: BufferId, name: &str, epsilon: f32) -> Result<BufferId> {
        let weight = self.vector(&format!("{name}.weight"), self.graph.width(x))?;
        self.graph.rms_norm(x, weight, epsilon)
    }

    /// RMSNorm of each `group` elements of a row by the vector `name.weight`, which all groups share.
    ///
    /// # Errors
    /// As [`Assembler::vector`]; rows are no whole number of groups.
    pub fn rms_norm_groups(
        &mut self,
        x: BufferId,
        name: &str,
        group: usize,
        epsilon: f32,
    ) -> Result<BufferId> {
        let weight = Some(self.vector(&format!("{name}.weight"), group)?);
        let kind = NormKind::Rms;
        self.graph.norm(x, Norm { kind, weight, bias: None, epsilon, group })
    }

    /// LayerNorm without bias of each `group` elements of a row by `name.weight`: as many numbers as a group has, or
    /// one for each element of a row.
    ///
    /// # Errors
    /// As [`Assembler::vector`]; rows are no whole number of groups.
    pub fn layer_norm_groups(
        &mut self,
        x: BufferId,
        name: &str,
        group: usize,
        epsilon: f32,
    ) -> Result<BufferId> {
        let full = self.full(&format!("{name}.weight"));
        let groups = self.tensors.rows(&full);
        let tensor = self.tensors.take(&full, groups, group)?;
        let (kind, weight) = (NormKind::Layer, Some(self.graph.vector(tensor)));
        self.graph.norm(x, Norm { kind, weight, bias: None, epsilon, group })
    }

    /// LayerNorm of whole rows by the vectors `name.weight` and `name.bias`.
    ///
    /// # Errors
    /// As [`Assembler::vector`].
    pub fn layer_norm(&mut self, x: BufferId, name: &str, epsilon: f32) -> Result<BufferId> {
        let group = self.graph.width(x);
        let weight = Some(self.vector(&format!("{name}.weight"), group)?);
        let bias = Some(self.vector(&format!("{name}.bias"), group)?);
        self.graph.norm(x, Norm { kind: NormKind::Layer, weight, bias, epsilon, group })
    }

    /// Products of `x` with matrices, each by its name and number of outputs.
    ///
    /// # Errors
    /// As [`Assembler::matrix`].
    pub fn linear<const N: usize>(
        &mut self,
        x: BufferId,
        matrices: [(&str, usize); N],
    ) -> Result<[BufferId; N]> {
        let cols = self.graph.width(x);
        let mut weights = [WeightId(0); N];
        for (weight, (name, rows)) in weights.iter_mut().zip(matrices) {
            *weight = self.matrix(name, rows, cols)?;
        }
        self.graph.linear(x, weights)
    }

    /// Adds the product of `x` with a matrix to `out`.
    ///
    /// # Errors
    /// As [`Assembler::matrix`].
    pub fn linear_add(&mut self, x: BufferId, name: &str, out: BufferId) -> Result<()> {
        let (rows, cols) = (self.graph.width(out), self.graph.width(x));
        let weight = self.matrix(name, rows, cols)?;
        self.graph.linear_add(x, weight, out)
    }

    /// Adds the RMSNorm, by `norm.weight`, of the product of `x` with a matrix to `out`.
    ///
    /// # Errors
    /// As [`Assembler::matrix`].
    pub fn linear_add_normed(
        &mut self,
        x: BufferId,
        name: &str,
        norm: &str,
        epsilon: f32,
        out: BufferId,
    ) -> Result<()> {
        let [made] = self.linear(x, [(name, self.graph.width(out))])?;
        let normed = self.rms_norm(made, norm, epsilon)?;
        self.graph.add(out, normed, 1.0)
    }

    /// Rotations.
    pub fn rotary(&mut self, table: RotaryTable) -> RotaryId {
        self.graph.rotary(table)
    }

    /// Rotates queries and keys, stores keys and values in `layer`, and attends.
    ///
    /// # Errors
    /// As [`Builder::rope_append_kv`] and [`Builder::attend`].
    pub fn attend(
        &mut self,
        qkv: [BufferId; 3],
        rotary: Option<RotaryId>,
        layer: usize,
        attention: Attention,
    ) -> Result<BufferId> {
        self.graph.rope_append_kv(qkv, rotary, layer)?;
        self.graph.attend(qkv[0], layer, attention)
    }

    /// Products of `x` with parts of one matrix, `name.weight`: the first so many outputs, the next, and so on.
    ///
    /// # Errors
    /// As [`Assembler::matrix`].
    pub fn linear_parts<const N: usize>(
        &mut self,
        x: BufferId,
        name: &str,
        outputs: [usize; N],
    ) -> Result<[BufferId; N]> {
        let (rows, cols) = (outputs.iter().sum(), self.graph.width(x));
        let tensor = self.tensor(&format!("{name}.weight"), rows, cols)?;
        let bias = self.tensors.find(&self.full(&format!("{name}.bias")), 1, rows)?;
        let mut weights = [WeightId(0); N];
        let mut first = 0;
        for (weight, rows) in weights.iter_mut().zip(outputs) {
            let part = first..first + rows;
            let bias = bias.as_ref().map(|bias| bias.elements(part.clone())).transpose()?;
            *weight = self.graph.matrix(tensor.slice(part.clone())?, bias)?;
            first = part.end;
        }
        self.graph.linear(x, weights)
    }

    /// Adds the product of `x` with a matrix, times `scale`, to `out`.
    ///
    /// # Errors
    /// As [`Assembler::matrix`].
    pub fn project_add(
        &mut self,
        x: BufferId,
        name: &str,
        out: BufferId,
        scale: f32,
    ) -> Result<()> {
        if scale == 1.0 {
            return self.linear_add(x, name, out);
        }
        let width = self.graph.width(out);
        let [made] = self.linear(x, [(name, width)])?;
        self.graph.add(out, made, scale)
    }

    /// Adds learned positions, rows of the tensor called `name`, of which there are `positions`.
    ///
    /// # Errors
    /// As [`Tensors::take`].
    pub fn add_positions(&mut self, name: &str, positions: usize, x: BufferId) -> Result<()> {
        let table = self.tensor(name, positions, self.graph.width(x))?;
        let table = self.graph.table(table);
        self.graph.limit_positions(positions);
        self.graph.add_positions(table, x)
    }

    /// The inside of a feed-forward part, by the matrix `ffn_up`.
    ///
    /// # Errors
    /// As [`Assembler::matrix`].
    pub fn activated(
        &mut self,
        x: BufferId,
        ffn_width: usize,
        activation: Activation,
    ) -> Result<BufferId> {
        let [up] = self.linear(x, [("ffn_up", ffn_width)])?;
        self.graph.activate(activation, up);
        Ok(up)
    }

    /// The inside of a gated feed-forward part, by the matrices `ffn_gate` and `ffn_up`.
    ///
    /// # Errors
    /// As [`Assembler::matrix`].
    pub fn gated(
        &mut self,
        x: BufferId,
        ffn_width: usize,
        activation: Activation,
    ) -> Result<BufferId> {
        let [gate, up] = self.linear(x, [("ffn_gate", ffn_width), ("ffn_up", ffn_width)])?;
        self.graph.gate(Gating::Activated(activation), gate, up)?;
        Ok(gate)
    }

    /// A mixture of experts: the router `ffn_gate_inp`, and the matrices `ffn_gate_exps`, `ffn_up_exps` and
    /// `ffn_down_exps` with one expert behind another, each with a bias if the file has it.
    ///
    /// # Errors
    /// As [`Assembler::matrix`].
    pub fn experts(
        &mut self,
        x: BufferId,
        mixture: Mixture,
        routing: Routing,
        gating: Gating,
    ) -> Result<BufferId> {
        let Mixture { count, used, ffn_width } = mixture;
        let width = self.graph.width(x);
        let [router] = self.linear(x, [("ffn_gate_inp", count)])?;
        let gates = self.expert_matrices("ffn_gate_exps", count, ffn_width, width)?;
        let ups = self.expert_matrices("ffn_up_exps", count, ffn_width, width)?;
        let downs = self.expert_matrices("ffn_down_exps", count, width, ffn_width)?;
        let matrices = gates.into_iter().zip(ups).zip(downs);
        let experts = matrices.map(|((gate, up), down)| Expert { gate, up, down }).collect();
        let experts = Experts { experts, used, routing, gating, scale: 1.0 };
        self.graph.experts(x, router, experts)
    }

    /// The matrices of all experts, one behind another in `name.weight`.
    fn expert_matrices(
        &mut self,
        name: &str,
        count: usize,
        rows: usize,
        cols: usize,
    ) -> Result<Vec<WeightId>> {
        let tensor = self.tensor(&format!("{name}.weight"), count * rows, cols)?;
        let biases = self.tensors.find(&self.full(&format!("{name}.bias")), count, rows)?;
        let matrix = |i: usize| {
            let bias = biases.as_ref().map(|biases| biases.slice(i..i + 1)).transpose()?;
            self.graph.matrix(tensor.slice(i * rows..(i + 1) * rows)?, bias)
        };
        (0..count).map(matrix).collect()
    }

    /// An expert that all rows use, weighed by the sigmoid of `ffn_gate_inp_shexp` (Qwen2).
    ///
    /// # Errors
    /// As [`Assembler::matrix`].
    pub fn shared_expert(&mut self, x: BufferId, gating: Gating) -> Result<BufferId> {
        let width = self.graph.width(x);
        let ffn_width = self.tensors.rows(&self.full("ffn_gate_shexp.weight"));
        let [router] = self.linear(x, [("ffn_gate_inp_shexp", 1)])?;
        let expert = Expert {
            gate: self.matrix("ffn_gate_shexp", ffn_width, width)?,
            up: self.matrix("ffn_up_shexp", ffn_width, width)?,
            down: self.matrix("ffn_down_shexp", width, ffn_width)?,
        };
        let routing = Routing::Sigmoid;
        let experts = Experts { experts: vec![expert], used: 1, routing, gating, scale: 1.0 };
        self.graph.experts(x, router, experts)
    }

    /// Logits of hidden rows: by `output.weight`, or by the embedding where the file has no such tensor.
    ///
    /// # Errors
    /// The matrix has another shape than the embedding.
    pub fn logits(&mut self, x: BufferId) -> Result<BufferId> {
        let (rows, cols) = (self.tensors.rows(EMBEDDING), self.graph.width(x));
        let output = match self.tensors.find("output.weight", rows, cols)? {
            Some(output) => output,
            None => self.tensors.take(EMBEDDING, rows, cols)?,
        };
        let bias = self.tensors.find("output.bias", 1, rows)?;
        let output = self.graph.matrix(output, bias)?;
        Ok(self.graph.linear(x, [output])?[0])
    }

    /// The program, if every tensor of the file has a part in it.
    ///
    /// # Errors
    /// As [`Tensors::finish`] and [`Builder::finish`].
    pub fn finish(self, logits: BufferId) -> Result<Program> {
        self.tensors.finish()?;
        self.graph.finish(logits)
    }
}
