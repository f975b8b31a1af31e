"""The parts of the GPT: causal attention, the MLP, and the block with its bottlenecks.

Each operation with a derivative of its own is a module, chosen when the model is built.

Dimensions in names: B batch, T queries, S keys, H heads, D head width, C width of the residual stream.
Scores are scaled by D^-0.5 and causal. Softmax attention normalises over the keys; sigmoid attention
(Ramapuram et al. 2024) is elementwise, sigmoid(score + b), masked entries exactly 0, b = -log(block_size)
unless chosen otherwise.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.bottlenecks import FrozenSubspace, TopK, UniformRounding, VQResidualDir
from localgpt_core.common.modes import MaybeExact, as_autocast, in_forward_mode, recording
from localgpt_core.config import LocalGPTConfig
from localgpt_core.layers.feedback_points import FeedbackPoint, ReadingPoint
from localgpt_core.layers.linear import LocalLinear
from localgpt_core.layers.norms import FixedNorm, LayerNormProjectedSurrogate, LayerNormSTE
from localgpt_core.layers.shared_input import outputs_of
from localgpt_core.layers.surrogates import (
    FusedValueMix,
    SigmoidValueMixFn,
    SurrogateGELU,
    SurrogateSigmoid,
    masked,
    scored,
    unseen,
)
from localgpt_core.parallel.parts import DropsOut

__all__ = ["INIT_STD", "Block", "Cache", "layer_norm"]

Cache = dict[str, Tensor]

INIT_STD = 0.02  # of weights and embeddings
STREAM_RMS = math.sqrt(2) * INIT_STD  # a token's and a position's embedding, added


def local_linear(
    config: LocalGPTConfig, in_features: int, out_features: int, dtype: torch.dtype | None
) -> LocalLinear:
    """Return a layer of the body: its output error, where the rule wants it, is that of the logits."""
    others = {"error_features": config.vocab_size, "dtype": dtype}
    return LocalLinear(in_features, out_features, config.bias, config.inside_rule, **others)


def feedback_point(config: LocalGPTConfig, dtype: torch.dtype | None) -> FeedbackPoint:
    """Return a place in the residual stream where the output's error comes in."""
    kind = ReadingPoint if config.dfa_source == "head" else FeedbackPoint
    point = kind(config.n_embd, config.vocab_size, config.rule, config.dfa_norm).to(dtype=dtype)
    point.register_load_state_dict_post_hook(_leave_meta)
    return point


def layer_norm(config: LocalGPTConfig, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the norm that ``config.ln_mode`` asks for."""
    if config.ln_mode == "bp":
        return nn.LayerNorm(config.n_embd, eps=1e-5, dtype=dtype)
    if config.ln_mode == "ste":
        return LayerNormSTE(config.n_embd, dtype)
    if config.ln_mode == "none":
        return FixedNorm(config.n_embd, STREAM_RMS, dtype)
    return LayerNormProjectedSurrogate(config.n_embd, config.ln_mode, dtype)


def _leave_meta(module: nn.Module, incompatible_keys: object) -> None:
    """Bring the buffers that no state_dict has from the meta device to where the module's weights are now."""
    devices = [t.device for t in (*module.parameters(), *module.buffers()) if not t.is_meta]
    unsaved = [module._buffers[name] for name in module._non_persistent_buffers_set]

    def leave(tensor: Tensor) -> Tensor:
        mine = tensor.is_meta and any(tensor is buffer for buffer in unsaved)
        return torch.empty_like(tensor, device=devices[0]) if mine else tensor

    if devices and any(buffer.is_meta for buffer in unsaved):
        module._apply(leave, recurse=False)


class Attention(DropsOut, nn.Module):
    """Causal multi-head attention; `mix` is what its kinds differ in."""

    def __init__(self, config: LocalGPTConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, local_linear(config, config.n_embd, config.n_embd, dtype))

    def forward(self, x: Tensor, taps: list[Tensor], cache: Cache | None = None) -> Tensor:
        """Return the mixed values (B, T, C); ``cache`` holds the keys and values of earlier positions."""
        B, T, C = x.shape

        def heads(y_BTC: Tensor) -> Tensor:
            return y_BTC.view(B, T, self.config.n_head, C // self.config.n_head).transpose(1, 2)

        layers = (self.q_proj, self.k_proj, self.v_proj)
        q_BHTD, k_BHSD, v_BHSD = (heads(y_BTC) for y_BTC in outputs_of(layers, x, taps))
        if cache is not None:
            if cache:
                k_BHSD = torch.cat((cache["k"], k_BHSD), dim=2)
                v_BHSD = torch.cat((cache["v"], v_BHSD), dim=2)
            cache["k"], cache["v"] = k_BHSD, v_BHSD
        y_BTC = self.mix(q_BHTD, k_BHSD, v_BHSD).transpose(1, 2).reshape(B, T, C)
        return self.dropout(self.o_proj(y_BTC, taps))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, future: Tensor | None = None) -> Tensor:
        """Return the values mixed by attention, (B, H, T, D).

        ``future`` (T, S) is True where a query does not see a key; for None the mask is causal, the queries
        being the last T of S positions. The causal mask is not kept as a tensor, which somebody could change:
        a GPU's kernels are told that it is causal, and would not see the change.
        """
        raise NotImplementedError(f"{type(self).__name__} must mix its values")

    def mixed(self, weights: Tensor, v: Tensor) -> Tensor:
        """Return the values mixed by ``weights`` (B, H, T, S), some of which drop out in training."""
        return self.dropout(weights).to(v.dtype) @ v


class SoftmaxAttention(Attention, MaybeExact):
    """Weights are the softmax of the scores over the keys, by torch's own attention where that will do.

    It has first derivatives in reverse mode only: all of them are there with `exact_derivatives`.
    """

    def __init__(self, config: LocalGPTConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__(config, dtype)
        self.fused = FusedValueMix() if config.fuse_attn_local else None

    def mix(self, q: Tensor, k: Tensor, v: Tensor, future: Tensor | None = None) -> Tensor:
        """Return the values mixed by attention; fused, without dropout of the weights."""
        dropout = self.config.dropout if self.training else 0.0
        # On the CPU the one that drops out is no faster, and draws other masks; a GPU's has none for a part.
        own_mask = dropout > 0 and (q.device.type == "cpu" or self.part is not None)
        torchs = self.fused is None and not self.exact and not own_mask
        if torchs and not (recording() or in_forward_mode(q, k, v)):
            # A GPU's kernels are much faster without a mask. Their causal one is for as many keys as queries.
            causal = future is None and q.shape == k.shape and q.device.type != "cpu"
            mask = None if causal else ~unseen(q, k, future)
            return functional.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        scores = scored(q, k, masked(q, k, 0.0, future))
        if self.fused is not None:
            # A copy as of the others, where these are copied: a view of all three would keep all three.
            return self.fused(scores, v.flatten(0, -3).view(v.shape))
        return self.mixed(torch.softmax(scores, dim=-1), v)


class SigmoidAttention(Attention):
    """Weights are the sigmoid of each score by itself."""

    def __init__(self, config: LocalGPTConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__(config, dtype)
        start = 0.0 if config.sigmoid_bias_mode == "zero" else -math.log(config.block_size)
        learned = config.sigmoid_bias_mode == "learned"
        self.sig_bias = nn.Parameter(torch.tensor(start, dtype=dtype)) if learned else start
        self.sigmoid = SurrogateSigmoid() if config.ste_sigmoid else nn.Sigmoid()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, future: Tensor | None = None) -> Tensor:
        """Return the values mixed by attention."""
        drops = self.training and self.config.dropout > 0
        if not (self.config.ste_sigmoid or drops or recording() or in_forward_mode(q, k, v)):
            q_NTD, k_NSD, v_NSD = as_autocast(*(y.flatten(0, -3) for y in (q, k, v)))
            y_NTD = SigmoidValueMixFn.apply(q_NTD, k_NSD, v_NSD, self.sig_bias, future)
            return y_NTD.view(*q.shape[:-1], v.shape[-1])
        if not self.config.ste_sigmoid:
            return self.mixed(torch.sigmoid(scored(q, k, masked(q, k, self.sig_bias, future))), v)
        shift = q.new_zeros(q.shape[-2], k.shape[-2]) + self.sig_bias
        # Masked after the sigmoid: the straight-through gradient must not reach masked scores either.
        return self.mixed(self.sigmoid(scored(q, k, shift)).masked_fill(unseen(q, k, future), 0.0), v)


ATTENTIONS = {"softmax": SoftmaxAttention, "sigmoid": SigmoidAttention}


class MLP(DropsOut, nn.Module):
    """Two linear layers with an exact GELU, and k winners among the hidden units where asked for."""

    def __init__(self, config: LocalGPTConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.fc = local_linear(config, config.n_embd, 4 * config.n_embd, dtype)
        self.activation = SurrogateGELU(config.gelu_surrogate) if config.ste_gelu else nn.GELU()
        self.winners = TopK(config.mlp_topk) if config.mlp_topk else nn.Identity()
        self.proj = local_linear(config, 4 * config.n_embd, config.n_embd, dtype)

    def forward(self, x: Tensor, taps: list[Tensor]) -> Tensor:
        """Return the transformed tokens (B, T, C)."""
        hidden = self.winners(self.activation(self.fc(x, taps)))
        return self.dropout(self.proj(hidden, taps))


class Block(nn.Module):
    """One pre-norm block and the bottlenecks at its end; ``index`` counts the blocks from 0."""

    def __init__(self, config: LocalGPTConfig, index: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.ln1 = layer_norm(config, dtype)
        self.attn = ATTENTIONS[config.attn_mode](config, dtype)
        self.ln2 = layer_norm(config, dtype)
        self.mlp = MLP(config, dtype)
        if config.gated_blocks:
            start = float(config.gate_start)
            self.alpha_attn = nn.Parameter(torch.full((1,), start, dtype=dtype))
            self.alpha_mlp = nn.Parameter(torch.full((1,), start, dtype=dtype))
        narrow = config.has_bottleneck(index)
        if config.resid_topk and narrow:
            self.winners = TopK(config.resid_topk)
        self.constrains = config.subspace_mode == "constrain" and narrow
        if config.vq_codes and narrow:
            seed = None if config.vq_shared else index
            options = {"groups": config.vq_groups, "rms": config.vq_rms, "backward": config.vq_backward}
            self.vq = VQResidualDir(config.n_embd, config.vq_codes, seed, dtype, **options)
        if config.subspace_rank and narrow:
            self.subspace = FrozenSubspace(config.n_embd, config.subspace_rank, dtype=dtype)
        if config.resid_bits and narrow:
            self.rounding = UniformRounding(config.resid_bits)
        if config.dfa_granularity == "sublayer":
            self.feedback_attn = feedback_point(config, dtype)
        if config.dfa_granularity != "layer":
            self.feedback = feedback_point(config, dtype)

    def bottlenecks(self) -> list[nn.Module]:
        """Return what narrows the stream at the block's end, in the order of the forward pass."""
        names = ("winners", "vq") if self.constrains else ("winners", "vq", "subspace", "rounding")
        return [self._modules[name] for name in names if name in self._modules]

    def forward(self, x: Tensor, taps: list[Tensor], cache: Cache | None = None) -> Tensor:
        """Return the residual stream after the block, (B, T, C)."""
        gated = self.config.gated_blocks
        y = self.written(self.attn(self.ln1(x), taps, cache))
        x = x + (self.alpha_attn * y if gated else y)
        if self.config.dfa_granularity == "sublayer":
            x = self.feedback_attn(x, taps)
        y = self.written(self.mlp(self.ln2(x), taps))
        x = x + (self.alpha_mlp * y if gated else y)
        for bottleneck in self.bottlenecks():
            x = bottleneck(x)
        if self.config.dfa_granularity != "layer":
            x = self.feedback(x, taps)
        return x

    def written(self, y: Tensor) -> Tensor:
        """Return what attention or MLP adds to the stream: in the subspace where it is constrained to it.

        y Q Q^T is what an output matrix Q Q^T W would write: the constraint on the matrix, without a second
        copy of it.
        """
        return self.subspace(y) if self.constrains else y
