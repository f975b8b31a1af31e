"""What torch's defaults decide of a model and what they do not: dtype, device, the meta device, layout."""

import copy
import pickle
from contextlib import ExitStack, contextmanager
from importlib import import_module
from unittest.mock import patch

import pytest
import torch
from cases import ALIGNMENT_FIELDS, MODEL_CASES, RULE_CASES, SIZES, make_batch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import toy_corpus, toy_model, toy_train

from localgpt_core import (
    FrozenSubspace,
    LayerNormProjectedSurrogate,
    LocalGPT,
    LocalGPTConfig,
    LocalLinear,
    RuleOptions,
    TrainConfig,
    VQResidualDir,
    describe,
)
from localgpt_core.corpus import batches
from localgpt_core.layers import TopK
from localgpt_core.training import RunState
from localgpt_core.training.step import build_model, build_optimizer, model_without_numbers, training_step

CASES = {f"rule-{name}": options for name, options in RULE_CASES.items()} | MODEL_CASES
every_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}
every_default = pytest.mark.parametrize("default", DEFAULTS.values(), ids=DEFAULTS)


def built(options, **where) -> LocalGPT:
    torch.manual_seed(1)
    return LocalGPT(LocalGPTConfig(**{**SIZES, **options}), **where)


def tensors(model) -> dict[str, torch.Tensor]:
    """Return all of them, those included that no state_dict has."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same(a, b) -> None:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


# ------------------------------------------------------------ defaults


@every_case
@every_default
def test_what_is_asked_for_is_not_torchs_default(options, default):
    expected = built(options)
    with default():
        assert_same(built(options, device="cpu", dtype=torch.float32), expected)


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_model_is_of_one_dtype(options, dtype):
    model = built(options, dtype=dtype)
    assert {tensor.dtype for tensor in tensors(model).values()} == {dtype}
    with default_dtype(dtype):
        assert_same(built(options), model)
    if dtype != torch.float64:  # drawn in float32, and rounded
        wide = built(options)
        for name, weight in model.named_parameters():
            assert torch.equal(weight, dict(wide.named_parameters())[name].to(dtype)), name
    idx, targets = make_batch()
    model(idx, targets)[1].backward()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for layer in model.local_linears():
        layer.weight.data.mul_(2)  # magnitudes that follow start where they would go
    if dtype == torch.float16 and any(place.rule.aligns == "network" for place in model.feedback_places()):
        with pytest.raises(ValueError, match="dtype=torch.float16: the derivative of the network overflows"):
            model.align_feedback("key", idx=idx)
        return
    model.align_feedback("key", idx=idx)
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert bool(moved) == any(place.rule.aligns != "no" for place in model.feedback_places())


@every_default
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_the_configuration_of_a_run_decides_and_not_torchs_defaults(precision, default):
    options = {"vq_codes": 11, "subspace_rank": 4, "gated_blocks": True, "sigmoid_bias_mode": "learned"}
    config = LocalGPTConfig(**SIZES, **options, method="fa")
    expected = build_model(config, TrainConfig(precision=precision))
    dtype = torch.float64 if precision == "float64" else torch.float32
    assert {tensor.dtype for tensor in tensors(expected).values()} == {dtype}
    assert_same(expected, build_model(config, TrainConfig()).to(dtype))  # one start for all precisions
    with default():
        assert_same(build_model(config, TrainConfig(precision=precision)), expected)


def test_a_gate_may_start_at_a_whole_number():
    model = built({"gated_blocks": True, "gate_start": 2})
    assert model.blocks[0].alpha_mlp.dtype == torch.float32 and model.blocks[0].alpha_mlp.item() == 2


@every_default
@pytest.mark.parametrize("options", RULE_CASES.values(), ids=RULE_CASES)
def test_feedback_follows_the_layer_and_not_torchs_defaults(options, default):
    rule = RuleOptions(**{name: value for name, value in options.items() if name[:4] != "dfa_"})
    where = {"error_features": 4, "device": "cpu", "dtype": torch.float64}
    torch.manual_seed(1)
    expected = LocalLinear(6, 5, options=rule, **where)
    with default():
        torch.manual_seed(1)
        layer = LocalLinear(6, 5, options=rule, **where)
    assert_same(layer, expected)
    assert {(t.dtype, t.device.type) for t in tensors(layer).values()} == {(torch.float64, "cpu")}


@pytest.mark.parametrize("make", [lambda: VQResidualDir(6, 11).codebook, lambda: FrozenSubspace(6, 3).Q])
def test_codes_and_subspaces_are_where_torchs_defaults_say(make):
    numbers = make()
    with torch.device("meta"):
        assert make().is_meta
    for dtype in (torch.bfloat16, torch.float16):
        with default_dtype(dtype):
            assert torch.equal(make(), numbers.to(dtype))
    with default_dtype(torch.float64):
        assert make().dtype == torch.float64


@every_default
def test_what_is_found_out_about_a_model_does_not_depend_on_torchs_defaults(default):
    model = built({"method": "fa"}, dtype=torch.float64)
    expected = describe(model)
    with default():
        assert describe(model) == expected


@every_default
def test_sampling_does_not_depend_on_torchs_defaults(default):
    model, idx = built({}), torch.zeros(2, 3, dtype=torch.long)
    expected = model.generate(idx, 9, top_k=3, generator=torch.Generator().manual_seed(0))
    with default():
        assert torch.equal(
            model.generate(idx, 9, top_k=3, generator=torch.Generator().manual_seed(0)), expected
        )


@every_default
def test_a_state_dict_says_on_the_cpu_which_codebooks_are_not_in_use(default):
    model = built({"vq_codes": 11})
    model.quantise(False)
    with default():
        state = model.state_dict()
        assert state["blocks.0.vq.in_use"].device.type == "cpu"
        model.quantise(True)
        model.load_state_dict(state)
    assert not any(vq.in_use for vq in model.codebooks())


# ------------------------------------------------------------ the meta device


def assert_computes_the_same(model, expected) -> None:
    idx, targets = make_batch()
    assert_same(model, expected)
    losses = [m.eval()(idx, targets)[1] for m in (model, expected)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad))


@every_case
@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_a_model_from_the_meta_device_is_its_state_dict(options, way):
    expected = built(options)
    with torch.device("meta"):
        model = built(options)
    assert all(tensor.is_meta for tensor in tensors(model).values())
    model = copy.deepcopy(model)
    if way == "to_empty":
        model.to_empty(device="cpu")
        model.load_state_dict(expected.state_dict())
    else:
        model.load_state_dict(copy.deepcopy(expected.state_dict()), assign=True)
    model = pickle.loads(pickle.dumps(model)).to("cpu")  # .to fails for a tensor that is still on meta
    assert_computes_the_same(model, expected)


def test_on_the_meta_device_nothing_is_drawn_and_the_random_state_goes_on_as_elsewhere():
    config = LocalGPTConfig(**{**SIZES, "n_embd": 3 * 2**14}, method="fa", fa_init_mode="orthogonal")
    model = LocalGPT(config, device="meta")  # would be 100 GB
    assert model.head.feedback_weight.shape == (SIZES["vocab_size"], 3 * 2**14)
    layer = LocalLinear(3, 2**20, options=RuleOptions(method="fa", fa_init_mode="orthogonal"), device="meta")
    assert layer.feedback_weight.is_meta


@pytest.mark.parametrize(
    "part", [VQResidualDir(12, 11), FrozenSubspace(12, 3), TopK(3), LayerNormProjectedSurrogate(12)], ids=repr
)
def test_what_stands_in_the_stream_computes_shapes_on_the_meta_device(part):
    x = torch.empty(2, 3, 12, device="meta", requires_grad=True)
    y = copy.deepcopy(part).to("meta")(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.is_meta and grad.is_meta and y.shape == grad.shape == x.shape


def test_a_model_that_was_built_in_inference_mode_can_be_moved():
    with torch.inference_mode():
        model = built({"method": "kp"})
    idx, _ = make_batch()
    with torch.no_grad():
        assert torch.equal(model.to("cpu")(idx)[0], built({"method": "kp"})(idx)[0])


def test_loading_a_state_dict_on_the_cpu_leaves_every_parameter_where_it_is():
    model = built({"sigmoid_bias_mode": "learned"})
    before = {name: (id(t), t.data_ptr()) for name, t in tensors(model).items()}
    model.load_state_dict(built({"sigmoid_bias_mode": "learned"}).state_dict())
    assert before == {name: (id(t), t.data_ptr()) for name, t in tensors(model).items()}


# ------------------------------------------------------------ attention by the kernels of a GPU


class Away(torch.Tensor):
    """Numbers of the CPU that say they are on a GPU."""

    device = property(lambda self: torch.device("cuda"))


HIDDEN = torch.ones(5, 5, dtype=torch.bool).triu(1)
HIDDEN[2:, 0] = True  # the first key from the later queries, too


@pytest.mark.parametrize(
    "options",
    [MODEL_CASES[name] for name in ("softmax", "fused", "sigmoid", "ste_sigmoid")],
    ids=lambda options: "-".join(options) or "sigmoid",
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("queries", [5, 2])
@pytest.mark.parametrize("own", [HIDDEN, None], ids=["own mask", "causal"])
def test_a_gpu_mixes_the_values_under_the_mask_of_the_cpu(options, training, queries, own):
    attn = built(options, dtype=torch.float64).blocks[0].attn.train(training)
    draws = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64, generator=draws)
    here = [x.requires_grad_() for x in (q[:, :, 5 - queries :].clone(), k.clone(), v.clone())]
    there = [x.detach().clone().as_subclass(Away).requires_grad_() for x in here]
    mask = () if own is None else (own[5 - queries :],)
    expected, found = attn.mix(*here, *mask), attn.mix(*there, *mask)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected, rtol=1e-12, atol=1e-14)
    expected.sin().sum().backward()
    found.sin().sum().backward()
    for x, y in zip(here, there, strict=True):
        torch.testing.assert_close(y.grad.as_subclass(torch.Tensor), x.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("queries", "own", "causal"), [(5, None, True), (2, None, False), (5, HIDDEN, False)]
)
def test_a_gpus_kernel_gets_no_mask_where_it_knows_the_causal_one(queries, own, causal, monkeypatch):
    told = []

    def kernel(q, k, v, mask, dropout, is_causal):
        told.append((mask is None, is_causal))
        return v

    monkeypatch.setattr(functional, "scaled_dot_product_attention", kernel)
    attn = built(MODEL_CASES["softmax"], device="meta").blocks[0].attn
    q, k, v = (torch.empty(2, 3, rows, 4, device="meta") for rows in (queries, 5, 5))
    mask = None if own is None else own.to("meta")
    with Host("meta") as host:
        attn.mix(q, k, v, mask)
    assert told == [(causal, causal)] and host.seen == []


# ------------------------------------------------------------ layout


@every_case
def test_every_tensor_is_contiguous_and_its_own(options, tmp_path):
    model = built(options)
    named = tensors(model)
    assert all(tensor.is_contiguous() for tensor in named.values())
    pointers = [t.untyped_storage().data_ptr() for t in named.values() if t.numel()]
    assert len(set(pointers)) == len(pointers)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = built(options)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert_same(other, model)


@pytest.mark.parametrize("shape", [(3, 6), (6, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("options", RULE_CASES.values(), ids=RULE_CASES)
def test_the_state_of_every_layer_is_saved_as_it_is(options, shape, tmp_path):
    rule = RuleOptions(**{name: value for name, value in options.items() if name[:4] != "dfa_"})
    layer = LocalLinear(*shape, options=rule, error_features=5)
    assert all(tensor.is_contiguous() for tensor in layer.state_dict().values())
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")


def test_the_layout_of_a_subspaces_basis_does_not_round():
    h = torch.randn(200, 64)
    subspace = FrozenSubspace(64, 7)
    expected = subspace(h)
    subspace.Q = subspace.Q.T.contiguous().T
    assert torch.equal(subspace(h), expected)


# ------------------------------------------------------------ a step on a device that is not the host

# By these the host waits for numbers of a device, or brings numbers there, without an operation on its own.
ASKS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"}
BRINGS = {"tensor", "as_tensor", "asarray", "from_numpy"}
WAITS = {"equal", "is_nonzero", "nonzero", "bincount", "masked_select", "_unique2", "unique_dim"}


class Host(ExitStack):
    """Notes in ``seen`` when the host takes part in what runs inside the block, backward passes included."""

    def __init__(self, home: str | None = None) -> None:
        super().__init__()
        self.seen = []
        for owner, names in ((torch.Tensor, ASKS), (torch, BRINGS)):
            for name in names:
                self.enter_context(patch.object(owner, name, self._noted(name, getattr(owner, name))))
        self.enter_context(Crossings(home, self))

    def _noted(self, name: str, function):
        return lambda *args, **kwargs: self.seen.append(name) or function(*args, **kwargs)


class Crossings(TorchDispatchMode):
    """Notes operations that wait, and, where ``home`` is given, those with a tensor that is not there."""

    def __init__(self, home: str | None, host: Host) -> None:
        super().__init__()
        self.home, self.host = home, host

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result, name = op(*args, **(kwargs or {})), op.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        # Chosen by a mask, the number of entries is known on the device only.
        masks = name in ("index", "index_put", "index_put_") and any(
            leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
        )
        away = self.home is not None and any(tensor.device.type != self.home for tensor in tensors)
        away &= name != "_efficientzerotensor"  # the tangent of a number: nothing is there
        self.host.seen += [name] if name in WAITS or masks or away else []
        return result


class Brings(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad_output):
        return torch.as_tensor([1.0])


def test_whatever_asks_the_host_is_noticed():
    x = torch.tensor([0.0, 1.0])
    asked = {
        "item": lambda: x.sum().item(),
        "__bool__": lambda: bool(x.sum() > 0),
        "tolist": lambda: x.tolist(),
        "equal": lambda: torch.equal(x, x),
        "nonzero": lambda: x.nonzero(),
        "index": lambda: x[x > 0],
        "tensor": lambda: torch.tensor([1.0], device="meta"),
        "as_tensor": lambda: Brings.apply(torch.ones(1, requires_grad=True)).backward(),
    }
    for name, ask in asked.items():
        with Host() as host:
            ask()
        assert host.seen == [name]
    with Host("meta") as host:
        torch.empty(2, device="meta") + 1.0
        torch.ones(2).to("meta")
    assert host.seen == ["ones", "_to_copy"]


ALIGNMENTS = {field: {**needed, field: value} for field, (needed, value) in ALIGNMENT_FIELDS.items()}
every_option = pytest.mark.parametrize(
    "options", (CASES | ALIGNMENTS).values(), ids=(CASES | ALIGNMENTS).keys()
)


@every_option
def test_a_step_is_made_on_the_device_of_the_model_alone(options, monkeypatch):
    optimizers = import_module("torch.optim.optimizer")
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    config = LocalGPTConfig(**{**SIZES, **options, "dropout": 0.1})
    train = TrainConfig(steps=4, batch_size=3, anchor_interval=0 if config.is_exact else 2)
    model = model_without_numbers(config, train)
    optimizer = build_optimizer(model, train)
    idx, targets = (ids.to("meta") for ids in make_batch(rows=3))
    with Host("meta") as host:
        for step in range(3):
            loss = training_step(model, optimizer, train, idx, targets, step)
    assert host.seen == [] and loss.is_meta
    assert all(parameter.grad.is_meta for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("options", RULE_CASES.values(), ids=RULE_CASES)
def test_a_run_waits_for_its_device_where_a_point_of_the_curve_is_due(options, monkeypatch):
    monkeypatch.setattr(batches, "AHEAD", 4)
    model = toy_model(**{"n_layer": 2, "n_head": 3, "n_embd": 12, **options})
    config = toy_train(steps=300, eval_interval=300)  # a point every three steps
    run = RunState(model, config, toy_corpus(), torch.device("cpu"))
    seen = []
    for _ in range(6):
        with Host() as host:
            run.advance()
        seen.append(host.seen)
    # Once, after the first step, whether the feedback that takes the steps of its weight was left behind.
    left_behind = (
        ["tolist"] if any(place.rule.mirrors_gradient for place in run.model.feedback_places()) else []
    )
    places, point = ["from_numpy"], ["cpu", "tolist", "item"]
    assert seen == [[], left_behind, point, [], places, point]
    with Host() as host:
        run.evaluate()
    assert host.seen == ["tolist"]
