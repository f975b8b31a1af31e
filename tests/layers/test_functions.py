"""Every autograd Function: second derivatives and forward mode are right or refused by name."""

import importlib
import pkgutil

import pytest
import torch
from cases import make_batch, make_model, normal
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional

import localgpt_core
from localgpt_core import HardTopK, LayerNormProjectedSurrogate, LayerNormSTE, LocalLinear, RuleOptions
from localgpt_core import SoftmaxValueMixLocalFn as SoftmaxValueMix
from localgpt_core.bottlenecks import UniformRounding, VQResidualDir
from localgpt_core.common import exact_derivatives
from localgpt_core.common.functions import LocalFunction
from localgpt_core.layers import FeedbackPoint, LocalConv2d, publish_error
from localgpt_core.layers.shared_input import outputs_of
from localgpt_core.layers.surrogates import (
    GELUSTE,
    GELUStepSurrogate,
    SigmoidSTE,
    SigmoidValueMixFn,
    StraightThrough,
)

B, T, S, C, D, V = 2, 3, 4, 6, 5, 7


def functions() -> dict[str, type]:
    """Return every autograd Function that a module of the package defines, found by walking them all."""
    found = {}
    for item in pkgutil.walk_packages(localgpt_core.__path__, "localgpt_core."):
        if item.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(item.name)).values():
            if isinstance(value, type) and issubclass(value, torch.autograd.Function):
                if value.__module__ == item.name:
                    found[value.__name__] = value
    return found


def x(*shape, seed=7):
    return normal(*(shape or (B, T, C)), seed=seed).requires_grad_(True)


def linear(method):
    """Return y as a function of x, W and b; under a rule of the output's error, y is the output."""
    layer = LocalLinear(C, D, options=RuleOptions(method=method), error_features=D).double()
    layer.reset_feedback(1)

    def function(x, weight, bias):
        taps = []
        names = {"weight": weight, "bias": bias}
        return publish_error(torch.func.functional_call(layer, names, (x, taps)), taps)

    return function, (x(B, T, C), x(D, C, seed=1), x(D, seed=2))


def convolution(method):
    layer = LocalConv2d(2, 4, 2, (1, 2), 1, groups=2, options=RuleOptions(method=method)).double()
    layer.reset_feedback(1)

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    return function, (x(B, 2, 3, 4), x(4, 1, 2, 2, seed=1), x(4, seed=2))


def together(method):
    """Return a function of (x, the weights and biases of two layers)."""
    pair = nn.ModuleList(
        LocalLinear(C, n, options=RuleOptions(method=method), error_features=C).double() for n in (C, 3)
    )
    for place, layer in enumerate(pair):
        layer.reset_feedback(place)
    names = [name for name, _ in pair.named_parameters()]

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = pair

        def forward(self, x):
            taps = []
            y, other = outputs_of(self.pair, x, taps)
            return publish_error(y, taps) + other.sum(dim=-1, keepdim=True)

    both = Both()

    def function(x, *parameters):
        given = {f"pair.{name}": value for name, value in zip(names, parameters, strict=True)}
        return torch.func.functional_call(both, given, (x,))

    return function, (x(), *(x(*p.shape, seed=i) for i, p in enumerate(pair.parameters())))


def point(norm):
    place = FeedbackPoint(C, C, RuleOptions(method="dfa", feedback_seed=1), norm).double()

    def function(x):
        taps = []
        return publish_error(place(x, taps).sin(), taps)

    return function


def norm(mode):
    layer = LayerNormProjectedSurrogate(C, mode).double()
    return lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias_param": b}, (x,))


def sigmoid_mix(q, k, v, bias):
    return SigmoidValueMixFn.apply(q, k, v, bias, torch.ones(T, S, dtype=torch.bool).triu(1))


def plain_convolution(x, weight, bias):
    return functional.conv2d(x, weight, bias, (1, 2), 1, groups=2)


# For each Function, uses of it with inputs, by name; and those whose second derivative it refuses.
CASES = {
    "StraightThrough": {"": (lambda x: StraightThrough.apply(x, x.detach().sin()), (x(),))},
    "SigmoidSTE": {"": (SigmoidSTE.apply, (x(),))},
    "GELUSTE": {"": (GELUSTE.apply, (x(),))},
    "GELUStepSurrogate": {
        mode: (lambda x, mode=mode: GELUStepSurrogate.apply(x, mode), (x(),)) for mode in ("relu", "steps")
    },
    "SoftmaxValueMixLocalFn": {
        "refused": (SoftmaxValueMix.apply, (x(B, T, S), x(B, S, D, seed=1))),
        "refused-heads": (SoftmaxValueMix.apply, (x(B, 2, T, S), x(B, 2, S, D, seed=1))),
    },
    "SigmoidValueMixFn": {
        "": (
            sigmoid_mix,
            (x(B, T, D), x(B, S, D, seed=1), x(B, S, V, seed=2), normal(1, seed=3)[0].requires_grad_()),
        ),
    },
    "LayerNormSurrogateFunction": {
        "projected": (norm("projected"), (x(), x(C, seed=1), x(C, seed=2))),
        "scale": (norm("scale"), (x(), x(C, seed=1), x(C, seed=2))),
        "center_scale": (norm("center_scale"), (x(), x(C, seed=1), x(C, seed=2))),
    },
    "HardTopK": {
        "": (lambda x: HardTopK.apply(x, 2), (x(),)),
        "all": (lambda x: HardTopK.apply(x, C), (x(),)),
    },
    "_NearestDirection": {"": (VQResidualDir(C, 11).double(), (x(),))}
    | {
        f"{groups}-{rms}-{backward}": (
            VQResidualDir(C, 11, groups=groups, rms=rms, backward=backward).double(),
            (x(),),
        )
        for groups, rms, backward in (
            *((1, "token", "tangent"), (2, "token", "rotation")),
            *((3, "fixed", "tangent"), (2, "fixed", "rotation"), (2, "fixed", "identity")),
        )
    },
    "_RoundedStraightThrough": {"": (UniformRounding(3), (x(),))},
    "LocalConv2dFunction": {method: convolution(method) for method in ("bp", "fa", "sign_sym", "kp")},
    "LocalLinearFunction": {method: linear(method) for method in ("bp", "fa", "dfa", "sign_sym", "kp")},
    "SharedInputFunction": {method: together(method) for method in ("fa", "dfa", "sign_sym", "kp")},
    "_PublishError": {"": (lambda x: publish_error(x, [x * 0]), (x(),))},
    "_FeedbackPointFunction": {"": (point(False), (x(),)), "norm": (point(True), (x(),))},
}
# They stand for others, and are neither differentiated nor refused themselves.
PARTS = {"LocalFunction", "TransformableFunction", "_SecondDerivative"}
USES = {f"{name}-{use}": (name, *case) for name, uses in CASES.items() for use, case in uses.items()}
every_use = pytest.mark.parametrize("use", USES)


def test_no_function_is_forgotten():
    assert functions().keys() == CASES.keys() | PARTS


@every_use
def test_a_second_derivative_is_right_or_refused_by_name(use):
    name, function, inputs = USES[use]
    if "refused" not in use:
        assert gradgradcheck(function, inputs)
        return
    grads = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)
    for grad in grads:
        for wanted in inputs:
            # Beside another way to the input, too, by which the missing part would be left out unnoticed.
            with pytest.raises(
                RuntimeError, match=f"{name}.* has no second derivative; inside .*exact_deriv"
            ):
                torch.autograd.grad(grad.sum() + sum(t.sum() for t in inputs), wanted, retain_graph=True)
            with pytest.raises(RuntimeError, match=name):
                grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize(
    "use",
    ["SoftmaxValueMixLocalFn-refused", "SigmoidValueMixFn-", "LayerNormSurrogateFunction-projected"],
)
def test_a_backward_pass_that_claims_to_be_the_derivative_is(use):
    _, function, inputs = USES[use]
    assert gradcheck(function, inputs)


@every_use
def test_forward_mode_is_right_or_refused_by_name(use):
    name, function, inputs = USES[use]
    tangents = tuple(torch.ones_like(t) for t in inputs)
    if use.endswith("Function-bp"):
        plain = functional.linear if "Linear" in use else plain_convolution
        actual, expected = (torch.func.jvp(f, inputs, tangents)[1] for f in (function, plain))
        assert torch.equal(actual, expected)
        return
    error, words = NotImplementedError, f"{name} has a backward pass only: no forward mode"
    if name in ("LocalLinearFunction", "LocalConv2dFunction", "SharedInputFunction"):
        error, words = ValueError, "is about the backward pass and has no derivative in forward mode"
    elif name == "_PublishError":  # meant for layers that have refused already
        words = "jvp"
    with forward_ad.dual_level(), pytest.raises(error, match=words):
        function(*(forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)))
    with pytest.raises((error, RuntimeError), match=words):
        torch.func.jvp(function, inputs, tangents)
    # A level alone, without a tangent, asks for nothing.
    with forward_ad.dual_level():
        assert torch.equal(function(*inputs), function(*inputs))


def test_an_error_of_the_forward_pass_is_not_taken_for_forward_mode():
    with pytest.raises(RuntimeError, match="must match the size"):
        GELUStepSurrogate.apply(torch.ones(2, 3) + torch.ones(4), "relu")
    with pytest.raises(KeyError, match="no-mode"):
        GELUStepSurrogate.apply(torch.ones(2), "no-mode")


# ------------------------------------------------------------ true derivatives, twice


def hessian_vector(function, x, v):
    """Return H v of a scalar function by two backward passes."""
    x = x.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad((gradient * v).sum(), x)[0]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_hessian_vector_products_of_an_exact_layernorm_are_torchs(dtype, limit):
    x, v, c = (normal(B, T, C, seed=seed, dtype=dtype) for seed in range(3))
    layer = LayerNormProjectedSurrogate(C).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(normal(C, seed=4)), layer.bias_param.copy_(normal(C, seed=5))
    found, expected = (
        hessian_vector(lambda x, f=f: (f(x) * c).pow(3).sum(), x, v) for f in (layer, layer.exact_forward)
    )
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
    assert expected.norm() > 1


def test_a_third_derivative_of_an_exact_layernorm_is_that_of_its_formula():
    x, c = normal(T, C), normal(T, C, seed=1)

    # Not torch's layer_norm, whose own third derivative leaves part of sigma's out.
    def formula(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    def squared_gradient(function):
        def value(x):
            return torch.autograd.grad((function(x) * c).pow(3).sum(), x, create_graph=True)[0].pow(2).sum()

        return value

    layer = LayerNormProjectedSurrogate(C).double()
    found, expected = (hessian_vector(squared_gradient(f), x, c) for f in (layer, formula))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_hessian_vector_products_of_winners_are_torchs():
    x, v = normal(B, T, C), normal(B, T, C, seed=1)
    found = hessian_vector(lambda x: HardTopK.apply(x.sin(), 2).pow(3).sum(), x, v)
    losers = x.sin().abs().argsort(-1)[..., :-2]
    expected = hessian_vector(lambda x: x.sin().scatter(-1, losers, 0.0).pow(3).sum(), x, v)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_hessian_vector_products_of_a_model():
    idx, targets = make_batch()
    options = {"ln_mode": "projected", "mlp_topk": 9, "resid_topk": 5}
    products = []
    for model in (make_model(**options), make_model(**options)):
        with exact_derivatives(model) if products else torch.enable_grad():
            weight = model.blocks[0].attn.q_proj.weight
            (g,) = torch.autograd.grad(model(idx, targets)[1], weight, create_graph=True)
            products.append(torch.autograd.grad((g * normal(*g.shape)).sum(), weight)[0])
    torch.testing.assert_close(*products, rtol=1e-9, atol=1e-13)


def test_a_hessian_through_the_fused_softmax_is_refused_and_is_there_where_derivatives_are_exact():
    model, (idx, targets) = make_model(attn_mode="softmax", fuse_attn_local=True), make_batch()
    plain = make_model(attn_mode="softmax")

    def product(model):
        weight = model.blocks[0].attn.q_proj.weight
        (g,) = torch.autograd.grad(model(idx, targets)[1], weight, create_graph=True)
        return torch.autograd.grad((g * normal(*g.shape)).sum(), weight)[0]

    with pytest.raises(RuntimeError, match="SoftmaxValueMixLocalFn has no second derivative"):
        product(model)
    with exact_derivatives(model), exact_derivatives(plain):
        torch.testing.assert_close(product(model), product(plain), rtol=1e-9, atol=1e-13)


def test_a_graph_of_the_first_derivative_alone_changes_none_of_its_bits():
    for name, function, inputs in USES.values():
        loss = function(*inputs).pow(3).sum()
        once = torch.autograd.grad(loss, inputs, retain_graph=True)
        with_graph = torch.autograd.grad(loss, inputs, create_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(once, with_graph, strict=True)), name
        with torch.no_grad():
            with_graph[0].mul_(2)  # as clipping does


def test_gradients_that_refuse_a_second_derivative_may_be_changed_in_place():
    _, function, inputs = USES["SoftmaxValueMixLocalFn-refused"]
    grads = torch.autograd.grad(function(*inputs).pow(2).sum(), inputs, create_graph=True)
    for grad in grads:
        grad *= 2
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(grad.sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_second_derivative_is_refused_where_the_first_one_has_no_graph_of_its_own(wanted):
    # dV = A^T dO with a constant dO depends on the scores alone, which are not kept.
    _, function, inputs = USES["SoftmaxValueMixLocalFn-refused"]
    _, grad_value = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="SoftmaxValueMixLocalFn has no second derivative"):
        torch.autograd.grad(grad_value.pow(2).sum() + inputs[wanted].sum(), inputs[wanted])


class Cube(LocalFunction):
    """x^3 with a derivative that is kept instead of x, as a number that knows nothing of x."""

    twice = False

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, 3 * x * x)
        return x * x * x

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * ctx.saved_tensors[1]


def test_a_derivative_that_is_a_constant_to_torch_is_refused_on_the_way_to_the_input():
    x = normal(T).requires_grad_(True)
    (grad,) = torch.autograd.grad(Cube.apply(x).sum(), x, create_graph=True)
    assert torch.equal(grad, 3 * x * x)
    with pytest.raises(RuntimeError, match="Cube has no second derivative"):
        torch.autograd.grad(grad.sum() + x.sum(), x)


def test_subclasses_with_another_backward_pass_are_refused_too():
    class Other(SoftmaxValueMix):
        @staticmethod
        def backward(ctx, grad_output):
            attention, value, _ = ctx.saved_tensors
            return attention * (grad_output @ value.mT), attention.mT @ grad_output

    s, v = x(T, S), x(S, D, seed=1)
    grads = torch.autograd.grad(Other.apply(s, v).pow(2).sum(), (s, v), create_graph=True)
    with pytest.raises(RuntimeError, match="Other has no second derivative"):
        torch.autograd.grad(grads[0].sum(), s)


# What torch.compile uses of PyTorch is partly deprecated by PyTorch.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("use", ["SoftmaxValueMixLocalFn-refused", "LayerNormSurrogateFunction-projected"])
def test_functions_compile_into_one_graph(use):
    torch._dynamo.reset()
    _, function, inputs = USES[use]
    compiled = torch.compile(lambda *inputs: 3 * function(*inputs), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(3 * function(*inputs).pow(2).sum(), inputs)
    for a, b in zip(torch.autograd.grad(compiled(*inputs).pow(2).sum() / 3, inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------ in place


@every_use
def test_a_change_in_place_is_right_or_refused(use):
    _, function, inputs = USES[use]
    inputs = [t.detach().clone().requires_grad_(True) for t in inputs]
    expected = torch.autograd.grad((function(*inputs) / 2).pow(3).sum(), inputs)
    try:
        y = function(*inputs)
        y /= 2
        found = torch.autograd.grad(y.pow(3).sum(), inputs)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error) or "modified inplace" in str(error)
        return
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "use",
    [
        "SigmoidSTE-",
        "SigmoidValueMixFn-",
        "HardTopK-",
        "_NearestDirection-",
        "_NearestDirection-3-fixed-tangent",
        "_RoundedStraightThrough-",
        "LayerNormSurrogateFunction-projected",
    ],
)
def test_a_change_in_place_works_where_nothing_returned_is_kept(use):
    _, function, inputs = USES[use]
    y = function(*inputs)
    y /= 2
    torch.autograd.grad(y.sum(), inputs)


# ------------------------------------------------------------ strides, empty tensors, half precision

ELEMENTWISE = {
    "sigmoid": SigmoidSTE.apply,
    "gelu": GELUSTE.apply,
    "relu": lambda x: GELUStepSurrogate.apply(x, "relu"),
    "steps": lambda x: GELUStepSurrogate.apply(x, "steps"),
    "winners": lambda x: HardTopK.apply(x, 2),
    "codes": VQResidualDir(C, 11),
    "codes-tangent": VQResidualDir(C, 11, groups=2, backward="tangent"),
    "codes-rotation": VQResidualDir(C, 11, groups=3, rms="fixed", backward="rotation"),
    "rounded": UniformRounding(4),
    "projected": LayerNormProjectedSurrogate(C, "projected"),
    "scale": LayerNormProjectedSurrogate(C, "scale"),
    "center_scale": LayerNormProjectedSurrogate(C, "center_scale"),
    "ln-ste": LayerNormSTE(C),
}
LAYOUTS = {
    "transposed": lambda: normal(C, T, B).permute(2, 1, 0),
    "rows-transposed": lambda: normal(C, T).T,
    "expanded": lambda: normal(1, C).expand(T, C),
    "strided": lambda: normal(B, T, 2 * C)[..., ::2],
    "empty": lambda: normal(0, C),
    "one-row": lambda: normal(C),
}


def value_and_gradient(function, x, g):
    x = x.detach().requires_grad_(True)
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, g)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", ELEMENTWISE)
def test_layout_and_precision_of_an_input_do_not_matter(operation, layout, dtype):
    function = ELEMENTWISE[operation]
    given = LAYOUTS[layout]().to(dtype)
    x = (
        torch.empty_strided(given.shape, given.stride(), dtype=dtype).copy_(given)
        if layout != "expanded"
        else given
    )
    g = normal(*x.shape, seed=1).to(dtype).transpose(0, -1).contiguous().transpose(0, -1)
    y, grad = value_and_gradient(function, x, g)
    expected = value_and_gradient(function, x.contiguous().float(), g.contiguous().float())
    limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert y.shape == grad.shape == x.shape and grad.dtype == dtype
    torch.testing.assert_close(y.float(), expected[0], rtol=limit, atol=limit)
    torch.testing.assert_close(grad.float(), expected[1], rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_are_cut_where_they_are_in_half_precision_too(dtype):
    x = torch.arange(-1, 1, 1e-4).to(dtype).unique()
    g = torch.ones_like(x)
    half = value_and_gradient(lambda x: GELUStepSurrogate.apply(x, "steps"), x, g)[1]
    whole = value_and_gradient(lambda x: GELUStepSurrogate.apply(x, "steps"), x.float(), g.float())[1]
    assert torch.equal(half, whole.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_codes_and_norms_of_half_tokens_are_rounded_once(groups, dtype):
    vq, h = VQResidualDir(C, 11, groups=groups), normal(B, T, C, dtype=dtype)
    assert torch.equal(vq.codes(h), vq.codes(h.float()))
    assert torch.equal(vq(h), vq(h.float()).to(dtype))
    with exact_derivatives(vq):
        assert torch.equal(vq(h), vq(h.float()).to(dtype))
    # The sum of squares of a long token is beyond float16, its norm is not.
    long = torch.full((1, C), 2e4, dtype=dtype)
    assert torch.equal(vq(long), vq(long.float()).to(dtype))


@pytest.mark.parametrize("shape", [(B, 2, T, S), (T, S), (B, T, S)], ids=str)
def test_scores_and_values_of_any_layout(shape):
    scores = normal(*shape[:-2], shape[-1], shape[-2]).mT
    value = normal(*shape[:-2], D, S, seed=1).mT
    found = SoftmaxValueMix.apply(scores, value)
    torch.testing.assert_close(found, functional.softmax(scores.contiguous(), -1) @ value.contiguous())
