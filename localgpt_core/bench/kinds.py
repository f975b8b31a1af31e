"""Which kind of work an operator of torch is, and where the time of a step goes by kind.

An operator's own time, without what it calls, counts to the kind of its name (`OPERATORS`). Inside some of
them, and inside ranges that the profile marks, all counts to one kind (`SCOPES`), the outermost of which
decides. A step of the backward pass belongs to the scope of the forward operation that asked for it, which
torch's sequence numbers tell. An operator that no table has is `OTHER`, and is named.

What is left of the step, in which no operator works, is `LAUNCHES`: Python, the autograd engine, and
operators that only look at memory in another way. On a GPU, where the operators' time is that of their
kernels, it is the time in which none runs.
"""

from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType

__all__ = ["KINDS", "OPERATORS", "RANGE", "SCOPES", "STEP", "spent"]

STEP = "localgpt: step"
RANGE = "localgpt: "  # and a kind: what the profile marks

PRODUCTS, ATTENTION, NORMS = "products", "attention", "norms"
ELEMENTWISE, LOOKUPS, LOSS = "elementwise, sums", "lookups", "loss"
BOTTLENECKS, COPIES, FEEDBACK = "bottlenecks", "copies, casts", "feedback"
OPTIMISER, OTHER, LAUNCHES = "optimiser", "other", "Python, launches"
KINDS = (
    *(PRODUCTS, ATTENTION, NORMS, ELEMENTWISE, LOOKUPS, LOSS),
    *(BOTTLENECKS, COPIES, FEEDBACK, OPTIMISER, OTHER, LAUNCHES),
)

SCOPES = {
    RANGE + FEEDBACK: FEEDBACK,
    RANGE + NORMS: NORMS,
    RANGE + OPTIMISER: OPTIMISER,
    "Optimizer.step#AdamW.step": OPTIMISER,  # torch marks these itself
    "Optimizer.zero_grad#AdamW.zero_grad": OPTIMISER,
    "aten::scaled_dot_product_attention": ATTENTION,
    "SigmoidSTE": ATTENTION,
    "SoftmaxValueMixLocalFn": ATTENTION,
    "GELUSTE": ELEMENTWISE,
    "GELUStepSurrogate": ELEMENTWISE,
    "HardTopK": BOTTLENECKS,
    "_NearestDirection": BOTTLENECKS,
    "_RoundedStraightThrough": BOTTLENECKS,
    "localgpt::keep": BOTTLENECKS,
    "localgpt::largest": BOTTLENECKS,
    "localgpt::winners": BOTTLENECKS,
    "aten::cross_entropy_loss": LOSS,
    "aten::embedding": LOOKUPS,
}

# Products of scores and of values are batched (bmm, baddbmm), and nothing else in a step of a GPT is.
# Copies that bring the heads together are copies. Masks are made in place.
_NAMES = {
    PRODUCTS: "addmm addmm_ addmv addmv_ dot linear matmul mm mv _scaled_mm",
    ATTENTION: """
        baddbmm baddbmm_ bmm masked_fill masked_fill_ sigmoid sigmoid_ sigmoid_backward softmax _softmax
        _softmax_backward_data _safe_softmax triu_""",
    NORMS: "layer_norm native_layer_norm native_layer_norm_backward",
    ELEMENTWISE: """
        abs add add_ all any bernoulli_ bitwise_not clamp clamp_ clamp_min div div_ dropout eq erf exp fill_
        full full_like ge gelu gelu_backward gt isneginf le linalg_vector_norm log logical_not lt max maximum
        mean min minimum mul mul_ native_dropout native_dropout_backward ne neg new_full new_ones new_zeros
        norm ones ones_like pow reciprocal rsqrt sign sqrt square std sub sub_ sum tanh tril triu var var_mean
        where zero_ zeros zeros_like""",
    LOOKUPS: """
        embedding_backward embedding_dense_backward gather index index_put_ _index_put_impl_ index_select
        scatter scatter_ scatter_add scatter_add_ take_along_dim""",
    LOSS: """
        log_softmax _log_softmax _log_softmax_backward_data nll_loss nll_loss_backward nll_loss_forward
        nll_loss_nd""",
    BOTTLENECKS: "argmax kthvalue sort topk",
    COPIES: "cat clone contiguous copy_ slice_backward stack to _to_copy",
    # No work but the call: another view of the same memory, memory that is not yet written, a question.
    LAUNCHES: """
        alias as_strided chunk detach detach_ empty empty_like empty_permuted empty_strided expand
        expand_as flatten is_nonzero is_same_size item lift_fresh _local_scalar_dense narrow new_empty
        new_empty_strided numpy_T permute promote_types real _reshape_alias reshape resize_ resolve_conj
        resolve_neg result_type scalar_tensor select set_ slice split split_with_sizes squeeze t transpose
        unbind unflatten _unsafe_view unsqueeze view view_as""",
}
OPERATORS = {f"aten::{name}": kind for kind, names in _NAMES.items() for name in names.split()}

ENGINE = "autograd::engine::evaluate_function: "
OF_AUTOGRAD = (ENGINE, "torch::autograd::")


def spent(events: Iterable[Any], on_device: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Return where the milliseconds of a step went, by kind, and those of unknown operators by name.

    Args:
        events: The events of a ``torch.profiler`` that has seen one step, in a range named `STEP`.
        on_device: Whether the operators' time is that of their kernels on a GPU.

    The kinds, all of `KINDS`, sum to the time of the step, on the clock of the CPU.

    Raises:
        ValueError: If there are several steps, or none.
    """
    events = [event for event in events if event.device_type == DeviceType.CPU]
    events.sort(key=lambda event: event.time_range.start)
    # The last forward operation of a number is the one that the backward pass has a node for.
    asked = {event.sequence_nr: event for event in events if event.sequence_nr >= 0 and not event.fwd_thread}

    def scope(event: Any) -> str | None:
        if event is None:
            return None
        of_backward = event.name.startswith(ENGINE)
        above = asked.get(event.sequence_nr) if of_backward else event.cpu_parent
        return scope(above) or SCOPES.get(event.name)

    (step,) = (event for event in events if event.name == STEP)
    kinds, unknown = dict.fromkeys(KINDS, 0.0), {}
    for event in events:
        if event is step or event.name.startswith("ProfilerStep"):
            continue
        time = _on_device(event) if on_device else event.self_cpu_time_total / 1000
        kind = scope(event) or OPERATORS.get(event.name) or _unlisted(event.name)
        kinds[kind] += time
        if kind == OTHER:
            unknown[event.name] = unknown.get(event.name, 0.0) + time
    kinds[LAUNCHES] = 0.0
    kinds[LAUNCHES] = step.cpu_time_total / 1000 - sum(kinds.values())
    return kinds, unknown


def _on_device(event: Any) -> float:
    """Return the milliseconds of the kernels that an event launched itself.

    A range appears on the device too, under its own name, for as long as all kernels inside take.
    """
    return sum(kernel.duration for kernel in event.kernels if kernel.name != event.name) / 1000


def _unlisted(name: str) -> str:
    """Return the kind of what no table has: autograd's own steps and Functions in Python are no operators."""
    return LAUNCHES if "::" not in name or name.startswith(OF_AUTOGRAD) else OTHER
