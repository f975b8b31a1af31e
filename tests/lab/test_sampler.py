"""The models that write in the pages: what they are made of, and that the engine computes what torch does."""

import base64
import sys

import numpy as np
import pytest
import torch
from docutils import nodes
from node import ROOT, needs_node, play

from localgpt_core import LocalGPT, LocalGPTConfig
from localgpt_core.records import read_record

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "book/_ext")]
import sampler  # noqa: E402  an extension of Sphinx, which is no package
import sampler_models  # noqa: E402

KEPT = sorted(sampler.MODELS.glob("*.js"))
ODD = {"vocab_size": 11, "block_size": 7, "n_layer": 3, "n_head": 3, "n_embd": 12}


def moved(config: LocalGPTConfig) -> LocalGPT:
    """Return a model in which attention, GELU and norms are far from their start."""
    torch.manual_seed(2)
    model = LocalGPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            else:
                parameter.mul_(10)
    return model


def unpacked(held: dict) -> LocalGPT:
    """Return the model that a script of the pages holds."""
    model = LocalGPT(LocalGPTConfig(**held["config"])).eval()

    def numbers(text: str, kind: str) -> np.ndarray:
        return np.frombuffer(base64.b64decode(text), dtype=kind)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            entry = held["parameters"][name]
            if "floats" in entry:
                values = numbers(entry["floats"], "<f4")
            else:
                whole = numbers(entry["bytes"], "i1").reshape(parameter.shape)
                values = whole * numbers(entry["scales"], "<f4")[:, None]
            parameter.copy_(torch.from_numpy(values.copy()).view_as(parameter))
    return model


@torch.no_grad()
def logits_of(model: LocalGPT, prompt: list[int], added: list[int]) -> torch.Tensor:
    """Return the logits after the prompt and after each character, of what window "halves" sees."""
    text, size, found = [*prompt, *added], model.config.block_size, []
    half = (size + 1) // 2
    for n in range(len(prompt), len(text) + 1):
        seen = n if n <= size else half + (n - size - 1) % (size - half + 1)
        found.append(model.logits(torch.tensor([text[n - seen : n]]))[0, -1])
    return torch.stack(found)


def test_a_row_is_rounded_to_127_parts_of_its_largest_number():
    matrix = torch.tensor([[1.27, -0.634, 0.006], [0.0, 0.0, 0.0], [-5.0, 2.5, 5.0]])
    integers, scales = sampler_models.rounded(matrix)
    assert integers.tolist() == [[127, -63, 1], [0, 0, 0], [-127, 64, 127]] and integers.dtype == np.int8
    np.testing.assert_allclose(scales, [0.01, 1 / 127, 5 / 127], rtol=1e-6)


def test_rounding_moves_no_number_by_more_than_half_a_step_and_no_vector():
    model, before = moved(LocalGPTConfig(**ODD)), moved(LocalGPTConfig(**ODD))
    sampler_models.round_weights(model)
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        if now.ndim == 1:
            assert torch.equal(now, then)
        else:
            steps = then.abs().amax(dim=1, keepdim=True) / 127
            assert ((now - then).abs() <= 0.501 * steps).all() and not torch.equal(now, then)


def test_what_is_packed_is_the_rounded_model():
    model = moved(LocalGPTConfig(**ODD))
    held = {"config": ODD, "parameters": sampler_models.packed(model)}
    sampler_models.round_weights(model)
    again = unpacked(held)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "narrow",
    [
        {},
        {"bottleneck_at": "0"},
        {"subspace_embeddings": "constrain"},
        {"subspace_embeddings": "constrain", "bottleneck_at": "0,1"},
    ],
)
def test_a_plain_model_computes_what_one_that_writes_into_a_subspace_computes(narrow):
    model = moved(LocalGPTConfig(**ODD, subspace_rank=5, subspace_mode="constrain", **narrow))
    idx = torch.randint(ODD["vocab_size"], (3, 7))
    same = sampler_models.plain(model).eval()
    assert same.config == LocalGPTConfig(**ODD)
    torch.testing.assert_close(same(idx)[0], model(idx)[0], rtol=1e-5, atol=1e-5)


@needs_node
@pytest.mark.parametrize("length", [1, 6, 7, 8, 25])
def test_the_engine_reads_on_as_torch_does(tmp_path, length):
    model = moved(LocalGPTConfig(**ODD))
    held = {"config": ODD, "parameters": sampler_models.packed(model)}
    sampler_models.round_weights(model)
    text = torch.randint(ODD["vocab_size"], (length + 20,)).tolist()
    given = {"held": held, "prompt": text[:length], "added": text[length:]}
    found = torch.tensor(play("writing.mjs", given, tmp_path)["logits"])
    torch.testing.assert_close(found, logits_of(model, text[:length], text[length:]), rtol=1e-4, atol=1e-4)


def test_there_is_a_model_for_every_arm():
    assert [path.stem for path in KEPT] == sorted(map(sampler_models.slug, sampler_models.ARMS))


@needs_node
@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_a_model_of_the_pages_is_the_recorded_one_and_the_engine_computes_its_logits(tmp_path, path):
    assert path.stat().st_size <= 1_200_000
    held = sampler.held(path.read_text(encoding="utf-8"))
    record = read_record(ROOT / f"book/records/{sampler_models.SUITE}/{held['digest']}.json")
    assert sampler_models.slug(record.arm) == path.stem and record.seed == held["seed"]
    assert abs(record.final_val_loss - held["loss"]) < sampler_models.ROUNDING
    assert held["config"] == {name: record.spec["model"][name] for name in sampler_models.SIZES}
    text = [held["vocabulary"].index(letter) for letter in "KING RICHARD II:\nNow is the winter of our " * 3]
    given = {"held": held, "prompt": text[:20], "added": text[20:]}
    found = torch.tensor(play("writing.mjs", given, tmp_path)["logits"])
    torch.testing.assert_close(found, logits_of(unpacked(held), text[:20], text[20:]), rtol=1e-4, atol=1e-4)


def test_the_index_says_what_is_loaded_without_its_numbers():
    index = sampler.index()
    assert [*index] == [path.stem for path in KEPT]
    for path in KEPT:
        held = sampler.held(path.read_text(encoding="utf-8"))
        expected = {key: held[key] for key in sampler.SHOWN} | {"bytes": path.stat().st_size}
        assert index[path.stem] == expected and "parameters" not in index[path.stem]


def test_a_page_may_ask_only_for_models_that_are_there():
    def page(models):
        html = f'<div class="sampler" data-models="{models}">x</div>'
        return nodes.container("", nodes.raw("", html), source="page.md")

    with pytest.raises(ValueError, match=r"page\.md: there are no models \['nobody'\]"):
        sampler.asked(page("bp nobody"))
    assert sampler.asked(page("bp")) == ["bp"]
    assert all(
        (ROOT / "book/_static" / file).is_file() for file in {*sampler.files("page", [])} - {sampler.INDEX}
    )
