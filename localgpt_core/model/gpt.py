r"""LocalGPT: nanoGPT's decoder in which every linear layer is a `LocalLinear`.

    x = dropout(tok_emb(idx) + pos_emb(0..T-1))                                           (B, T, C)
    for each block:   x = x + alpha_attn attn(ln1(x))
                      x = x + alpha_mlp  mlp(ln2(x))            (gates only with gated_blocks)
                      x = subspace(vq(topk(x))), or rounded     (each only where asked for)
    logits = head(ln_f(x))                                                                (B, T, V)

With ``subspace_mode="constrain"`` the projection acts on what attn and mlp write instead, so that the stream
is the embeddings plus a vector of the subspace. With ``subspace_embeddings="constrain"`` it acts on what the
embeddings have learnt, too: x = e_0 + (e - e_0) Q Q^T, where e_0 is what they started as, and no block has to
be told how they have changed.

Under a rule that uses the output's error, the layers leave taps in a list that goes through the forward pass
beside x; the model publishes the error into them at the head (`localgpt_core.layers.linear`). The head itself
gets its exact local gradient under every rule: its error is the loss's own derivative.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional

from localgpt_core.bottlenecks import VQResidualDir, quantised
from localgpt_core.common.modes import evaluation_mode, inputs_of
from localgpt_core.common.seeds import generator, normal_like
from localgpt_core.common.validation import require, require_choice
from localgpt_core.config import LocalGPTConfig
from localgpt_core.corpus.sequences import IGNORED
from localgpt_core.layers.between_steps import align, feedback_places, mirrored, publish_error
from localgpt_core.layers.feedback_points import ReadingPoint
from localgpt_core.layers.linear import LocalLinear
from localgpt_core.layers.norms import gain
from localgpt_core.model.blocks import INIT_STD, Block, Cache, layer_norm
from localgpt_core.model.next_token import WINDOWS, drawn, probabilities_of
from localgpt_core.parallel.parts import WHOLE, DropsOut, Split
from localgpt_core.rules.feedback import HoldsFeedback, feedback_drawn_later

__all__ = ["LocalGPT"]


class LocalGPT(DropsOut, nn.Module):
    """A character GPT whose linear layers learn by the rule of its configuration.

    Weights and feedback are drawn from PyTorch's global generator, in two independent streams: models built
    after the same ``torch.manual_seed`` start from the same weights whatever their rule and options.

    All numbers are drawn on the CPU: a seed means the same model on every device. On the meta device there
    are shapes only. ``load_state_dict(state, assign=True)`` brings the numbers, all of them; so does
    ``to_empty(device=...)`` followed by ``load_state_dict(state)``. ``to_empty`` alone leaves weights,
    feedback, codes and subspaces undefined, and there is no other way to draw them than to build anew.

    Args:
        config: Sizes, rule, local derivatives and bottlenecks.
        device: Where parameters and buffers live; torch's default where none is given.
        dtype: Their floating-point type; torch's default where none is given. Weights, codes and subspaces
            are drawn in it, in float32 where it is narrower: another type is another start.
    """

    def __init__(
        self,
        config: LocalGPTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        seed = int(torch.randint(2**62, (), device="cpu"))
        self.config = config
        with nullcontext() if device is None else torch.device(device), feedback_drawn_later():
            self.tok_emb = nn.Embedding(config.vocab_size, config.n_embd, dtype=dtype)
            self.pos_emb = nn.Embedding(config.block_size, config.n_embd, dtype=dtype)
            if config.subspace_embeddings == "constrain":
                self.register_buffer("tok_emb_start", torch.empty_like(self.tok_emb.weight))
                self.register_buffer("pos_emb_start", torch.empty_like(self.pos_emb.weight))
            self.blocks = nn.ModuleList(Block(config, index, dtype) for index in range(config.n_layer))
            self.ln_f = layer_norm(config, dtype)
            head = {"is_output": True, "dtype": dtype}
            self.head = LocalLinear(config.n_embd, config.vocab_size, False, config.head_rule, **head)
        self._init_weights(generator(seed, "weights"))
        feedback_seed = seed if config.feedback_seed is None else config.feedback_seed
        for index, place in enumerate(self.feedback_places()):
            place.place = index
            if isinstance(place, ReadingPoint):
                place.source = self.output_matrix
            place.reset_feedback(feedback_seed, "feedback", index)
        if config.subspace_embeddings == "constrain":
            self.tok_emb_start.copy_(self.tok_emb.weight.detach())
            self.pos_emb_start.copy_(self.pos_emb.weight.detach())
        if config.freeze_emb:
            self.tok_emb.requires_grad_(False)
            self.pos_emb.requires_grad_(False)

    @torch.no_grad()
    def _init_weights(self, source: torch.Generator) -> None:
        """Draw N(0, 0.02^2), and N(0, (0.02 / sqrt(2 L))^2) for what writes into the residual stream."""
        for name, module in self.named_modules():
            if isinstance(module, LocalLinear | nn.Embedding):
                into_residual = name.endswith(("o_proj", "mlp.proj"))
                std = INIT_STD / math.sqrt(2 * self.config.n_layer) if into_residual else INIT_STD
                module.weight.copy_(normal_like(module.weight, source, std))
            if isinstance(module, LocalLinear) and module.bias is not None:
                module.bias.zero_()

    def local_linears(self) -> Iterator[LocalLinear]:
        """Yield every linear layer, the head last."""
        return (module for module in self.modules() if isinstance(module, LocalLinear))

    def feedback_places(self) -> Iterator[HoldsFeedback]:
        """Yield every linear layer and every feedback point between blocks, the head last."""
        return feedback_places(self)

    def mirrored(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield each trained weight with the feedback that takes the same steps, where a rule has one."""
        return mirrored(self.feedback_places())

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits (B, T, V) and the mean cross-entropy in nats per token.

        ``idx`` and ``targets`` are (B, T) token ids; without targets the loss is None. The mean is over the
        targets that are not `IGNORED`; where one is, the loss has no derivative by the logits.

        Raises:
            ValueError: If T exceeds ``block_size``.
        """
        logits = self.logits(idx)
        if targets is None:
            return logits, None
        flat = logits.flatten(0, -2), targets.flatten()
        return logits, functional.cross_entropy(*flat, ignore_index=IGNORED)

    def logits(self, idx: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """Return the logits (B, T, V); with caches, ``idx`` continues what they hold."""
        start = caches[0]["k"].shape[2] if caches and caches[0] else 0
        end = start + idx.shape[1]
        allowed = f"must be at most block_size={self.config.block_size}"
        require(end <= self.config.block_size, "T", end, allowed)
        x = self.dropout(self.embedded(idx, start, end))
        taps: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(x, taps, None if caches is None else caches[i])
        return publish_error(self.head(self.ln_f(x), taps), taps)

    def embedded(self, idx: Tensor, start: int, end: int) -> Tensor:
        """Return the embeddings (B, T, C) of tokens at the positions from ``start`` up to ``end``."""
        x = self.tok_emb(idx) + self.pos_emb.weight[start:end]
        if self.config.subspace_embeddings == "free":
            return x
        first = functional.embedding(idx, self.tok_emb_start) + self.pos_emb_start[start:end]
        return first + self.blocks[0].subspace(x - first)

    def output_matrix(self) -> Tensor:
        """Return W diag(gain) (V x C), the head's weight times the last norm's gain."""
        return self.head.weight * gain(self.ln_f)

    def align_feedback(self, *key: int | str, idx: Tensor | None = None, split: Split = WHOLE) -> None:
        """Let every place's rule move its feedback, once per training step; draws depend on ``key`` only.

        ``idx`` (B, T) are tokens, cut by ``split``, for a rule that aligns to the network's Jacobian.

        Raises:
            ValueError: If such a rule gets none.
        """
        align(self.feedback_places(), *key, network=self, logits=self.logits, idx=idx, split=split)

    def codebooks(self) -> Iterator[VQResidualDir]:
        """Yield the frozen codebooks, block by block."""
        return (module for module in self.modules() if isinstance(module, VQResidualDir))

    def quantise(self, in_use: bool) -> None:
        """Switch the codebooks on or off."""
        for codebook in self.codebooks():
            codebook.in_use = in_use

    @torch.no_grad()
    def fit_codebooks(self, idx: Tensor, *key: int | str, split: Split = WHOLE) -> None:
        """Put the codes at the k-means centres of the stream's directions over the tokens ``idx`` (B, T).

        The stream is that of a forward pass without quantisation. A shared codebook is fitted to the streams
        of all blocks together. Draws depend on ``key`` only. The forward pass is cut by ``split``.

        Raises:
            ValueError: If there are fewer tokens than codes.
        """
        with quantised(self, False):
            streams = split.gathered(
                len(idx), lambda part: inputs_of(self, idx[part.rows], self.codebooks()), idx.device
            )
        if self.config.vq_shared and streams:
            first, *others = streams
            first.fit(torch.stack(list(streams.values())), generator(*key, device=idx.device))
            for codebook in others:
                codebook.codebook.copy_(first.codebook)
            return
        for i, (codebook, stream) in enumerate(streams.items()):
            codebook.fit(stream, generator(*key, i, device=idx.device))

    def num_params(self) -> int:
        """Return the number of parameters, embeddings included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def untrained_parameters(self) -> list[str]:
        """Return the names of the parameters that this configuration leaves at their start."""
        return [name for name, parameter in self.named_parameters() if not parameter.requires_grad]

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        window: str = "exact",
    ) -> Tensor:
        """Return ``idx`` (B, T) continued by ``max_new_tokens`` sampled tokens, (B, T + max_new_tokens).

        Runs in evaluation mode and restores the mode. ``temperature`` divides the logits: towards 0 the
        likeliest token is left, at infinity all are equally likely. ``top_k`` keeps only the likeliest
        tokens. ``generator`` is the source of the samples, or one for each row, whose draws are then those
        it has alone.

        Keys and values are cached while the context grows. What each token is drawn from, ``window`` says,
        with K = ``block_size``, where there are n > K tokens before it:

        - ``"exact"``: from the last K. Every position shifts with every token, so each costs the forward
          pass of K tokens.
        - ``"halves"``: from the last H + (n - K - 1) mod (K - H + 1), with H = ceil(K / 2): a full context
          is cut down to its later half and grows again. So it sees less, H to K tokens. K - H + 1 of them
          cost the forward pass of H tokens and K - H of one each: K / (K - H + 1) < 2 tokens per token.
          The length depends on n alone: a text may be continued in parts.

        Raises:
            ValueError: If the prompt is empty or an argument is out of range.
        """
        require(idx.ndim == 2 and idx.shape[1] > 0, "idx.shape", tuple(idx.shape), "must be (B, T), T > 0")
        require(max_new_tokens >= 0, "max_new_tokens", max_new_tokens, "must not be negative")
        require(temperature > 0, "temperature", temperature, "must be positive")
        if top_k is not None:
            require(isinstance(top_k, Integral), "top_k", top_k, "must be an integer")
            require(top_k >= 1, "top_k", top_k, "must be at least 1")
        if isinstance(generator, Sequence):
            allowed = f"generators for {idx.shape[0]} rows; one for each, or one for all"
            require(len(generator) == idx.shape[0], "generator", len(generator), allowed)
        require_choice("window", window, WINDOWS)
        prompt, end = idx.shape[1], idx.shape[1] + max_new_tokens
        text = torch.cat((idx, idx.new_empty(idx.shape[0], max_new_tokens)), dim=1).long()
        start, caches = -1, []
        with evaluation_mode(self):
            for n in range(prompt, end):
                first = n - WINDOWS[window](n, self.config.block_size)
                cached = n - 1 if first == start else first
                if first != start:
                    start, caches = first, [{} for _ in self.blocks]
                logits = self.logits(text[:, cached:n], caches)
                probabilities = probabilities_of(logits[:, -1], temperature, top_k)
                text[:, n] = drawn(probabilities, generator)
        return text
