"""LocalGPT: names, shapes, start, causality, generation, and the order of a block's parts."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from cases import MODEL_CASES, SIZES, B, T, make_batch, make_model, model_gradients, normal
from torch import nn
from torch.nn import functional

from localgpt_core import FrozenSubspace, HardTopK, LocalGPT, LocalGPTConfig, VQResidualDir
from localgpt_core.bottlenecks import quantised
from localgpt_core.model import gpt as model_module
from localgpt_core.model.blocks import Attention, Block
from localgpt_core.rules.feedback import HoldsFeedback, feedback_drawn_later

V, C, BLOCK = SIZES["vocab_size"], SIZES["n_embd"], SIZES["block_size"]

# ------------------------------------------------------------ names and shapes

LINEARS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.fc", "mlp.proj")
NORM_NAMES = {
    "bp": ("weight", "bias"),
    "ste": ("ln.weight", "ln.bias"),
    "center_scale": ("weight", "bias_param"),
    "projected": ("weight", "bias_param"),
    "scale": ("weight", "bias_param"),
    "none": ("weight", "bias"),
}


def listed_names(config: LocalGPTConfig) -> set[str]:
    """Return the names of a checkpoint, as the original model wrote them, plus the feedback."""
    buffer = {"fa": "feedback_weight", "dfa": "feedback_weight", "sign_sym": "feedback_scale"}
    names = {"tok_emb.weight", "pos_emb.weight", "head.weight"}
    layers = ["head"]
    norms = ["ln_f"]
    for i in range(config.n_layer):
        norms += [f"blocks.{i}.ln1", f"blocks.{i}.ln2"]
        layers += [f"blocks.{i}.{name}" for name in LINEARS]
        names |= {f"blocks.{i}.{name}.weight" for name in LINEARS}
        if config.bias:
            names |= {f"blocks.{i}.{name}.bias" for name in LINEARS}
        if config.sigmoid_bias_mode == "learned":
            names |= {f"blocks.{i}.attn.sig_bias"}
        if config.gated_blocks:
            names |= {f"blocks.{i}.alpha_attn", f"blocks.{i}.alpha_mlp"}
        narrow = config.bottleneck_at in ("", str(i))
        if config.vq_codes and narrow:
            names |= {f"blocks.{i}.vq.codebook"}
        if config.subspace_rank and narrow:
            names |= {f"blocks.{i}.subspace.Q"}
    if config.subspace_embeddings == "constrain":
        names |= {"tok_emb_start", "pos_emb_start"}
    names |= {f"{norm}.{part}" for norm in norms for part in NORM_NAMES[config.ln_mode]}
    if config.method in buffer:
        names |= {f"{layer}.{buffer[config.method]}" for layer in layers}
    return names


@pytest.mark.parametrize("method", ["bp", "fa", "dfa", "sign_sym"])
@pytest.mark.parametrize("options", MODEL_CASES.values(), ids=MODEL_CASES)
def test_the_names_of_a_checkpoint(options, method):
    model = make_model(method=method, **options)
    assert set(model.state_dict()) == listed_names(model.config)


def test_the_shapes_of_a_checkpoint():
    model = make_model(
        method="dfa",
        bias=True,
        sigmoid_bias_mode="learned",
        gated_blocks=True,
        vq_codes=11,
        subspace_rank=4,
        n_layer=1,
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = {
        "tok_emb.weight": (V, C),
        "pos_emb.weight": (BLOCK, C),
        "blocks.0.attn.o_proj.weight": (C, C),
        "blocks.0.attn.o_proj.bias": (C,),
        "blocks.0.attn.o_proj.feedback_weight": (V, C),
        "blocks.0.attn.sig_bias": (),
        "blocks.0.alpha_attn": (1,),
        "blocks.0.alpha_mlp": (1,),
        "blocks.0.mlp.fc.weight": (4 * C, C),
        "blocks.0.mlp.proj.weight": (C, 4 * C),
        "blocks.0.mlp.proj.feedback_weight": (V, 4 * C),
        "blocks.0.vq.codebook": (11, C),
        "blocks.0.subspace.Q": (C, 4),
        "ln_f.weight": (C,),
        "head.weight": (V, C),
        "head.feedback_weight": (V, C),
    }
    assert {name: shapes[name] for name in expected} == expected


def test_num_params_counts_by_hand():
    # Embeddings 7 x 12 + 6 x 12, two blocks of 12 x 12^2 weights and four norm vectors, last norm, head.
    expected = 7 * 12 + 6 * 12 + 2 * (12 * 144 + 4 * 12) + 2 * 12 + 7 * 12
    assert make_model().num_params() == expected
    assert make_model(method="dfa", freeze_emb=True, vq_codes=3).num_params() == expected
    assert make_model(gated_blocks=True, sigmoid_bias_mode="learned").num_params() == expected + 2 * 3
    assert make_model(bias=True).num_params() == expected + 2 * (5 * 12 + 48)


def test_the_head_is_not_tied_and_comes_last():
    model = make_model()
    assert model.head.weight.data_ptr() != model.tok_emb.weight.data_ptr()
    layers = list(model.local_linears())
    assert len(layers) == 1 + 2 * len(LINEARS) and layers[-1] is model.head
    assert [layer.is_output for layer in layers] == [False] * 12 + [True]
    assert not any(type(module) is nn.Linear for module in model.modules())


# ------------------------------------------------------------ loss and start


def test_the_loss_is_the_mean_cross_entropy_in_nats():
    model = make_model()
    idx, targets = make_batch()
    logits, loss = model(idx, targets)
    assert logits.shape == (B, T, V) and loss.shape == ()
    by_hand = 0.0
    for b in range(B):
        for t in range(T):
            row = logits[b, t].tolist()
            by_hand -= row[targets[b, t]] - math.log(sum(math.exp(value) for value in row))
    assert loss.item() == pytest.approx(by_hand / (B * T), rel=1e-12)
    alone, none = model(idx)
    assert torch.equal(alone, logits) and none is None


def test_a_model_at_its_start_knows_nothing():
    model = LocalGPT(LocalGPTConfig(**{**SIZES, "vocab_size": 65, "n_embd": 48}))
    ids = torch.randint(65, (8, BLOCK))
    assert model(ids, ids.roll(1))[1].item() == pytest.approx(math.log(65), abs=0.1)


@pytest.mark.parametrize("length", [BLOCK + 1, 2 * BLOCK])
def test_a_context_beyond_block_size_is_refused(length):
    ids = torch.zeros(B, length, dtype=torch.long)
    with pytest.raises(ValueError, match=f"T={length}: must be at most block_size={BLOCK}"):
        make_model()(ids, ids)


@pytest.mark.parametrize("length", [1, BLOCK])
@pytest.mark.parametrize("options", MODEL_CASES.values(), ids=MODEL_CASES)
def test_every_context_up_to_block_size_works(options, length):
    ids = torch.zeros(B, length, dtype=torch.long)
    logits, loss = make_model(**options)(ids, ids)
    assert logits.shape == (B, length, V) and loss.isfinite()


@pytest.mark.parametrize("bias", [True, False])
def test_the_start_of_the_weights(bias):
    n_layer = 3
    config = LocalGPTConfig(n_layer=n_layer, n_head=2, n_embd=64, vocab_size=60, block_size=50, bias=bias)
    model = LocalGPT(config)
    residual = 0.02 / math.sqrt(2 * n_layer)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = residual if name.endswith(("o_proj.weight", "mlp.proj.weight")) else 0.02
            n = parameter.numel()
            assert parameter.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * n)), name
            assert abs(parameter.mean().item()) < 4 * std / math.sqrt(n), name
        elif name.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert torch.equal(parameter, torch.zeros_like(parameter))


def test_no_two_matrices_start_alike():
    torch.manual_seed(1)
    model = LocalGPT(LocalGPTConfig(**SIZES))
    q, k = model.blocks[0].attn.q_proj.weight, model.blocks[0].attn.k_proj.weight
    assert not torch.equal(q, k) and not torch.equal(q, model.blocks[1].attn.q_proj.weight)


DRAWN = {
    "fa": {"method": "fa", "fa_init_mode": "orthogonal"},
    "fa-seeded": {"method": "fa", "fa_init_mode": "orthogonal", "feedback_seed": 4},
    "dfa-block": {"method": "dfa", "dfa_granularity": "block", "fa_init_mode": "orthogonal"},
    "sign": {"method": "sign_sym", "sign_magnitude": "random"},
}


@pytest.mark.parametrize("case", DRAWN)
def test_feedback_is_drawn_once_at_every_place(case, monkeypatch):
    drawn = []
    draw = HoldsFeedback.reset_feedback
    monkeypatch.setattr(HoldsFeedback, "reset_feedback", lambda at, *key: drawn.append(at) or draw(at, *key))
    model = LocalGPT(LocalGPTConfig(**SIZES, **DRAWN[case]))
    assert drawn == list(model.feedback_places())


def test_an_orthogonal_start_takes_one_decomposition_a_place(monkeypatch):
    shapes = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: shapes.append(tuple(matrix.shape)) or qr(matrix))
    LocalGPT(LocalGPTConfig(**SIZES, **DRAWN["fa"]))
    # Always decomposed upright; q, k, v, o and fc, proj of each block, and the head.
    assert shapes == [*[(C, C)] * 4, (4 * C, C), (4 * C, C)] * 2 + [(C, V)]


@pytest.mark.parametrize("case", DRAWN)
def test_when_feedback_is_drawn_changes_no_number(case, monkeypatch):
    config = LocalGPTConfig(**SIZES, **DRAWN[case])
    torch.manual_seed(1)
    once, after_once = LocalGPT(config).state_dict(), torch.rand(3)
    monkeypatch.setattr(model_module, "feedback_drawn_later", nullcontext)
    torch.manual_seed(1)
    twice, after_twice = LocalGPT(config).state_dict(), torch.rand(3)
    assert torch.equal(after_once, after_twice)
    assert all(torch.equal(tensor, twice[name]) for name, tensor in once.items())


def test_a_part_that_is_built_alone_has_its_feedback():
    block = Block(LocalGPTConfig(**SIZES, **DRAWN["fa"]), 0)
    assert block.mlp.fc.feedback_weight.shape == (4 * C, C)
    with pytest.raises(ZeroDivisionError), feedback_drawn_later():
        raise ZeroDivisionError
    assert Block(LocalGPTConfig(**SIZES, **DRAWN["fa"]), 0).mlp.fc.feedback_weight is not None


def test_options_start_at_nothing():
    idx, _ = make_batch()
    logits = []
    for options in ({}, {"gated_blocks": True}, {"sigmoid_bias_mode": "learned"}, {"bias": True}):
        torch.manual_seed(1)
        logits.append(LocalGPT(LocalGPTConfig(**SIZES, **options)).double()(idx)[0])
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------ attention

MODES = {name: MODEL_CASES[name] for name in ("sigmoid", "ste_sigmoid", "softmax", "fused")}
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


def attention_weights(mixer: Attention, q, k):
    """Return the weights (B, H, T, S) that mix the values."""
    identity = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return mixer.mix(q, k, identity)


@every_mode
def test_masked_weights_are_exactly_zero(options):
    model = make_model(**options)
    q, k = 3 * normal(B, 3, BLOCK, 4), 3 * normal(B, 3, BLOCK, 4, seed=1)
    attn = model.blocks[0].attn
    weights = attention_weights(attn, q, k)
    past = torch.ones(BLOCK, BLOCK, dtype=torch.bool).tril()
    assert not weights[..., ~past].any() and (weights[..., past] > 0).all()
    if "attn_mode" in options:
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, 3, BLOCK, dtype=torch.float64))


@pytest.mark.parametrize(
    ("mode", "bias"), [("neg_log_n", -math.log(BLOCK)), ("zero", 0.0), ("learned", -math.log(BLOCK))]
)
@pytest.mark.parametrize("length", [2, BLOCK])
def test_sigmoid_attention_uses_the_bias_of_block_size_whatever_the_length(mode, bias, length):
    torch.manual_seed(1)
    attn = LocalGPT(LocalGPTConfig(**SIZES, sigmoid_bias_mode=mode)).double().blocks[0].attn
    q, k = normal(B, 3, length, 4), normal(B, 3, length, 4, seed=1)
    weights = attention_weights(attn, q, k)
    expected = torch.sigmoid(q @ k.transpose(-2, -1) / 2 + bias).tril()
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


def test_softmax_attention_is_pytorchs():
    attn = make_model(attn_mode="softmax").blocks[0].attn
    q, k, v = (normal(B, 3, T, 4, seed=seed) for seed in range(3))
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attn.mix(q, k, v), expected, rtol=1e-12, atol=1e-14)


@every_mode
def test_a_mask_of_ones_own_is_the_one_of_the_model(options):
    model = make_model(**options)
    for block in model.blocks:
        block.attn.mix = partial(block.attn.mix, future=~torch.eye(T, dtype=torch.bool))
    idx, _ = make_batch()
    changed = idx.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    logits, other = model(idx)[0], model(changed)[0]  # every token sees itself alone
    assert torch.equal(other[:, 1:], logits[:, 1:]) and not torch.equal(other[:, 0], logits[:, 0])


@pytest.mark.parametrize("options", MODEL_CASES.values(), ids=MODEL_CASES)
def test_no_token_sees_the_future(options):
    model = make_model(**options)
    idx, _ = make_batch()
    logits = model(idx)[0]
    for place in range(1, T):
        changed = idx.clone()
        changed[:, place] = (changed[:, place] + 1) % V
        other = model(changed)[0]
        assert torch.equal(other[:, :place], logits[:, :place])
        assert not torch.equal(other[:, place], logits[:, place])


@every_mode
def test_every_token_sees_its_past(options):
    model = make_model(**options)
    idx, _ = make_batch()
    changed = idx.clone()
    changed[:, 0] = (changed[:, 0] + 1) % V
    difference = (model(changed)[0] - model(idx)[0]).abs().amax(-1)
    assert (difference > 1e-6).all()


# ------------------------------------------------------------ dropout


def test_dropout_follows_the_mode_and_the_seed():
    model = make_model(dropout=0.3)
    idx, _ = make_batch()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model(idx)[0])
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])
    assert torch.equal(model(idx)[0], make_model(dropout=0.0)(idx)[0])


@pytest.mark.parametrize(
    ("options", "calls"),
    [({}, 1 + 3 * 2), ({"attn_mode": "softmax"}, 1 + 3 * 2), (MODES["fused"], 1 + 2 * 2)],
    ids=["sigmoid", "softmax", "fused"],
)
def test_where_dropout_acts(options, calls, monkeypatch):
    # After the embeddings and, per block, on attention weights (not when fused), after o_proj and the MLP.
    shapes = []
    original = functional.dropout

    def spy(x, p, training):
        assert p == 0.3
        shapes.append(tuple(x.shape))
        return original(x, p, training)

    monkeypatch.setattr(functional, "dropout", spy)
    make_model(dropout=0.3, **options)(make_batch()[0])
    assert len(shapes) == calls
    assert shapes.count((B, 3, T, T)) == (0 if "fuse_attn_local" in options else 2)
    assert shapes.count((B, T, C)) == 1 + 2 * 2


# ------------------------------------------------------------ blocks


def test_gates_scale_their_sublayer():
    model = make_model(gated_blocks=True, n_layer=1)
    block = model.blocks[0]
    x = normal(B, T, C)
    with torch.no_grad():
        block.alpha_attn.fill_(0.0)
        block.alpha_mlp.fill_(0.0)
        assert torch.equal(block(x, []), x)
        block.alpha_attn.fill_(2.0)
        attended = x + 2 * block.attn(block.ln1(x), [])
        torch.testing.assert_close(block(x, []), attended, rtol=1e-12, atol=1e-14)
        block.alpha_mlp.fill_(-3.0)
        expected = attended - 3 * block.mlp(block.ln2(attended), [])
        torch.testing.assert_close(block(x, []), expected, rtol=1e-12, atol=1e-14)


def test_bottlenecks_come_in_the_order_topk_vq_subspace():
    options = {"resid_topk": 3, "vq_codes": 11, "subspace_rank": 5, "n_layer": 1}
    model, plain = make_model(**options), make_model(n_layer=1)
    block = model.blocks[0]
    x = normal(B, T, C)
    with torch.no_grad():
        y = HardTopK.apply(plain.blocks[0](x, []), 3)
        vq, subspace = VQResidualDir(C, 11).double(), FrozenSubspace(C, 5).double()
        torch.testing.assert_close(block(x, []), subspace(vq(y)), rtol=1e-12, atol=1e-14)
        assert not torch.allclose(block(x, []), vq(subspace(y)))


@pytest.mark.parametrize("name", ["vq.codebook", "subspace.Q"])
def test_every_block_has_the_same_frozen_matrix(name):
    state = make_model(vq_codes=11, subspace_rank=5).state_dict()
    assert torch.equal(state[f"blocks.0.{name}"], state[f"blocks.1.{name}"])


def test_mlp_topk_keeps_k_hidden_units(monkeypatch):
    model = make_model(mlp_topk=9, n_layer=1)
    seen = []
    inner = model.blocks[0].mlp.proj.forward
    monkeypatch.setattr(model.blocks[0].mlp.proj, "forward", lambda h, taps: seen.append(h) or inner(h, taps))
    model(make_batch()[0])
    assert seen[0].shape == (B, T, 4 * C) and (seen[0] != 0).sum(-1).eq(9).all()


def test_the_norms_come_before_the_sublayers():
    block = make_model(n_layer=1).blocks[0]
    x = normal(B, T, C)
    with torch.no_grad():
        middle = x + block.attn(block.ln1(x), [])
        expected = middle + block.mlp(block.ln2(middle), [])
    torch.testing.assert_close(block(x, []), expected, rtol=1e-12, atol=1e-14)
    assert isinstance(block, Block)


def test_frozen_embeddings_are_listed_and_stay():
    model = make_model(freeze_emb=True)
    assert model.untrained_parameters() == ["tok_emb.weight", "pos_emb.weight"]
    ste = make_model(ln_mode="ste", n_layer=1).untrained_parameters()
    norms = ("blocks.0.ln1", "blocks.0.ln2", "ln_f")
    assert ste == [f"{norm}.ln.{part}" for norm in norms for part in ("weight", "bias")]
    assert make_model().untrained_parameters() == []


# ------------------------------------------------------------ generate


def without_cache(model, idx, new, temperature=1.0, top_k=None, source=None):
    """Return ``idx`` continued, every step computed from the text alone."""
    model.eval()
    for _ in range(new):
        with torch.no_grad():
            row = model(idx[:, -BLOCK:])[0][:, -1] / temperature
        if top_k:
            row = row.masked_fill(row < row.sort(descending=True).values[:, top_k - 1 : top_k], -torch.inf)
        token = torch.multinomial(torch.softmax(row.float(), -1), 1, generator=source)
        idx = torch.cat((idx, token), 1)
    return idx


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"temperature": 0.7}, {"top_k": 3}], ids=str)
@pytest.mark.parametrize("case", [*MODES, "everything-sigmoid"])
@pytest.mark.parametrize("prompt", [1, 4, BLOCK, BLOCK + 2])
def test_the_cache_changes_nothing(prompt, case, sampling):
    model = make_model(**MODEL_CASES[case], dropout=0.2)
    idx = torch.randint(V, (B, prompt))
    cached = model.generate(idx, 2 * BLOCK, **sampling, generator=torch.Generator().manual_seed(3))
    plain = without_cache(model, idx, 2 * BLOCK, **sampling, source=torch.Generator().manual_seed(3))
    assert cached.shape == (B, prompt + 2 * BLOCK)
    assert torch.equal(cached[:, :prompt], idx)
    assert torch.equal(cached, plain)


def test_the_cache_spares_work(monkeypatch):
    model = make_model()
    widths = []
    inner = model.logits
    monkeypatch.setattr(
        model, "logits", lambda idx, caches=None: widths.append(idx.shape[1]) or inner(idx, caches)
    )
    model.generate(torch.zeros(1, 2, dtype=torch.long), BLOCK)
    assert widths == [2, 1, 1, 1, 1, BLOCK]


def lengths_of_halves(block_size, last):
    """Return the lengths of the contexts after 1 ... ``last`` tokens, told step by step."""
    lengths, half = [1], math.ceil(block_size / 2)
    while len(lengths) < last:
        lengths.append(half if lengths[-1] == block_size else lengths[-1] + 1)
    return lengths


@pytest.mark.parametrize("window", ["exact", "halves"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("case", [*MODES, "everything-sigmoid"])
def test_every_token_is_drawn_from_the_context_that_is_documented(case, block_size, window, monkeypatch):
    model = make_model(**MODEL_CASES[case], block_size=block_size, dropout=0.2)
    seen, inner = [], model_module._probabilities
    monkeypatch.setattr(
        model_module, "_probabilities", lambda logits, *more: seen.append(logits) or inner(logits, *more)
    )
    for prompt in (1, block_size, block_size + 1, 2 * block_size + 3):
        idx, new = torch.randint(V, (B, prompt)), 3 * block_size + 2
        seen.clear()
        text = model.generate(idx, new, window=window)
        assert torch.equal(text[:, :prompt], idx) and text.shape == (B, prompt + new) and len(seen) == new
        halves = lengths_of_halves(block_size, prompt + new)
        for n, logits in zip(range(prompt, prompt + new), seen, strict=True):
            length = halves[n - 1] if window == "halves" else min(n, block_size)
            with torch.no_grad():
                fresh = model.eval()(text[:, n - length : n])[0][:, -1]
            torch.testing.assert_close(logits, fresh, rtol=0, atol=1e-12)


def test_the_contexts_of_halves_are_between_a_half_and_a_whole_block():
    assert [model_module._half(n, 4) for n in range(1, 12)] == [1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 2]
    assert [model_module._half(n, 5) for n in range(1, 12)] == [1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5]
    assert [model_module._half(n, 1) for n in range(1, 4)] == [1, 1, 1]
    assert [model_module._half(n, 2) for n in range(1, 7)] == [1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("window", ["exact", "halves"])
def test_a_text_that_is_continued_in_parts_is_the_same(window):
    model, idx = make_model(), torch.randint(V, (B, 2))
    sources = [torch.Generator().manual_seed(4) for _ in range(2)]
    whole = model.generate(idx, 3 * BLOCK + 1, generator=sources[0], window=window)
    for new in (BLOCK, 2, 0, 2 * BLOCK - 1):
        idx = model.generate(idx, new, generator=sources[1], window=window)
    assert torch.equal(idx, whole)


def test_halves_cost_less_than_two_tokens_per_token(monkeypatch):
    model, widths = make_model(block_size=6), []
    inner = model.logits
    monkeypatch.setattr(
        model, "logits", lambda idx, caches: widths.append(idx.shape[1]) or inner(idx, caches)
    )
    model.generate(torch.zeros(1, 2, dtype=torch.long), 5 + 3 * 4, window="halves")
    assert widths == [2, 1, 1, 1, 1, *3 * [3, 1, 1, 1]]  # 6 tokens for 4
    widths.clear()
    model.generate(torch.zeros(1, 9, dtype=torch.long), 4, window="halves")  # at a context of 5
    assert widths == [5, 1, 3, 1]


def test_a_row_with_a_generator_of_its_own_does_not_depend_on_the_rows_beside_it():
    model, idx = make_model(), torch.randint(V, (4, 2))

    def source(row):
        return torch.Generator().manual_seed(10 + row)

    together = model.generate(idx, 2 * BLOCK, generator=[source(row) for row in range(4)])
    for row in range(4):
        alone = model.generate(idx[row : row + 1], 2 * BLOCK, generator=source(row))
        assert torch.equal(together[row : row + 1], alone)
    assert torch.equal(model.generate(idx[:1], 9, generator=[source(0)]), together[:1, : 2 + 9])
    with_same = model.generate(idx[[1, 0, 1]], 9, generator=[source(1), source(5), source(1)])
    assert torch.equal(with_same[0], with_same[2]) and torch.equal(with_same[0], together[1, : 2 + 9])


@pytest.mark.parametrize("training", [True, False])
def test_generate_restores_the_mode_also_when_it_fails(training, monkeypatch):
    model = make_model(dropout=0.5).train(training)
    ids = torch.zeros(1, 2, dtype=torch.long)
    seen = []
    inner = model.logits
    monkeypatch.setattr(model, "logits", lambda *arguments: seen.append(model.training) or inner(*arguments))
    model.generate(ids, 2)
    assert seen == [False, False] and model.training is training
    assert all(module.training is training for module in model.modules())
    with pytest.raises(IndexError):
        model.generate(ids + V, 1)
    assert model.training is training


def test_generate_trains_nothing():
    model = make_model(method="dfa")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = model.generate(torch.zeros(1, 2, dtype=torch.long), 3)
    assert not out.requires_grad and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_generate_samples_from_the_models_distribution():
    model = make_model(n_layer=1).eval()
    prompt = torch.zeros(4000, 1, dtype=torch.long)
    with torch.no_grad():
        logits = model(prompt[:1])[0][0, -1]
    for temperature, top_k in ((1.0, None), (2.0, None), (1.0, 2)):
        tokens = model.generate(prompt, 1, temperature, top_k, torch.Generator().manual_seed(0))[:, 1]
        shares = tokens.bincount(minlength=V).double() / len(prompt)
        row = logits / temperature
        if top_k:
            row[row.argsort()[:-top_k]] = -torch.inf
        expected = torch.softmax(row, -1)
        limit = 4 * (expected * (1 - expected) / len(prompt)).sqrt() + 1e-12
        assert ((shares - expected).abs() <= limit).all(), (temperature, top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-40, 1e-38, 1e-20])
@pytest.mark.parametrize("top_k", [None, 1, 3, V, V + 1])
def test_a_temperature_near_zero_is_greedy(temperature, top_k, dtype):
    model, prompt = make_model(dtype), torch.arange(V)[:, None]
    expected = prompt
    with torch.no_grad():
        for _ in range(4):
            expected = torch.cat((expected, model(expected)[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(prompt, 4, temperature, top_k), expected)


@pytest.mark.parametrize("temperature", [1e30, 1e300, math.inf])
@pytest.mark.parametrize("top_k", [None, 1, 3, V, 1000])
def test_an_infinite_temperature_makes_the_likeliest_tokens_equally_likely(temperature, top_k):
    model, k = make_model(), min(top_k or V, V)
    prompt = torch.zeros(3000, 1, dtype=torch.long)
    with torch.no_grad():
        likeliest = model(prompt[:1])[0][0, -1].topk(k).indices
    tokens = model.generate(prompt, 1, temperature, top_k, torch.Generator().manual_seed(0))[:, 1]
    shares = tokens.bincount(minlength=V).double()[likeliest] / len(prompt)
    assert shares.sum() == 1
    assert ((shares - 1 / k).abs() <= 4 * math.sqrt((1 - 1 / k) / k / len(prompt)) + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
def test_probabilities_at_a_usual_temperature_are_the_plain_softmax_to_the_last_bit(temperature, dtype):
    logits = 3 * normal(50, V, dtype=dtype)
    plain = torch.softmax((logits / temperature).float(), dim=-1)
    assert torch.equal(model_module._probabilities(logits, temperature, None), plain)


def test_logits_that_overflow_beside_others_leave_those_as_they_are():
    logits = torch.tensor([[3e38, 1.0, 2.9e38], [0.5, 1.0, -torch.inf]])
    found = model_module._probabilities(logits, 0.5, None)
    assert found[0].tolist() == [1, 0, 0]
    torch.testing.assert_close(found[1], torch.softmax(torch.tensor([1.0, 2.0, -torch.inf]), -1))


def test_generating_nothing_returns_the_prompt():
    prompt = torch.zeros(B, 2, dtype=torch.long)
    assert torch.equal(make_model().generate(prompt, 0), prompt)


def test_a_top_k_above_the_vocabulary_keeps_everything():
    prompt = torch.zeros(B, 2, dtype=torch.long)
    model = make_model()
    sources = [torch.Generator().manual_seed(0) for _ in range(2)]
    many = model.generate(prompt, 5, top_k=1000, generator=sources[0])
    assert torch.equal(many, model.generate(prompt, 5, generator=sources[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1: must not be negative"),
        ({"temperature": 0.0}, "temperature=0.0: must be positive"),
        ({"temperature": math.nan}, "temperature=nan: must be positive"),
        ({"temperature": -1.0}, "temperature=-1.0: must be positive"),
        ({"temperature": -math.inf}, "temperature=-inf: must be positive"),
        ({"top_k": -3}, "top_k=-3: must be at least 1"),
        ({"top_k": 2.5}, "top_k=2.5: must be an integer"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"window": "half"}, "window='half': allowed are 'exact', 'halves'"),
        ({"window": None}, "window=None: allowed are 'exact', 'halves'"),
        ({"generator": []}, "generator=0: generators for 1 rows; one for each, or one for all"),
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, r"idx.shape=\(1, 0\): must be \(B, T\), T > 0"),
        ({"idx": torch.zeros(3, dtype=torch.long)}, r"idx.shape=\(3,\): must be"),
    ],
    ids=str,
)
def test_generate_checks_its_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate(**{"idx": torch.zeros(1, 2, dtype=torch.long), "max_new_tokens": 1} | arguments)


# ------------------------------------------------------------ what narrows the stream, and where


def test_under_the_constraint_the_stream_is_the_embeddings_plus_a_vector_of_the_subspace():
    model = make_model(subspace_rank=4, subspace_mode="constrain")
    Q, (idx, _) = model.blocks[0].subspace.Q, make_batch()
    embedded = model.tok_emb(idx) + model.pos_emb.weight[: idx.shape[1]]
    x = embedded
    for block in model.blocks:
        x = block(x, [])
        added = x - embedded
        assert (added @ Q @ Q.T - added).norm() < 1e-6 * added.norm()  # Q is rounded to float32
        assert added.norm() > 0.1
    # Projecting the stream itself would have lost most of the embeddings.
    assert (embedded @ Q @ Q.T - embedded).norm() > 0.3 * embedded.norm()


def test_the_constraint_is_one_on_the_output_matrices():
    model = make_model(subspace_rank=4, subspace_mode="constrain")
    plain = make_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    for block, other in zip(model.blocks, plain.blocks, strict=True):
        P = block.subspace.Q @ block.subspace.Q.T
        for layer in (other.attn.o_proj, other.mlp.proj):
            layer.weight.data = P @ layer.weight.data
    idx, targets = make_batch()
    torch.testing.assert_close(model(idx)[0], plain(idx)[0], rtol=1e-10, atol=1e-12)
    gradients, expected = (model_gradients(m, idx, targets) for m in (model, plain))
    for i, block in enumerate(model.blocks):
        P = block.subspace.Q @ block.subspace.Q.T
        for name in (f"blocks.{i}.attn.o_proj.weight", f"blocks.{i}.mlp.proj.weight"):
            torch.testing.assert_close(gradients[name], P @ expected[name], rtol=1e-6, atol=1e-9)


def test_embeddings_that_are_constrained_learn_in_the_subspace_alone():
    options = {"subspace_rank": 4, "subspace_mode": "constrain", "subspace_embeddings": "constrain"}
    model, (idx, targets) = make_model(**options), make_batch()
    Q, T = model.blocks[0].subspace.Q, idx.shape[1]
    # `make_model` has moved the weights: what is used lies in the subspace, seen from the start.
    first = model.tok_emb_start[idx] + model.pos_emb_start[:T]
    whole = model.tok_emb(idx) + model.pos_emb.weight[:T]
    assert (whole - first).norm() > 0.1
    expected = first + (whole - first) @ Q @ Q.T
    torch.testing.assert_close(model.embedded(idx, 0, T), expected, rtol=1e-6, atol=1e-7)
    for name in ("tok_emb.weight", "pos_emb.weight"):
        gradient = model_gradients(model, idx, targets)[name]
        assert gradient.norm() > 0 and (gradient @ Q @ Q.T - gradient).norm() < 1e-6 * gradient.norm()
    # At its start the model is the one with free embeddings.
    torch.manual_seed(7)
    fresh = LocalGPT(LocalGPTConfig(**SIZES, **options))
    torch.manual_seed(7)
    free = LocalGPT(LocalGPTConfig(**SIZES, **options | {"subspace_embeddings": "free"}))
    torch.testing.assert_close(fresh(idx)[0], free(idx)[0])
    assert torch.equal(fresh.tok_emb_start, fresh.tok_emb.weight)


def test_last_blocks_that_are_free_write_outside_of_the_subspace_and_the_first_do_not():
    model = make_model(subspace_rank=4, subspace_mode="constrain", bottleneck_at="0")
    idx, _ = make_batch()
    first, last = model.blocks
    Q, embedded = first.subspace.Q, model.tok_emb(idx) + model.pos_emb.weight[: idx.shape[1]]
    x = first(embedded, [])
    added, free = x - embedded, last(x, []) - x
    assert (added @ Q @ Q.T - added).norm() < 1e-6 * added.norm()
    assert (free @ Q @ Q.T - free).norm() > 0.3 * free.norm() and not hasattr(last, "subspace")


def test_a_bottleneck_stands_where_it_is_asked_for():
    idx, _ = make_batch()
    outputs = {at: make_model(resid_topk=5, bottleneck_at=at)(idx)[0] for at in ("", "0", "1")}
    outputs["none"] = make_model()(idx)[0]
    different = [outputs[at] for at in ("", "0", "1", "none")]
    assert not any(torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    blocks = make_model(vq_codes=11, subspace_rank=5, bottleneck_at="1").blocks
    assert (
        [hasattr(block, "vq") for block in blocks]
        == [hasattr(b, "subspace") for b in blocks]
        == [False, True]
    )


def test_codebooks_are_shared_or_of_each_block_its_own():
    for shared in (True, False):
        first, second = (vq.codebook for vq in make_model(vq_codes=11, vq_shared=shared).codebooks())
        assert torch.equal(first, second) == shared


def test_gates_start_where_asked_and_a_closed_gate_lets_the_stream_through():
    model = make_model(gated_blocks=True, gate_start=0.0)
    for name, parameter in LocalGPT(model.config).named_parameters():
        assert ("alpha" in name) == (parameter.ndim == 1 and not parameter.any() and parameter.numel() == 1)
    for block in model.blocks:
        block.alpha_attn.data.zero_()
        block.alpha_mlp.data.zero_()
    x = torch.randn(2, 5, C, dtype=torch.float64)
    assert torch.equal(model.blocks[0](x, []), x)


@pytest.mark.parametrize("shared", [True, False])
def test_fitted_codebooks_serve_the_stream_better(shared):
    model = make_model(vq_codes=11, vq_shared=shared, vq_init="kmeans", dropout=0.5)
    idx = make_batch(rows=40)[0]
    streams = {}
    for i, vq in enumerate(model.codebooks()):
        vq.register_forward_pre_hook(lambda module, args, i=i: streams.update({i: args[0].detach()}))
    model.train()
    model.fit_codebooks(idx, "key")
    assert model.training and all(vq.in_use for vq in model.codebooks())
    books = [vq.codebook.clone() for vq in model.codebooks()]
    assert torch.equal(*books) == shared
    random = make_model(vq_codes=11).blocks[0].vq
    for i, vq in enumerate(model.codebooks()):
        # The streams are those that the codebooks were fitted to.
        assert (vq(streams[i]) - streams[i]).norm() < 0.8 * (random(streams[i]) - streams[i]).norm()
    model.fit_codebooks(idx, "key")
    assert all(torch.equal(a, vq.codebook) for a, vq in zip(books, model.codebooks(), strict=True))
    with pytest.raises(ValueError, match="k=11: must be at most the (5|10) vectors"):
        model.fit_codebooks(idx[:1], "key")
    assert all(vq.in_use for vq in model.codebooks())


def test_codebooks_that_are_switched_off_for_a_while_are_afterwards_what_they_were():
    model = make_model(vq_codes=11)
    first, second = model.codebooks()
    second.in_use = False
    with quantised(model, True):
        with pytest.raises(ZeroDivisionError), quantised(model, False):
            assert not first.in_use and not second.in_use
            raise ZeroDivisionError
        assert first.in_use and second.in_use
    assert first.in_use and not second.in_use


def test_a_state_dict_says_which_codebooks_are_not_in_use():
    idx, _ = make_batch()
    model, other = make_model(vq_codes=11), make_model(vq_codes=11, seed=2)
    first, second = model.codebooks()
    second.in_use = False
    state = model.state_dict()
    assert "blocks.0.vq.in_use" not in state and not state["blocks.1.vq.in_use"]
    other.load_state_dict(state)
    assert torch.equal(other(idx)[0], model(idx)[0])
    second.in_use = True
    assert not torch.equal(other(idx)[0], model(idx)[0])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(idx)[0], model(idx)[0])


@pytest.mark.parametrize("options", MODEL_CASES.values(), ids=MODEL_CASES)
@pytest.mark.parametrize("method", ["bp", "dfa"])
def test_the_stream_stays_float32_under_autocast(options, method):
    model, seen = make_model(torch.float32, method=method, **options), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    idx, targets = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        model(idx, targets)[1].backward()
    assert seen == [torch.float32] * len(model.blocks)


def test_what_narrows_the_stream_is_the_same_under_autocast():
    h = torch.randn(500, 64)
    vq, subspace = VQResidualDir(64, 300), FrozenSubspace(64, 7)
    expected = vq.codes(h), vq(h), subspace(h)
    with torch.autocast("cpu", torch.bfloat16):
        found = vq.codes(h), vq(h), subspace(h)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_codebooks_of_their_own_are_fitted_with_draws_of_their_own(monkeypatch):
    seeds = []
    monkeypatch.setattr(VQResidualDir, "fit", lambda self, h, source: seeds.append(source.initial_seed()))
    model = make_model(vq_codes=11, vq_shared=False, vq_init="kmeans")
    model.fit_codebooks(make_batch()[0], "key")
    assert len(set(seeds)) == len(model.blocks) == 2
