r"""What a stage of a pipeline sends: bits per token and boundary, if every block were a machine of its own.

Numbers take 16 bits, unless told. Forward, the cheapest description of the stream behind block l:

    nothing narrows it      16 C
    k-WTA                   16 k + log2 binom(C, k)         the values and which they are
    frozen codebook         G (log2 K + 16)                 codes and norms of G groups
      of one fixed norm     G log2 K                        codes
    rounding to b bits      b C + 16                        numbers and their scale
    frozen subspace         16 r                            coordinates
    constrained subspace    16 r + log2 V                   coordinates, and the token for its embedding

Backward, the error of the stream: as many numbers as can arrive at what lies below. A masked or projected
gradient has k or r of them, as places and subspace are known above too. Under the constraint the blocks below
need r, but trained embeddings all C, unless they learn in the subspace. At codes and rounded numbers it is
all C: what a codebook's backward pass takes out of the gradient lies along the stream as it was before, which
only the stage below knows. Direct feedback between (sub)layers sends nothing back; the output's error, 16 V,
goes to all stages at once. Where every point has the matrix of the head, the last stage can multiply by it,
and 16 min(C, V) go.

A rule that follows the network's Jacobian also sends tangents forward. Each has as many numbers as an error
that goes back: the same places and subspaces hold for it. Of codes it needs fewer, which is not counted.
"""

import math
from dataclasses import dataclass

from localgpt_core.common.validation import require_integer
from localgpt_core.config import LocalGPTConfig
from localgpt_core.rules import RULES

__all__ = ["StageMessage", "stage_message"]

BITS = 16


@dataclass(frozen=True)
class StageMessage:
    """Bits per token: forward and backward over one boundary, and broadcast from the output to all stages.

    ``tangent`` is what a tangent adds to ``forward``; 0 for a rule that sends none.
    """

    forward: int
    backward: int
    broadcast: int
    tangent: int = 0


def stage_message(config: LocalGPTConfig, block: int, bits: int = BITS) -> StageMessage:
    """Return what crosses the boundary behind ``block``, counted from 0, if a number takes ``bits`` bits.

    Raises:
        ValueError: If there is no such block, or a number has no bits.
    """
    require_integer("block", block, 0, config.n_layer - 1)
    require_integer("bits", bits, 1)
    narrow = config.has_bottleneck(block)
    constrained = config.subspace_mode == "constrain"
    C, V = config.n_embd, config.vocab_size
    k = config.resid_topk if narrow else 0
    r = config.subspace_rank if narrow else 0
    forward, numbers = [bits * C], [C]
    if k:
        forward.append(bits * k + math.ceil(math.log2(math.comb(C, k))))
        numbers.append(k)
    if narrow and config.vq_codes:
        norms = config.vq_groups if config.vq_rms == "token" else 0
        forward.append(math.ceil(config.vq_groups * math.log2(config.vq_codes)) + bits * norms)
    if narrow and config.resid_bits:
        forward.append(config.resid_bits * C + bits)
    if r:
        forward.append(bits * r + (math.ceil(math.log2(V)) if constrained else 0))
        if not constrained or config.freeze_emb or config.subspace_embeddings == "constrain":
            numbers.append(r)
    direct = RULES[config.method].error == "output"
    cut = direct and config.dfa_granularity != "layer"
    sent = min(C, V) if config.dfa_source == "head" else V
    follows = RULES[config.method](config.rule).aligns == "network"
    return StageMessage(
        forward=min(forward),
        backward=0 if cut else bits * min(numbers),
        broadcast=bits * sent if direct else 0,
        tangent=bits * min(numbers) if follows else 0,
    )
