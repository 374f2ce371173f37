"""A Llama-architecture language model, in the layout GGUF's `llama` has: RMSNorm, SwiGLU,
RoPE on interleaved pairs (x[2i], x[2i+1]), no biases, output tied to the embedding."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Config:
    width: int
    layers: int
    heads: int
    ffn: int
    vocab: int = 2048
    context: int = 512
    rope_base: float = 10000.0
    eps: float = 1e-5
    dropout: float = 0.0


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def rope_table(head, context, base):
    angle = torch.outer(torch.arange(context).double(),
                        base ** (-torch.arange(0, head, 2).double() / head))
    return angle.cos().float(), angle.sin().float()


def rotate(x, cos, sin):
    """x: (batch, heads, time, head); pair i is (x[2i], x[2i+1])."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class LockedDropout(nn.Module):
    """Dropout whose mask is the same at every position of a row: as good, and far cheaper to draw."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.p)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.drop = c.heads, LockedDropout(c.dropout)
        self.attn_norm, self.ffn_norm = RMSNorm(c.width, c.eps), RMSNorm(c.width, c.eps)
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.attn_q, self.attn_k = linear(c.width, c.width), linear(c.width, c.width)
        self.attn_v, self.attn_output = linear(c.width, c.width), linear(c.width, c.width)
        self.ffn_gate, self.ffn_up = linear(c.width, c.ffn), linear(c.width, c.ffn)
        self.ffn_down = linear(c.ffn, c.width)

    def forward(self, x, cos, sin):
        h = self.attn_norm(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for f in (self.attn_q, self.attn_k, self.attn_v))
        a = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.drop(self.attn_output(a.transpose(1, 2).flatten(2)))
        h = self.ffn_norm(x)
        return x + self.drop(self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h)))


class Llama(nn.Module):
    """Parameter names are GGUF's tensor names (token_embd.weight, blk.0.attn_q.weight, ...)."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.token_embd = nn.Embedding(c.vocab, c.width)
        self.drop = LockedDropout(c.dropout)
        self.blk = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.output_norm = RMSNorm(c.width, c.eps)
        cos, sin = rope_table(c.width // c.heads, c.context, c.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * c.layers) ** 0.5 if into_residual else 0.02)

    def forward(self, ids):
        x = self.drop(self.token_embd(ids))
        if torch.is_autocast_enabled(ids.device.type):
            x = x.bfloat16()
        cos, sin = self.cos[:ids.shape[1]], self.sin[:ids.shape[1]]
        for block in self.blk:
            x = block(x, cos, sin)
        return F.linear(self.output_norm(x), self.token_embd.weight)

    def compile_layers(self):
        """One by one: they are alike, so that one is compiled and all use it."""
        for block in self.blk:
            block.compile()

    def parameter_count(self):
        return sum(p.numel() for p in self.parameters())
