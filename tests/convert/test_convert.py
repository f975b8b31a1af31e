"""localize: foreign modules learn by a rule, compared with references that know nothing of the package."""

import copy
from functools import partial

import pytest
import torch
from cases import normal, off_start
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from localgpt_core import RULES, LocalLinear, RuleOptions, localize, weight_transport
from localgpt_core.common.modes import exact_derivatives
from localgpt_core.layers.linear import LocalLayer
from localgpt_core.measure.alignment import feedback_cosines

B, T, V = 3, 5, 17
LAYERS = {
    "transformer.h.0.attn.c_attn": (12, 36),
    "transformer.h.0.attn.c_proj": (12, 12),
    "transformer.h.0.mlp.c_fc": (12, 28),
    "transformer.h.0.mlp.c_proj": (28, 12),
    "lm_head": (12, V),
}
METHODS = ["bp", "dfa", "fa", "kp", "sign_sym", "wm"]
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def gpt2(dtype=torch.float64, n_layer=1, dropout=0.0, tied=True):
    torch.manual_seed(2)
    model = GPT2LMHeadModel(
        GPT2Config(
            **{"n_layer": n_layer, "n_head": 2, "n_embd": 12, "n_inner": 28, "n_positions": 16},
            **{"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": tied},
            **{"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout},
        )
    )
    return off_start(model.to(dtype)).train()


def batch(rows=B, seed=5):
    ids = torch.randint(V, (rows, T + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def cross_entropy(model, idx, targets):
    return functional.cross_entropy(model(idx).logits.flatten(0, 1), targets.flatten())


def gradients(model, *data):
    model.zero_grad(set_to_none=True)
    cross_entropy(model, *(data or batch())).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def same(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, **(tolerance or CLOSE), msg=lambda m, n=name: n + m
        )


def differ(actual, expected):
    return {name for name, g in expected.items() if not torch.allclose(actual[name], g, rtol=1e-6, atol=1e-9)}


def options(method, output="lm_head", **more):
    return {"method": method, **({"output": output} if method == "dfa" else {}), **more}


def mlp(dtype=torch.float64):
    torch.manual_seed(4)
    return off_start(
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    )


# ------------------------------------------------------------ what stays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_logits_parameters_and_random_state_stay(method, dtype):
    model = gpt2(dtype)
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    model.transformer.h[0].attn.eval()
    idx, _ = batch()
    logits, parameters = model(idx).logits, dict(model.named_parameters())
    modes = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad():
        quiet = model(idx).logits
    state = torch.get_rng_state()
    localized = localize(model, **options(method))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(idx).logits, logits)
    with torch.no_grad():
        assert torch.equal(model(idx).logits, quiet)
    with exact_derivatives(model):
        assert torch.equal(model(idx).logits, logits)
    assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.transformer.h[0].mlp.c_fc.weight.requires_grad
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(buffer.dtype == dtype for layer in localized.layers.values() for buffer in layer.buffers())
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in localized.layers.items()}
    assert sizes == LAYERS and localized.changed == tuple(LAYERS)
    kinds = {name: type(model.get_submodule(name)) for name in LAYERS}
    assert all(issubclass(kind, LocalLayer) for kind in kinds.values())
    assert [n for n, kind in kinds.items() if issubclass(kind, Conv1D)] == [
        n for n in LAYERS if n != "lm_head"
    ]
    assert not issubclass(kinds["transformer.h.0.mlp.c_fc"], nn.Linear) and issubclass(
        kinds["lm_head"], nn.Linear
    )


def test_state_dicts_go_both_ways():
    original, model = gpt2(), gpt2()
    localize(model, method="fa", seed=1)
    missing = model.load_state_dict(original.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) == {f"{name}.feedback_weight" for name in LAYERS}
    other = off_start(gpt2(), seed=9)
    localize(other, method="fa", seed=2)
    assert differ(gradients(other), gradients(model))
    other.load_state_dict(model.state_dict())
    same(gradients(other), gradients(model), rtol=0, atol=0)


def test_the_feedback_is_a_function_of_seed_and_name():
    first, again, other = (localize(gpt2(), method="fa", seed=seed).layers for seed in (1, 1, 2))
    narrow = localize(gpt2(), method="fa", seed=1, filter=lambda name, child: "c_fc" in name).layers
    fixed = [localize(gpt2(), method="fa", seed=s, feedback_seed=3).layers["lm_head"] for s in (1, 2)]
    for name, layer in first.items():
        assert torch.equal(layer.buffer, again[name].buffer)
        assert not torch.equal(layer.buffer, other[name].buffer)
    (name,) = narrow
    assert torch.equal(narrow[name].buffer, first[name].buffer)
    assert torch.equal(fixed[0].buffer, fixed[1].buffer)
    twins = [
        layer.buffer
        for name, layer in localize(gpt2(n_layer=2), method="fa").layers.items()
        if "c_fc" in name
    ]
    assert len(twins) == 2 and not torch.equal(*twins)


def test_hooks_move_along():
    network, seen = mlp(), []
    handle = network[0].register_forward_hook(lambda module, args, y: seen.append(type(module)))
    localize(network, method="fa")
    network(normal(4, 3))
    assert issubclass(seen[0], LocalLinear)
    handle.remove()
    network(normal(4, 3))
    assert len(seen) == 1


# ------------------------------------------------------------ gradients


def test_bp_is_the_unconverted_model():
    model = gpt2()
    expected = gradients(model)
    localize(model, method="bp")
    same(gradients(model), expected)


@pytest.mark.parametrize("method", ["fa", "kp", "wm"])
def test_with_the_weight_as_feedback_it_is_backpropagation(method):
    model = gpt2()
    expected = gradients(model)
    localized = localize(model, **options(method))
    assert differ(gradients(model), expected)
    for layer in localized.layers.values():
        layer.buffer.copy_(layer.matrix)
    same(gradients(model), expected)


def test_two_layers_by_hand():
    network, x, g = mlp()[:3], normal(7, 3), normal(7, 4, seed=8)
    localize(network, method="fa")
    network(x).backward(g)
    h = torch.tanh(functional.linear(x, network[0].weight, network[0].bias))
    delta = g @ network[2].feedback_weight * (1 - h**2)
    torch.testing.assert_close(network[2].weight.grad, g.T @ h, **CLOSE)
    torch.testing.assert_close(network[0].weight.grad, delta.T @ x, **CLOSE)
    torch.testing.assert_close(network[0].bias.grad, delta.sum(0), **CLOSE)


def test_direct_feedback_by_hand():
    network, x, targets = mlp(), normal(7, 3), normal(7, 2, seed=8)
    localized = localize(network, method="dfa", output="4")
    assert [layer.is_output for layer in localized.layers.values()] == [False, False, True]
    assert [tuple(layer.buffer.shape) for layer in localized.layers.values()] == [(2, 3), (2, 5), (2, 4)]
    logits = network(x)
    (logits - targets).square().sum().backward()
    e = 2 * (logits - targets).detach()
    h1 = torch.tanh(functional.linear(x, network[0].weight, network[0].bias))
    h2 = torch.tanh(functional.linear(h1, network[2].weight, network[2].bias))
    delta2 = e @ network[4].feedback_weight * (1 - h2**2)
    delta1 = e @ network[2].feedback_weight * (1 - h1**2)
    for layer, want in ((network[4], e.T @ h2), (network[2], delta2.T @ h1), (network[0], delta1.T @ x)):
        torch.testing.assert_close(layer.weight.grad, want.detach(), **CLOSE)


def reference(method, model, localized):
    """Return the gradients of an unconverted copy: plain operations whose derivative is the rule."""
    copied, entered = gpt2(), []
    copied.load_state_dict(model.state_dict(), strict=False)
    for name, layer in localized.layers.items():
        child = copied.get_submodule(name)

        def forward(x, child=child, layer=layer, direct=method == "dfa" and name != "lm_head"):
            weight = child.weight.T if isinstance(child, Conv1D) else child.weight
            bias = 0.0 if child.bias is None else child.bias
            feedback = layer.buffer * weight.detach().sign() if method == "sign_sym" else layer.buffer
            if direct:
                entered.append((x, feedback))
                return x.detach() @ weight.T + bias
            return x.detach() @ weight.T + (x - x.detach()) @ feedback.T + bias

        child.forward = forward
    idx, targets = batch()
    logits = copied(idx).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    (error,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (loss + sum((x * (error @ feedback)).sum() for x, feedback in entered)).backward()
    return {name: parameter.grad for name, parameter in copied.named_parameters()}


@pytest.mark.parametrize("method", ["fa", "dfa", "sign_sym", "kp"])
def test_gpt2_follows_the_rule(method):
    model = gpt2()
    exact = gradients(model)
    localized = localize(model, **options(method))
    actual = gradients(model)
    same(actual, reference(method, model, localized))
    assert differ(actual, exact) >= {"transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight"}
    with exact_derivatives(model):
        same(gradients(model), exact)


class Encoder(nn.Module):
    """Layers 6 -> 11 -> 6 behind attention, a head 6 -> 4, tokens in front."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        layer = nn.TransformerEncoderLayer(6, 2, 11, dropout=0.0, batch_first=True, dtype=torch.float64)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(6, 4, dtype=torch.float64)
        off_start(self)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_learns_and_its_attention_stays_exact(method):
    model, x = Encoder(), normal(2, 5, 6)

    def grads():
        model.zero_grad(set_to_none=True)
        model(x).square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected, y = grads(), model(x)
    with torch.no_grad():
        fused = model.eval()(x)
    model.train()
    localized = localize(model, **options(method, output="head"))
    assert torch.equal(model(x), y)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), fused)
    model.train()
    actual = grads()
    assert localized.changed == (
        *("body.layers.0.linear1", "body.layers.0.linear2", "body.layers.1.linear1", "body.layers.1.linear2"),
        "head",
    )
    reasons = {
        "self_attn.in_proj_weight": "a parameter that MultiheadAttention uses itself",
        "self_attn.out_proj": "nn.MultiheadAttention uses its weight without calling it",
    }
    assert localized.exact == {f"body.layers.{i}.{n}": words for i in (0, 1) for n, words in reasons.items()}
    changed = differ(actual, expected)
    assert ("body.layers.0.linear1.weight" in changed) == (method != "bp")
    assert not changed & {"head.weight", "head.bias"}


def test_autocast_keeps_the_parameters_dtype():
    model = gpt2(torch.float32)
    expected = gradients(model)
    localize(model, method="bp")
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(model)
    for name, gradient in actual.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < 0.1 * expected[name].norm() + 1e-4, name


# ------------------------------------------------------------ taps that nobody passes on


def converted(**more):
    network = mlp()
    return network, localize(network, method="dfa", output="4", **more), normal(7, 3), normal(6, 3, seed=9)


def grads_of(network, *losses):
    """Return the gradients of the sum of ``losses``, each a function without arguments."""
    network.zero_grad(set_to_none=True)
    sum(loss() for loss in losses).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def test_two_passes_before_one_backward():
    network, _, x1, x2 = converted()
    first = grads_of(network, lambda: network(x1).square().sum())
    second = grads_of(network, lambda: network(x2).exp().sum())
    both = grads_of(network, lambda: network(x1).square().sum(), lambda: network(x2).exp().sum())
    same(both, {name: first[name] + second[name] for name in first})


def test_nothing_is_left_behind_and_nothing_piles_up():
    network, localized, x, _ = converted()
    taps = localized.layers["0"].taps
    network(x).sum().backward()
    assert not taps.waiting
    with torch.no_grad():
        network(x)
    assert not taps.waiting
    for _ in range(5):
        network[:3](x)
    assert {name: len(kept) for name, kept in taps.waiting.items()} == {"0": 1, "2": 1}


def test_a_pass_that_breaks_off_reaches_no_later_graph():
    network, localized, x1, x2 = converted()
    expected = grads_of(network, lambda: network(x1).square().sum())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        nn.Sequential(network[0], network[2], nn.Linear(3, 2).double(), network[4])(x2)
    assert len(localized.layers["0"].taps.waiting) == 2
    # The second layer is not asked in this pass, its old tap is still there.
    short = nn.Sequential(network[0], nn.Linear(5, 4).double(), network[4])
    network.zero_grad(set_to_none=True)
    short(x1).sum().backward()
    assert network[0].weight.grad.any() and network[2].weight.grad is None
    same(grads_of(network, lambda: network(x1).square().sum()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("parts", ["blocks", "all"])
def test_checkpointing_changes_no_bit(parts):
    network, localized, x, _ = converted()
    x.requires_grad_(True)
    expected = grads_of(network, lambda: network(x).square().sum())

    def loss():
        if parts == "all":
            return checkpoint(network, x, use_reentrant=False).square().sum()
        h = checkpoint(network[:2], x, use_reentrant=False)
        return network[4](checkpoint(network[2:4], h, use_reentrant=False)).square().sum()

    for _ in range(3):
        same(grads_of(network, loss), expected, rtol=0, atol=0)
        assert sum(map(len, localized.layers["0"].taps.waiting.values())) <= 2


def recomputed(forward, calls, *args, **kwargs):
    def call(*inner):
        calls.append(1)
        return forward(*inner, **kwargs)

    return checkpoint(call, *args, use_reentrant=False)


@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_gradient_checkpointing_of_gpt2_changes_no_bit(method):
    model = gpt2(n_layer=2, dropout=0.1)
    localize(model, **options(method))
    torch.manual_seed(1)
    expected = gradients(model)
    calls = []
    for block in model.transformer.h:
        block.forward = partial(recomputed, block.forward, calls)
    for _ in range(2):
        torch.manual_seed(1)
        same(gradients(model), expected, rtol=0, atol=0)
    assert len(calls) == 2 * 2 * len(model.transformer.h)


def test_a_layer_that_is_called_twice_gets_both_errors():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.a, self.head = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()

        def forward(self, x):
            return self.head(self.a(torch.tanh(self.a(x))))

    network, x = Twice(), normal(7, 3).requires_grad_(True)
    localize(network, method="dfa", output="head")
    logits = network(x)
    logits.sum().backward()
    e, w = torch.ones(7, 2, dtype=torch.float64), network.a
    z = functional.linear(x, w.weight, w.bias)
    last, first = e @ network.head.feedback_weight, e @ w.feedback_weight * (1 - torch.tanh(z) ** 2)
    torch.testing.assert_close(w.weight.grad, (last.T @ torch.tanh(z) + first.T @ x).detach(), **CLOSE)
    torch.testing.assert_close(x.grad, e @ w.feedback_weight, **CLOSE)


def test_tokens_that_are_not_the_outputs_are_refused():
    network = nn.Sequential(nn.Linear(3, 5), nn.Flatten(0, 1), nn.Linear(5, 2)).double()
    localize(network, method="dfa", output="2")
    match = r"layer '0'=\(4, 6, 2\): must begin with the dimensions of the output '2', \(24, 2\), without"
    with pytest.raises(ValueError, match=match):
        network(normal(4, 6, 3))


class Pooled(nn.Module):
    """(B, T, 3) -> (B, T, 5) -> (B, 5) or, by the last token, (5,) or (B, 5) -> (.., 2)."""

    def __init__(self, pool=lambda h: h.mean(dim=-2)):
        super().__init__()
        torch.manual_seed(6)
        self.up, self.mid, self.head = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)
        self.pool = pool
        off_start(self.double())

    def forward(self, x):
        return self.head(self.pool(torch.tanh(self.mid(torch.tanh(self.up(x))))))


@pytest.mark.parametrize("shape", [(3, 6, 3), (6, 3)], ids=["batch", "one sample"])
@pytest.mark.parametrize("pool", [lambda h: h.mean(dim=-2), lambda h: h[..., 0, :]], ids=["mean", "first"])
def test_every_token_gets_the_whole_error_of_its_sample(pool, shape):
    network, x = Pooled(pool), normal(*shape)
    localized = localize(network, method="dfa", output="head")
    logits = network(x)
    logits.square().sum().backward()
    up, mid = network.up, network.mid
    want_up, want_mid = torch.zeros_like(up.weight), torch.zeros_like(mid.weight)
    samples = zip(x.view(-1, 6, 3), (2 * logits.detach()).view(-1, 2), strict=True)
    for tokens, e in samples:
        for token in tokens:
            h1 = torch.tanh(up.weight @ token + up.bias).detach()
            enters = (e @ mid.feedback_weight) * (1 - h1**2)
            want_up += torch.outer(enters, token)
    torch.testing.assert_close(up.weight.grad, want_up, **CLOSE)
    # The gradient of mid is exact: what the head sends back, divided or picked by the pool.
    h1 = torch.tanh(functional.linear(x, up.weight, up.bias)).detach()
    h2 = torch.tanh(functional.linear(h1, mid.weight, mid.bias)).detach().requires_grad_(True)
    (back,) = torch.autograd.grad(pool(h2), h2, 2 * logits.detach() @ network.head.feedback_weight)
    want_mid = ((back * (1 - h2.detach() ** 2)).reshape(-1, 4)).T @ h1.reshape(-1, 5)
    torch.testing.assert_close(mid.weight.grad, want_mid, **CLOSE)
    assert not localized.layers["up"].taps.waiting


class Conditioned(nn.Module):
    """What is computed from the sample alone works on fewer tokens than the output has."""

    def __init__(self):
        super().__init__()
        self.mid, self.head = nn.Linear(3, 5).double(), nn.Linear(5, 4).double()

    def forward(self, x, t=4):
        return self.head(torch.tanh(self.mid(x))[:, None].expand(-1, t, -1))


@pytest.mark.parametrize("t", [1, 4])
def test_fewer_tokens_than_the_outputs_are_refused(t):
    network = Conditioned()
    localize(network, method="dfa", output="head")
    match = rf"layer 'mid'=\(2, 4\): must begin with the dimensions of the output 'head', \(2, {t}, 4\)"
    with pytest.raises(ValueError, match=match):
        network(normal(2, 3), t)


# ------------------------------------------------------------ moving feedback


@pytest.mark.parametrize("more", [{"fa_grape": True}, {"method": "wm", "mirror_n_probe": 100}], ids=str)
def test_alignment_turns_the_feedback_towards_the_weight(more):
    model = gpt2()
    localized = localize(model, **{"method": "fa", **more})
    before = feedback_cosines(model, batch()[0])
    for step in range(20):
        localized.align_feedback(1, "probes", step)
    after = feedback_cosines(model, batch()[0])
    assert before.keys() == after.keys() == LAYERS.keys()
    assert max(map(abs, before.values())) < 0.5 < 0.8 < min(after.values())


def test_alignment_before_the_first_step():
    start, later = (localize(gpt2(), method="fa", fa_grape=True, fa_grape_start=n) for n in (0, 3))
    for step in range(3):
        start.align_feedback(0, "start", step)
    assert all(torch.equal(start.layers[n].buffer, later.layers[n].buffer) for n in LAYERS)


def test_kolen_pollack_shrinks_the_difference_by_the_decay():
    model = gpt2()
    localized = localize(model, method="kp")
    lr, decay = 0.01, 2.0
    pairs = list(localized.mirrored())
    assert [weight is localized.layers[n].weight for n, (weight, _) in zip(LAYERS, pairs, strict=True)]
    parameters = [*model.parameters(), *(feedback for _, feedback in pairs)]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)

    def differences():
        return {n: (layer.matrix - layer.buffer).detach() for n, layer in localized.layers.items()}

    for seed in range(3):
        before = differences()
        gradients(model, *batch(seed=seed))
        localized.mirror_gradients()
        optimizer.step()
        for name, difference in differences().items():
            torch.testing.assert_close(difference, (1 - lr * decay) * before[name], rtol=1e-10, atol=1e-13)


def test_a_frozen_weight_has_no_mirror_and_a_missing_gradient_is_none():
    network = mlp()
    network[0].weight.requires_grad_(False)
    localized = localize(network, method="kp")
    localized.mirror_gradients()
    assert [weight is network[i].weight for i, (weight, _) in zip((2, 4), localized.mirrored(), strict=True)]
    assert all(feedback.grad is None for _, feedback in localized.mirrored())


class WithLoss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets):
        logits = self.model(idx).logits
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("method", ["bp", "fa", "dfa", "sign_sym"])
def test_weight_transport_of_gpt2_with_tied_weights(method):
    model = gpt2()
    localize(model, **options(method))
    reads = weight_transport(WithLoss(model), *batch())
    assert reads == {f"model.{name}": RULES[method].transports for name in LAYERS}


# ------------------------------------------------------------ what is chosen, undone, told


def test_two_conversions_are_equal_only_if_they_are_one():
    model = nn.Sequential(nn.Linear(3, 2))
    first = localize(model, method="bp")
    first.restore()
    second = localize(model, method="bp")
    assert first.changed == second.changed
    assert first != second and len({first, second, first}) == 2


def test_restore_is_exact_and_may_be_repeated():
    model = gpt2()
    modules = dict(model.named_modules())
    expected, keys = gradients(model), list(model.state_dict())
    localized = localize(model, method="dfa", output="lm_head")
    gradients(model)
    model.eval()
    localized.restore()
    localized.restore()
    assert dict(model.named_modules()) == modules and list(model.state_dict()) == keys
    assert not any(module.training for module in model.modules())
    same(gradients(model.train()), expected, rtol=0, atol=0)
    again = localize(model, method="fa")
    localized.restore()
    assert again.changed == tuple(LAYERS)
    assert all(model.get_submodule(name) is layer for name, layer in again.layers.items())


def test_the_filter_and_the_report():
    model, asked = gpt2(), {}

    def only_the_mlp(name, child):
        asked[name] = type(child)
        return ".mlp." in name

    localized = localize(model, method="fa", filter=only_the_mlp)
    assert {name: asked[name] for name in LAYERS} == dict.fromkeys(list(LAYERS)[:-1], Conv1D) | {
        "lm_head": nn.Linear
    }
    left = [name for name in LAYERS if ".mlp." not in name]
    assert localized.exact == dict.fromkeys(left, "left out by the filter")
    assert str(localized).splitlines() == [
        "method='fa': 2 layers changed, 3 exact",
        "changed",
        "  transformer.h.0.mlp.c_fc     12 -> 28",
        "  transformer.h.0.mlp.c_proj   28 -> 12",
        "exact",
        "  transformer.h.0.attn.c_attn  left out by the filter",
        "  transformer.h.0.attn.c_proj  left out by the filter",
        "  lm_head                      left out by the filter",
        "loop",
        "  optimizer = torch.optim.AdamW(module.parameters())",
        "  for x, y in batches:",
        "      optimizer.zero_grad()",
        "      loss_fn(module(x), y).backward()",
        "      optimizer.step()",
    ]
    rest = localize(model, method="sign_sym", filter=lambda name, child: name in left)
    assert rest.changed == tuple(left) and not rest.exact
    assert differ(gradients(model), gradients(gpt2()))


def test_the_output_of_any_rule_is_marked():
    localized = localize(gpt2(), method="fa", fa_grape=True, fa_grape_head=False, output="lm_head")
    head = localized.layers["lm_head"]
    before = head.buffer.clone()
    localized.align_feedback(0)
    assert head.is_output and torch.equal(head.buffer, before)
    assert str(localized).splitlines()[6].endswith("12 -> 17, the output")


def test_a_layer_with_two_names_is_replaced_once():
    shared = nn.Linear(3, 3)
    network = nn.Sequential(shared, nn.Tanh(), shared)
    localized = localize(network, method="kp")
    assert network[0] is network[2] is localized.layers["0"] is localized.layers["2"]
    assert len(list(localized.mirrored())) == 1
    localized.restore()
    assert network[0] is network[2] is shared


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Renamed(nn.Linear):
    pass


def test_what_cannot_be_replaced_is_left_and_told():
    network = nn.Sequential(
        OwnForward(3, 4),
        Renamed(4, 5),
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6)),
        nn.LazyLinear(7),
        nn.Bilinear(7, 8, 9),
        nn.Embedding(2, 3),
    )
    localized = localize(network, method="fa")
    assert localized.changed == ("1",)
    missing = "its weight is computed from other parameters, or not there yet"
    assert {name: localized.exact[name] for name in "0234" if name in localized.exact} == {
        "0": "has a forward pass of its own",
        "2": missing,
        "3": missing,
    }
    assert localized.exact["4.weight"] == "a parameter that Bilinear uses itself"
    assert not any(name.startswith("5") for name in localized.exact)


@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_a_deepcopy_is_independent(method):
    model = gpt2()
    localized = localize(model, **options(method))
    model.transformer(batch()[0])  # leaves taps behind
    twin = copy.deepcopy(model)
    expected = gradients(model)
    same(gradients(twin), expected, rtol=0, atol=0)
    taps = {id(module.taps) for module in twin.modules() if isinstance(module, LocalLinear)}
    assert len(taps) == 1 and id(localized.layers["lm_head"].taps) not in taps
    twin.lm_head.feedback_weight.mul_(2)
    with torch.no_grad():
        twin.transformer.h[0].mlp.c_fc.weight.mul_(2)
    same(gradients(model), expected, rtol=0, atol=0)
    assert differ(gradients(twin), expected)


# What torch.compile uses of PyTorch is partly deprecated, and it looks at .grad of what is no leaf.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("method", ["fa", "dfa"])
def test_a_compiled_model_gives_the_same_gradients(method):
    torch._dynamo.reset()
    model = gpt2(torch.float32)
    localize(model, **options(method))
    data = [batch(), batch(seed=6)]
    expected = [gradients(model, *pair) for pair in data]
    compiled = torch.compile(model, backend="aot_eager")
    for pair, want in zip(data, expected, strict=True):
        model.zero_grad(set_to_none=True)
        cross_entropy(compiled, *pair).backward()
        same({name: p.grad for name, p in model.named_parameters()}, want, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({}, "method=None: allowed are 'bp', 'fa'"),
        ({"method": "fb"}, "method='fb': allowed are 'bp', 'fa'"),
        ({"method": "fa", "grape": True}, "option='grape': allowed are 'method', 'fa_init_mode'"),
        ({"method": "fa", "jvp_rate": 0.1}, "jvp_rate=0.1: has no effect with method='fa'"),
        ({"method": "dfa"}, "output=None: method='dfa' needs the name of the output layer: one of 0, 2, 4"),
        ({"method": "dfa", "output": "1"}, "output='1': allowed are '0', '2', '4'"),
        ({"method": "fa", "output": "head"}, "output='head': allowed are '0', '2', '4'"),
        (
            {"method": "dfa", "output": "4", "fa_grape": True, "fa_grape_start": 2},
            r"fa_grape_start=2: needs inputs: call Localized.align_feedback\(step, forward=...\) that often",
        ),
        (
            {"method": "dfa", "output": "4", "fa_grape": True, "jvp_share": 1.0},
            "jvp_share=1.0: has no effect on a module of your own: let forward run it on that share",
        ),
        ({"method": "fa", "options": RuleOptions()}, "options=.*: allowed are options or their fields"),
        ({"method": "fa", "filter": lambda name, child: False}, "module='Sequential': .*: 0 left out by"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_refusals(more, match):
    network = mlp()
    before = list(network)
    with pytest.raises(ValueError, match=match):
        localize(network, **more)
    assert list(network) == before


def test_what_holds_no_layer_or_a_localized_one_is_refused():
    with pytest.raises(ValueError, match="module='Linear': a layer is replaced in the module that holds it"):
        localize(nn.Linear(3, 2), method="fa")
    with pytest.raises(ValueError, match="module='Tanh': holds no linear layer"):
        localize(nn.Tanh(), method="fa")
    network = mlp()
    localize(network, RuleOptions(method="fa"), filter=lambda name, child: name == "2")
    with pytest.raises(ValueError, match="layer='2': learns by method='fa' already"):
        localize(network, method="fa")
    assert isinstance(network[0], nn.Linear) and not isinstance(network[0], LocalLinear)
