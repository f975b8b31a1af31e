r"""One training step and one evaluation, the same for every rule.

Optimiser: AdamW (Loshchilov and Hutter 2019), weight decay on matrices only, global gradient clipping; the
sizes and constants of the presets are nanoGPT's.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch._functorch import config as aot_settings

from localgpt_core.common.modes import evaluation_mode, exact_derivatives, set_for_a_while
from localgpt_core.common.seeds import seed_from
from localgpt_core.config import LocalGPTConfig, TrainConfig, check_run
from localgpt_core.config.schedule import is_anchor, is_skipped, learning_rate
from localgpt_core.corpus.batches import windows
from localgpt_core.corpus.sequences import IGNORED, Sequences
from localgpt_core.layers.between_steps import feedback_places, learned, mirror
from localgpt_core.model.gpt import LocalGPT
from localgpt_core.parallel.parts import WHOLE, DropsOut, Part, Split
from localgpt_core.parallel.processes import ALONE, Processes

__all__ = [
    "build_model",
    "build_optimizer",
    "compiled",
    "evaluate",
    "evaluation",
    "model_without_numbers",
    "precision",
    "trained_names",
    "training_step",
]

# Of a batch of an evaluation: so few that a CPU has in its caches what one operation leaves the next.
EVAL_TOKENS = {"cpu": 1024, "cuda": 16384}


def build_model(
    model_config: LocalGPTConfig, train_config: TrainConfig, device: torch.device | str = "cpu"
) -> LocalGPT:
    """Return the untrained model of a run: a function of the two configurations only.

    Neither torch's default dtype nor its default device is asked. All numbers are drawn in float32, with
    precision float64 too: the start is the same.

    Models of one seed start from the same weights whatever their rule. With ``freeze_body`` only the
    embeddings and the head are left to learn, with ``freeze_blocks`` all but the blocks that it lists. The
    feedback of what is frozen is aligned all the same, where the rule aligns it.

    Raises:
        ValueError: For what the two together do not allow, see `localgpt_core.config.check_run`.
    """
    check_run(model_config, train_config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(train_config.seed, "model"))
        model = LocalGPT(model_config, device="cpu", dtype=torch.float32)
    if train_config.precision == "float64":
        model.double()
    return _frozen(model, train_config).to(device)


def _frozen(model: LocalGPT, config: TrainConfig) -> LocalGPT:
    frozen = [model.blocks[number] for number in config.frozen_blocks]
    for part in [model.blocks, model.ln_f] if config.freeze_body else frozen:
        part.requires_grad_(False)
    return model


def model_without_numbers(model_config: LocalGPTConfig, train_config: TrainConfig) -> LocalGPT:
    """Return the model of a run on the meta device: names, shapes and types, whatever its size.

    Raises:
        ValueError: As `build_model`.
    """
    check_run(model_config, train_config)
    dtype = torch.float64 if train_config.precision == "float64" else torch.float32
    return _frozen(LocalGPT(model_config, device="meta", dtype=dtype), train_config)


def build_optimizer(model: LocalGPT, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters, with weight decay on matrices only.

    Feedback that takes the steps of a weight (Kolen-Pollack, direct or not) is there beside the weights.
    """
    decays = (config.weight_decay, 0.0)
    groups = [{"params": p, "weight_decay": w} for p, w in zip(trained_tensors(model), decays, strict=True)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def trained_tensors(model: LocalGPT) -> tuple[list[Tensor], list[Tensor]]:
    """Return the trained matrices, feedback that is trained after the weights, and the other parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2] + [feedback for _, feedback in model.mirrored()]
    matrices += learned(feedback_places(model))
    return matrices, [p for p in trained if p.ndim < 2]


def trained_names(model: LocalGPT) -> list[str]:
    """Return the names of `trained_tensors` in the order in which an optimiser counts them."""
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    return [names[id(tensor)] for group in trained_tensors(model) for tensor in group]


def compiled(model: LocalGPT, replayed: bool = True) -> nn.Module:
    """Return the compiled form of ``model``: one graph for each mode and shape, or an error.

    On a GPU each is recorded once and then replayed (a CUDA graph): a step of these sizes is hundreds of
    short kernels, which take longer to launch than to run. What it returns, and the gradients of its backward
    pass, are overwritten by the next call; ``replayed=False`` is for whoever adds up several.

    What is compiled several times, for other models or modes, is by torch's default left as it is from the
    ninth time on. So whoever compiles one model after another calls ``torch.compiler.reset()`` in between.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    mode = "reduce-overhead" if replayed and on_gpu else None
    return torch.compile(model, fullgraph=True, dynamic=False, mode=mode)


@contextmanager
def precision(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Compute in the precision of ``config`` inside the ``with`` block, in which the forward pass is."""
    with ExitStack() as stack:
        if config.precision == "bfloat16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
            if config.compile and hasattr(aot_settings, "backward_pass_autocast"):
                # Otherwise the compiled backward pass is autocast like the forward pass, and not left alone.
                stack.enter_context(aot_settings.patch(backward_pass_autocast="off"))
        yield


def evaluate(
    model: LocalGPT,
    ids: np.ndarray | Tensor,
    train_config: TrainConfig,
    stepped: nn.Module | None = None,
    step: int | None = None,
) -> float:
    """Return the mean cross-entropy of ``ids`` in nats per character; see `evaluation`."""
    return evaluation(model, ids, train_config, stepped, step)[0]


@torch.no_grad()
def evaluation(
    model: LocalGPT,
    ids: np.ndarray | Tensor,
    train_config: TrainConfig,
    stepped: nn.Module | None = None,
    step: int | None = None,
    sequences: Sequences | None = None,
    processes: Processes = ALONE,
) -> tuple[float, float]:
    """Return the mean cross-entropy in nats and the accuracy, always over the same windows of ``ids``.

    The text is cut into W windows of ``block_size`` that do not overlap, and what is left; every character
    but the first is predicted once, from what precedes it in its window. With n batches of B windows,
    and 0 < n B < W, only the windows floor(i W / (n B)), i = 0 ... n B - 1, are. The evaluation is that of
    ``step``, which says n by ``eval_between``, or the last one, of n = ``eval_iters``. The model's mode is
    restored.

    With ``sequences`` every window is one of them, and the means are over their answers: accuracy is the
    share of these that have the largest logit; of equal logits the first character's counts. Without, the
    accuracy is not measured, and 0.

    ``stepped``, the compiled form of ``model`` if it has one, takes the batches of full size, which is one
    graph more for each such size. What is left over has other shapes: the model itself takes it.

    Each of ``processes`` takes its share of the windows.
    """
    device = next(model.parameters()).device
    block_size = model.config.block_size
    x, y, x_rest, y_rest = windows(ids, block_size, sequences)
    batches = train_config.eval_batches(train_config.steps if step is None else step)
    asked = batches * train_config.batch_size
    if 0 < asked < len(x):
        chosen = torch.arange(asked, device=x.device) * len(x) // asked
        x, y, x_rest = x[chosen], y[chosen], x_rest[:, :0]
    (part,) = Split(processes).parts(len(x))
    x, y = x[part.rows], y[part.rows]
    rows = max(1, min(len(x), EVAL_TOKENS["cpu" if device.type == "cpu" else "cuda"] // block_size))
    pairs = [*zip(x.split(rows), y.split(rows), strict=True)] if len(x) else []
    if x_rest.numel() and processes.rank == 0:
        pairs.append((x_rest, y_rest))
    total, right, counted = torch.zeros(3, dtype=torch.float64, device=device)
    with evaluation_mode(model), precision(train_config, device):
        for inputs, targets in pairs:
            forward = stepped if stepped is not None and inputs.shape == pairs[0][0].shape else model
            targets = targets.to(device)
            logits, loss = forward(inputs.to(device), targets)
            counts = (targets != IGNORED).sum()
            total, counted = total + loss.double() * counts, counted + counts
            if sequences:
                right = right + (logits.argmax(dim=-1) == targets).sum()
    sums = torch.stack((total, right, counted))
    processes.add_up([sums])
    return tuple((sums[:2] / sums[2]).tolist())


def seed_all(seed: int, device: torch.device) -> None:
    """Do what ``torch.manual_seed`` does for the CPU and ``device``, without looking for others."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    idx: Tensor,
    targets: Tensor,
    step: int,
    split: Split = WHOLE,
) -> Tensor:
    """Take step ``step`` and return its loss, detached, without waiting for the device.

    ``model`` may be the compiled form of a `LocalGPT`. An anchor step is one of backpropagation; of a step
    that is skipped there is the loss alone. ``idx`` and ``targets`` are the whole batch, of which this
    process takes its share by ``split``; gradients and loss are those of all.
    """
    if is_skipped(step, config):
        with torch.no_grad():
            loss = _loss(model, config, idx, targets, step, split)
        split.processes.add_up([loss])
        return loss
    model.align_feedback(config.seed, "probes", step, idx=idx, split=split)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.zero_grad(set_to_none=True)
    with exact_derivatives(model) if is_anchor(step, config) else nullcontext():
        loss = _loss(model, config, idx, targets, step, split)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    split.processes.add_up([loss, *(p.grad for p in trained if p.grad is not None)])
    if config.grad_clip:
        # A network is clipped alike whether or not its feedback learns: by the gradients of its parameters.
        norm = nn.utils.clip_grad_norm_([p for p in trained if isinstance(p, nn.Parameter)], config.grad_clip)
        feedback = [p for p in trained if not isinstance(p, nn.Parameter) and p.grad is not None]
        if feedback:
            nn.utils.clip_grads_with_norm_(feedback, config.grad_clip, norm)
    mirror(feedback_places(model), copy=False)  # AdamW, fused, writes into no gradient
    optimizer.step()
    return loss


def _loss(
    model: nn.Module, config: TrainConfig, idx: Tensor, targets: Tensor, step: int, split: Split
) -> Tensor:
    """Return what this process adds to the loss of the batch; with gradients on, to the gradients too."""
    losses = []
    for part in split.parts(len(idx), idx.device):
        seed_all(seed_from(config.seed, "dropout", step), idx.device)
        with _seen_as(part, model), precision(config, idx.device):
            loss = model(idx[part.rows], targets[part.rows])[1]
        if not part.is_whole:
            own, all_ = ((ids != IGNORED).sum().to(loss) for ids in (targets[part.rows], targets))
            loss = loss * (own / all_)
        if torch.is_grad_enabled():
            loss.backward()
        losses.append(loss.detach().clone())  # the next replay of a graph overwrites it
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def _seen_as(part: Part, model: nn.Module) -> AbstractContextManager[None]:
    """Let the masks of dropout be those of ``part`` inside the ``with`` block."""
    if part.is_whole:
        return nullcontext()
    return set_for_a_while((m for m in model.modules() if isinstance(m, DropsOut)), "part", part)
