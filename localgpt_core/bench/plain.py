"""The GPT that everybody writes with torch: fused q, k, v, torch's attention, a tied head.

It has the sizes of a `LocalGPT` and nothing of this package in it. Its step is that of nanoGPT's model.
"""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.config import LocalGPTConfig
from localgpt_core.parallel.parts import WHOLE, Split

__all__ = ["PlainGPT"]


class PlainBlock(nn.Module):
    """Causal attention and an MLP, each behind a LayerNorm."""

    def __init__(self, config: LocalGPTConfig) -> None:
        super().__init__()
        width, self.n_head, self.dropout = config.n_embd, config.n_head, config.dropout
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, config.bias)
        self.o_proj = nn.Linear(width, width, config.bias)
        self.fc = nn.Linear(width, 4 * width, config.bias)
        self.proj = nn.Linear(4 * width, width, config.bias)

    def attention(self, x: Tensor) -> Tensor:
        """Return the mixed values (B, T, C)."""
        q, k, v = (
            y.view(*x.shape[:2], self.n_head, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1)
        )
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return functional.dropout(self.o_proj(y.transpose(1, 2).reshape(x.shape)), dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after the block (B, T, C)."""
        x = x + self.attention(self.ln1(x))
        hidden = functional.gelu(self.fc(self.ln2(x)))
        return x + functional.dropout(self.proj(hidden), self.dropout, self.training)


class PlainGPT(nn.Module):
    """A GPT of torch's own layers, trained by autograd; it has no rule and no feedback."""

    def __init__(self, config: LocalGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd)
        self.pos_emb = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.head.weight = self.tok_emb.weight
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits (B, T, V) and, with targets, the mean cross-entropy in nats per token."""
        x = self.tok_emb(idx) + self.pos_emb.weight[: idx.shape[1]]
        x = functional.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, functional.cross_entropy(logits.flatten(0, -2), targets.flatten())

    def align_feedback(self, *key: int | str, idx: Tensor | None = None, split: Split = WHOLE) -> None:
        """Move no feedback: there is none."""

    def mirrored(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield nothing: no feedback takes the steps of a weight."""
        return iter(())
