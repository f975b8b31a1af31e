"""What a training step costs: matrix-multiplication FLOPs and memory."""

import copy
import math
import resource
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from localgpt_core.common.modes import exact_derivatives
from localgpt_core.matrices.kmeans import ROUNDS
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.parallel.parts import WHOLE, Split

__all__ = [
    "alignment_flops",
    "alignment_in_forward_passes",
    "codebook_fit_flops",
    "flop_counter",
    "forward_flops",
    "peak_memory_mib",
    "peak_step_bytes",
    "reset_peak_memory",
    "step_bytes",
    "step_flops",
]

# Linux's account of this process, and where it is told to forget the largest resident size so far.
STATUS, RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Return those of scores and mixing, 2 products of (T, S) with D or of D with (T, S), from the shapes."""
    *lead, T, D = query
    return 2 * math.prod(lead) * T * key[-2] * (D + value[-1])


def _attention_backward_flops(grad: torch.Size, *shapes: Any, **_: Any) -> int:
    """Return those of the 4 products in the derivative of the two: scores made again are no more of it."""
    return 2 * _attention_flops(*shapes[:3])


def flop_counter() -> FlopCounterMode:
    """Return a counter of the FLOPs of matrix products, those of torch's attention on the CPU too."""
    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    return FlopCounterMode(display=False, custom_mapping=known)


def step_flops(
    model: LocalGPT, idx: Tensor, targets: Tensor, anchor: bool = False, split: Split = WHOLE
) -> int:
    """Return the matmul FLOPs of one training step: alignment of the feedback, forward and backward pass.

    Counted by ``torch.utils.flop_counter`` (a multiply-add is 2 FLOPs) on a copy: ``model`` is untouched.
    ``anchor`` counts a step of backpropagation instead of one of the model's rule. All parts of ``split`` are
    counted, which this process computes one after the other.
    """
    model, split = copy.deepcopy(model), split.one_after_the_other()
    with flop_counter() as counter:
        model.align_feedback("flops", idx=idx, split=split)
        with exact_derivatives(model) if anchor else nullcontext():
            for part in split.parts(len(idx)):
                model(idx[part.rows], targets[part.rows])[1].backward()
    return counter.get_total_flops()


def alignment_flops(model: LocalGPT, idx: Tensor, split: Split = WHOLE) -> int:
    """Return the matmul FLOPs of one update of the feedback, counted as `step_flops` does."""
    model, split = copy.deepcopy(model), split.one_after_the_other()
    with flop_counter() as counter:
        model.align_feedback("flops", idx=idx, split=split)
    return counter.get_total_flops()


def alignment_in_forward_passes(model: LocalGPT, idx: Tensor) -> float:
    """Return what one update of the feedback costs, in matmul FLOPs of a forward pass on the same tokens."""
    return alignment_flops(model, idx) / forward_flops(model, idx)


def codebook_fit_flops(model: LocalGPT, idx: Tensor, batches: int, split: Split = WHOLE) -> int:
    """Return the matmul FLOPs of a fit of all codebooks to ``batches`` batches of the shape of ``idx``.

    That is a forward pass without quantisation, and the cosines of every token with every code in each round
    of k-means, which are not counted but computed.
    """
    model = copy.deepcopy(model)
    model.quantise(False)
    sizes = sum(codebook.codebook.numel() for codebook in model.codebooks())
    return batches * (forward_flops(model, idx, split) + ROUNDS * 2 * idx.numel() * sizes)


def forward_flops(model: LocalGPT, idx: Tensor, split: Split = WHOLE) -> int:
    """Return the matmul FLOPs of one forward pass, counted over all parts of ``split``."""
    with flop_counter() as counter, torch.no_grad():
        for part in split.one_after_the_other().parts(len(idx)):
            model(idx[part.rows])
    return counter.get_total_flops()


class _LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation returns from its birth to its release."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            self._follow(leaf, counted=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._follow(leaf, counted=True)
        return result

    def _follow(self, leaf: Any, counted: bool) -> None:
        """Note a storage when it is first seen; as an argument it existed before and does not count."""
        if not isinstance(leaf, Tensor):
            return
        storage = leaf.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def peak_step_bytes(step: Callable[[], object]) -> int:
    """Return the most bytes that tensors made during ``step()`` occupy at one time, on any device.

    What existed before (parameters, optimiser state) does not count, nor does what a kernel uses inside.
    """
    with _LiveBytes() as tracker:
        step()
    return tracker.peak


def step_bytes(model: LocalGPT, idx: Tensor, targets: Tensor) -> int:
    """Return the most bytes that the tensors of one forward and backward pass occupy at one time.

    Counted on a copy: ``model`` is untouched. Parameters, feedback and the optimiser's state do not count.
    """
    model = copy.deepcopy(model)
    return peak_step_bytes(lambda: model(idx, targets)[1].backward())


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mib` return the peak from now on, which what is in use now counts towards.

    On the CPU only Linux can do that; elsewhere the peak stays that of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # another system, or a sandbox without it
        RESET_PEAK.write_text("5")


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory in MiB since `reset_peak_memory`: allocated on a GPU, else resident.

    Resident in this process are the interpreter and its libraries too.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
