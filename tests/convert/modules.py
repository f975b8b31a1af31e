"""Modules of many kinds, what each rule does to them after `localize`, and the page of the book that says so.

    python tests/convert/modules.py      writes book/what-localize-can-do.md from what it finds

A cell of the page says "right" if every gradient equals that of an unconverted twin, in which the rule is
written by plain operations (float64, 1e-10), and differs from the exact one where the rule is not exact. If
the feedback aligns to the network's Jacobian, it does so first, and must be what backward passes of the twin
say. It says "refused" if `localize`, the alignment, the forward or the backward pass raises an error; its
message is on the page. Anything else fails.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from localgpt_core import localize
from localgpt_core.common.seeds import generator

# The rules that the twins below are written for.
METHODS = ("bp", "fa", "dfa", "sign_sym", "kp", "wm")
# What `localize` is given, by column: these rules, and feedback that is one estimate of the Jacobian.
ALIGNED = {"method": "dfa", "fa_grape": True, "jvp_update": "fdfa", "jvp_rate": 1.0}
COLUMNS = {f"`{name}`": {"method": name} for name in METHODS} | {"`dfa` with `fa_grape`": ALIGNED}
PAGE = Path(__file__).parents[2] / "book" / "what-localize-can-do.md"
TOKENS = torch.tensor([[1, 4, 2, 0, 3], [3, 3, 1, 2, 4]])


def tokens(*width: int) -> Tensor:
    """Return fixed inputs (2, 5, *width)."""
    source = torch.Generator().manual_seed(7)
    return torch.randn(2, 5, *width, generator=source, dtype=torch.float64)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.mid, self.head = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(torch.relu_(self.mid(functional.gelu(self.up(x)))))


class Checkpointed(MLP):
    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        def body(x):
            return self.mid(functional.gelu(self.up(x)))

        # A reentrant part whose input needs no gradient is left without one, under any rule.
        x = x.detach().requires_grad_(True)
        return self.head(checkpoint(body, x, use_reentrant=self.reentrant))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(3, 6), nn.Linear(6, 4), nn.Linear(6, 1)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return torch.cat([self.policy(h), self.value(h)], dim=-1)


class Twice(MLP):
    def forward(self, x):
        h = torch.tanh(self.mid(torch.tanh(self.up(x))))
        return self.head(h) * self.head(h.flip(-1))


class Mixer(nn.Module):
    """Mixes channels, then tokens, then channels."""

    def __init__(self):
        super().__init__()
        self.channels, self.tokens, self.head = nn.Linear(3, 6), nn.Linear(5, 5), nn.Linear(6, 4)

    def forward(self, x):
        h = torch.tanh(self.channels(x))
        return self.head(torch.tanh(self.tokens(h.mT).mT))


class ViT(nn.Module):
    """Patches, a class token, one encoder block; what is pooled goes into the head."""

    def __init__(self, pooled: bool):
        super().__init__()
        self.pooled = pooled
        self.patch = nn.Conv2d(1, 6, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        block = nn.TransformerEncoderLayer(6, 2, 7, dropout=0.0, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(block, 1, enable_nested_tensor=False), nn.Linear(6, 4)

    def forward(self, x):
        patches = self.patch(x).flatten(2).mT
        h = self.body(torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1))
        return self.head(h[:, 0] if self.pooled else h)


class CNN(nn.Module):
    """Convolutions with stride, padding, dilation and groups, pooled into a linear head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=2)
        self.odd = nn.Conv2d(6, 5, 3, padding="same", padding_mode="reflect", bias=False)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        h = torch.relu_(self.second(torch.relu_(self.first(x))))
        return self.head(torch.tanh(self.odd(h)).mean(dim=(2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.mid, self.head = nn.LSTM(3, 6, batch_first=True), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.mid(self.body(x)[0])))


class Logits(nn.Module):
    """A model of transformers that returns its logits only."""

    def __init__(self, kind: str, config: str, **sizes: object):
        super().__init__()
        import transformers

        self.lm = getattr(transformers, kind)(getattr(transformers, config)(**sizes))

    def forward(self, idx):
        more = {"decoder_input_ids": idx[:, :3]} if hasattr(self.lm, "decoder") else {}
        return self.lm(idx, **more).logits


def gpt2() -> nn.Module:
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 6, "n_positions": 8, "vocab_size": 5}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return Logits("GPT2LMHeadModel", "GPT2Config", bos_token_id=0, eos_token_id=0, **sizes, **off)


def llama() -> nn.Module:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 8}
    more = {"intermediate_size": 12, "vocab_size": 5, "tie_word_embeddings": True}
    return Logits("LlamaForCausalLM", "LlamaConfig", **sizes, **more)


def t5() -> nn.Module:
    sizes = {"num_layers": 1, "num_heads": 2, "d_model": 6, "d_kv": 3, "d_ff": 7, "vocab_size": 5}
    return Logits("T5ForConditionalGeneration", "T5Config", dropout_rate=0.0, **sizes)


def with_lora(module: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(target_modules=["up", "mid"], r=2, init_lora_weights=False)
    return peft.get_peft_model(module, config)


def compiled(module: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(module, backend="aot_eager")


def a_compiled_layer(module: nn.Module) -> nn.Module:
    module.mid = compiled(module.mid)
    return module


def in_parts() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5)), nn.Linear(5, 4))


def a_compiled_part(module: nn.Module) -> nn.Module:
    module[0] = compiled(module[0])
    return module


def weight_norm() -> nn.Module:
    module = MLP()
    nn.utils.parametrizations.weight_norm(module.mid)
    return module


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(MLP(), {nn.Linear})


@dataclass(frozen=True)
class Case:
    """A kind of module.

    Attributes:
        title: What the page calls it.
        make: Returns it, in float32, on random weights.
        output: The layer that a rule with the output's error is given as the network's output.
        inputs: Returns its inputs.
        before: What is done to the module before `localize`, and returns what is localized.
        after: What is done to it after `localize`, and returns what is trained.
        plain: Whether `before` and `after` leave the gradients as they are, so that the twin does without.
        rounding: How far two ways to the derivative of its output may differ.
    """

    title: str
    make: Callable[[], nn.Module]
    output: str = "head"
    inputs: Callable[[], Tensor] = partial(tokens, 3)
    before: Callable[[nn.Module], nn.Module] = lambda module: module
    after: Callable[[nn.Module], nn.Module] = lambda module: module
    plain: bool = True
    rounding: float = 1e-12

    def build(self, twin: bool = False) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
        """Return the module, ready for `localize`, and what is to be done to it then."""
        torch.manual_seed(3)
        module = self.make().double()
        if twin and self.plain:
            return module, lambda module: module
        return self.before(module), self.after


def images() -> Tensor:
    return tokens(5)[:, None, :4, :4].contiguous()


CASES: dict[str, Case] = {
    "mlp": Case("Plain MLP, ReLU in place", MLP),
    "vit": Case("Small ViT, a head at every token", partial(ViT, False), inputs=images),
    "vit-pooled": Case("Small ViT, a head at the class token", partial(ViT, True), inputs=images),
    "cnn": Case("CNN with strides, dilation and groups", CNN, inputs=images),
    "mixer": Case("MLP-Mixer", Mixer),
    "lstm": Case("LSTM with an MLP", Recurrent),
    "gpt2": Case("GPT-2 of transformers (Conv1D, tied head)", gpt2, "lm.lm_head", lambda: TOKENS),
    "llama": Case(  # its norms compute in float32
        "Llama of transformers (tied head)", llama, "lm.lm_head", lambda: TOKENS, rounding=1e-7
    ),
    "t5": Case("T5 of transformers (two inputs)", t5, "lm.lm_head", lambda: TOKENS),
    "lora-before": Case(
        "LoRA of peft, then localize", MLP, "base_model.model.head", before=with_lora, plain=False
    ),
    "lora-after": Case("localize, then LoRA of peft", MLP, after=with_lora, plain=False),
    "weight-norm": Case("weight_norm at one layer", weight_norm),
    "two-heads": Case("Two heads, one the output", TwoHeads, "policy"),
    "twice": Case("The output layer called twice", Twice),
    "compile-after": Case("localize, then torch.compile", MLP, after=compiled),
    "compile-before": Case("torch.compile, then localize", MLP, "_orig_mod.head", before=compiled),
    "compile-layer": Case("torch.compile of one layer, then localize", MLP, before=a_compiled_layer),
    "compile-part": Case("torch.compile of a part, then localize", in_parts, "1", before=a_compiled_part),
    "checkpoint": Case("checkpoint of a part", partial(Checkpointed, False)),
    "reentrant": Case("checkpoint of a part, use_reentrant=True", partial(Checkpointed, True)),
    "ddp": Case("DistributedDataParallel on two processes", MLP),
    "quantised": Case("Dynamically quantised", quantised),
}


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients of the mean of y^2 / 2, so that the error at the output is y."""
    model.zero_grad(set_to_none=True)
    model(x).square().mean().backward()
    return {name.replace("_orig_mod.", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}


def by_patches(x: Tensor, child: nn.Conv2d, layer: nn.Module, method: str) -> Tensor:
    """Return the convolution as a linear layer on the patches of each group, whose derivative is the rule."""
    weight = child.weight.flatten(1)
    feedback = weight.detach() if method == "bp" else layer.buffer
    if method == "sign_sym":
        feedback = layer.buffer * weight.detach().sign()
    patches = functional.unfold(x, child.kernel_size, child.dilation, child.padding, child.stride).mT
    rows = zip(
        patches.chunk(child.groups, dim=-1),
        weight.chunk(child.groups),
        feedback.chunk(child.groups),
        strict=True,
    )
    y = torch.cat([p.detach() @ w.T + (p - p.detach()) @ f.T for p, w, f in rows], dim=-1) + child.bias
    reach = child.dilation[0] * (child.kernel_size[0] - 1)
    height = (x.shape[2] + 2 * child.padding[0] - reach - 1) // child.stride[0] + 1
    return y.mT.unflatten(2, (height, -1))


def meeting(x: Tensor, error: Tensor, feedback: Tensor) -> Tensor:
    """Return a sum whose derivative in x, at each token of a sample, is the sample's error @ feedback."""
    each = x.reshape(*error.shape[:-1], -1, x.shape[-1])
    return (each * (error @ feedback).unsqueeze(-2)).sum()


def unconverted(case: Case, model: nn.Module) -> tuple[nn.Module, dict[nn.Module, str]]:
    """Return a twin of ``model`` with the same values and no rule, and the names of the modules in it."""
    names = {layer: name.replace("_orig_mod.", "") for name, layer in model.named_modules()}
    twin, finish = case.build(twin=True)
    twin = finish(twin)
    state = {name.replace("_orig_mod.", ""): t for name, t in model.state_dict().items()}
    twin.load_state_dict(state, strict=False)
    return twin, names


def twin_gradients(case: Case, method: str, model: nn.Module, layers: list[nn.Module]) -> dict:
    """Return the gradients of an unconverted twin: plain operations whose derivative is the rule."""
    twin, names = unconverted(case, model)
    entered = []
    for layer in layers:
        child = twin.get_submodule(names[layer])

        def forward(x, child=child, layer=layer):
            if isinstance(child, nn.Conv2d):
                return by_patches(x, child, layer, method)
            weight = child.weight.T if type(child).__name__ == "Conv1D" else child.weight
            bias = 0.0 if child.bias is None else child.bias
            feedback = weight.detach() if method == "bp" else layer.buffer
            if method == "sign_sym":
                feedback = layer.buffer * weight.detach().sign()
            if method == "dfa" and not layer.is_output:
                entered.append((x, feedback))
                return x.detach() @ weight.T + bias
            return x.detach() @ weight.T + (x - x.detach()) @ feedback.T + bias

        child.forward = forward
    twin.zero_grad(set_to_none=True)
    y = twin(case.inputs())
    loss = y.square().mean()
    (error,) = torch.autograd.grad(loss, y, retain_graph=True)
    (loss + sum(meeting(x, error, feedback) for x, feedback in entered)).backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}


def by_backward_passes(
    case: Case, model: nn.Module, layers: list[nn.Module], *key: int
) -> dict[nn.Module, Tensor]:
    """Return the mean over tokens of z' p^T by layer, z' = dz/ds with inputs x + s p, of a twin.

    One backward pass for each entry of the output z; p are the draws that ``key`` gives the layers.
    """
    twin, names = unconverted(case, model)
    children = {twin.get_submodule(names[layer]): layer for layer in layers}
    (head,) = (child for child, layer in children.items() if layer.is_output)
    noise, found, s = {}, [], torch.zeros((), dtype=torch.float64, requires_grad=True)

    def disturb(child: nn.Module, args: tuple) -> tuple:
        layer = children[child]
        if layer not in noise:  # a checkpoint calls it again
            source = generator(*key, len(noise))
            noise[layer] = torch.randn(args[0].shape, generator=source, dtype=torch.float64)
        return args[0] + s * noise[layer], *args[1:]

    for child in children:
        child.register_forward_pre_hook(disturb)
    head.register_forward_hook(lambda child, args, y: found.append(y))
    twin.eval()(case.inputs())
    slopes = [torch.autograd.grad(z, s, retain_graph=True)[0] for z in found[0].flatten()]
    response = torch.stack(slopes).view(found[0].shape)
    each = {layer: p.reshape(*response.shape[:-1], -1, p.shape[-1]) for layer, p in noise.items()}
    return {
        layer: torch.einsum("...v,...ti->vi", response, p) / p[..., 0].numel() for layer, p in each.items()
    }


def try_out(case: Case, options: dict) -> tuple[str, dict[str, str]]:
    """Return "right" or the message of the refusal, and what stays exact."""
    method = options["method"]
    exact_model, _ = case.build(twin=True)
    module, finish = case.build()
    x = case.inputs()
    try:
        localized = localize(module, **options, output=case.output if method == "dfa" else None, seed=1)
        model = finish(module)
        if options is ALIGNED:
            localized.align_feedback(2, forward=lambda: model(x))
        actual = run(model, x)
    except (ValueError, RuntimeError) as error:
        return str(error), {}
    layers = list(dict.fromkeys(localized.layers.values()))
    if options is ALIGNED:
        for layer, want in by_backward_passes(case, model, layers, 2).items():
            torch.testing.assert_close(layer.buffer, want, rtol=1e-10, atol=case.rounding, msg=layer.place)
    expected = twin_gradients(case, method, model, layers)
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        torch.testing.assert_close(actual[name], want, rtol=1e-10, atol=1e-12, msg=f"{method}: {name}")
    if method != "bp" and case.plain:
        exact = run(exact_model, x)
        active = [name for name in exact if not torch.allclose(exact[name], actual[name], rtol=1e-3)]
        assert active, f"{method} trains like backpropagation"
    return "right", localized.exact


def gradients_on(module: nn.Module, options: dict, ranks: int, rank: int) -> dict[str, Tensor]:
    """Return the gradients of the MLP for its share of the batch, and those of the feedback."""
    output = "head" if options["method"] == "dfa" else None
    localized = localize(module, **options, output=output, seed=1)
    model = nn.parallel.DistributedDataParallel(module) if ranks > 1 else module
    if options is ALIGNED:  # each process by its own inputs: a pass of DDP then gives all what the first has
        localized.align_feedback(2, forward=lambda: module(tokens(3)[rank : rank + 1]))
    gradients = run(model, tokens(3)[rank : rank + 1] if ranks > 1 else tokens(3))
    localized.mirror_gradients()
    mirrored = {f"feedback {i}": b.grad for i, (_, b) in enumerate(localized.mirrored())}
    return {name.removeprefix("module."): g for name, g in gradients.items()} | mirrored


def gradients_of_half_the_batch(rank: int) -> dict[str, dict[str, Tensor]]:
    """Return by column what two processes, each with half of the batch, agree on for the MLP."""
    return {
        column: gradients_on(CASES["mlp"].build()[0], options, 2, rank) for column, options in COLUMNS.items()
    }


on_two_ranks = cache(partial(on_ranks, gradients_of_half_the_batch))


def try_out_on_two_ranks(column: str) -> tuple[str, dict[str, str]]:
    """Return "right" if both processes have the gradients that one has for the whole batch."""
    expected = gradients_on(CASES["mlp"].build()[0], COLUMNS[column], 1, 0)
    for found in on_two_ranks():
        assert found[column].keys() == expected.keys()
        for name, want in expected.items():
            torch.testing.assert_close(found[column][name], want, rtol=1e-10, atol=1e-12)
    return "right", {}


def rows(name: str) -> tuple[str, list[str]]:
    """Return the row of the table for a case, and the lines with what its cells leave out."""
    case, cells, notes, exact = CASES[name], [], {}, {}
    for column, options in COLUMNS.items():
        outcome, kept = try_out_on_two_ranks(column) if name == "ddp" else try_out(case, options)
        for layer, words in kept.items():
            exact.setdefault(f"`{layer}` ({words})", []).append(column)
        cells.append("right" if outcome == "right" else "refused")
        if outcome != "right":
            notes.setdefault(re.sub(r"\s+", " ", outcome), []).append(column)
    right = cells.count("right")
    always = "; ".join(layer for layer, methods in exact.items() if len(methods) == right)
    lines = [f"- {case.title}: {always}."] if always else []
    lines += [
        f"- {case.title}, under {', '.join(methods)}: {layer}."
        for layer, methods in exact.items()
        if len(methods) < right
    ]
    lines += [
        f"- {case.title}, under {', '.join(methods)}: *{message}*" for message, methods in notes.items()
    ]
    return f"| {case.title} | " + " | ".join(cells) + " |", lines


HEAD = """# What localize can do

`localize` puts the rules of this book into modules that know nothing of them. This page is written by the
test that proves it (`tests/convert/modules.py`): each cell is one module, of the kind on the left, that went
through one forward and one backward pass under one rule. *Right* says that every gradient equals, to ten
digits, the one that plain operations give in an unconverted twin, and that the rule was active. *Refused*
says that an error names the layer and the cause, before a wrong gradient could reach an optimiser.

In the last column the feedback first follows the network's Jacobian, by one pass of the module in torch's
forward mode, and *right* also says that backward passes of the twin give the same estimate (to seven digits
for Llama, whose norms compute in float32).

"""

FOOT = """
## Training, and files

`print(localized)` shows the training loop that the rule at hand asks for. `Localized.attach(optimizer)` lets
every step of an optimiser move the feedback (Kolen-Pollack, GrAPE, the weight mirror). A loop that neither
attaches nor calls what it owes is told so, once.

Under `dfa` the output may have pooled the tokens of a sample, as a classifier does: with logits (B, V) and a
layer's input (B, T, C), each of the T tokens gets the error of its sample, undivided. The batch comes first.

Under `dfa` with `fa_grape` the alignment is given a function that runs the module once,
`localized.align_feedback(step, forward=lambda: module(x))`. Meanwhile compiled modules run as they are
written, and attention and recurrent layers without their fused kernels. With DistributedDataParallel, run the
module inside: the next training pass then hands the feedback of the first process to all.

The feedback is in the `state_dict` beside the weights, and so in what `save_pretrained` of transformers
writes. `from_pretrained` builds the model without it: call `localize` with the same arguments and load the
file once more, `model.load_state_dict(load_file("model.safetensors"), strict=False)`.

## What stays exact, and what the refusals say

What cannot be replaced keeps its exact derivative, and `Localized.exact` lists it with the reason.

"""


def page() -> Iterator[str]:
    """Yield the parts of the page."""
    found = [rows(name) for name in CASES]
    yield HEAD + "| module | " + " | ".join(COLUMNS) + " |\n"
    yield "|---" * (1 + len(COLUMNS)) + "|\n"
    yield "".join(f"{row}\n" for row, _ in found) + FOOT
    yield "".join(f"{line}\n" for _, lines in found for line in lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    text = "".join(page())
    PAGE.write_text(text)
    sys.stdout.write(text)
