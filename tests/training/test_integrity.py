"""A checkpoint that is damaged, cut together or foreign is refused before anything of it is used."""

import json
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch
from cases import MODEL_CASES, RULE_CASES
from safetensors import safe_open
from toys import interrupt_after, toy_corpus, toy_model, toy_train

from localgpt_core.training import integrity
from localgpt_core.training.checkpoints import lengthened, load_checkpoint
from localgpt_core.training.loop import train
from localgpt_core.training.state import RunState
from localgpt_core.training.step import build_model, build_optimizer, model_without_numbers, trained_names

MODEL = toy_model(method="kp", vq_codes=5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "c.safetensors"
    train(MODEL, toy_train(), toy_corpus(), checkpoint=path)
    return path


def content(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def changed_json(key, **changes):
    def change(header, tensors):
        header[key] = json.dumps(json.loads(header[key]) | changes)

    return change


def changed_curves(**changes):
    def change(header, tensors):
        progress = json.loads(header["progress"])
        progress["curves"] |= changes
        header["progress"] = json.dumps(progress)

    return change


def changed_tensor(name, change):
    def put(header, tensors):
        tensors[name] = change(tensors[name])

    return put


def without(part):
    def remove(header, tensors):
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return remove


def everywhere(ending, value):
    def put(header, tensors):
        for name in tensors:
            if name.endswith(ending):
                tensors[name] = value.clone()

    return put


HEAD = "optimizer.head.weight"
NAN, INF = float("nan"), float("inf")
HOSTILE = {
    "moments of one entry": (everywhere("exp_avg_sq", torch.ones(1)), "exp_avg_sq='float32 (1,)'"),
    "no optimiser": (without("optimizer."), "='none': of"),
    "one moment less": (without(f"{HEAD}.exp_avg_sq"), f"{HEAD}.exp_avg_sq='none'"),
    "no block": (without("blocks.0."), "n_layer=1: has 0 blocks"),
    "no mirror": (without("feedback"), "='none': of"),
    "a tensor more": (lambda h, t: t.update(x=torch.ones(2)), "x='float32 (2,)': of 1 that differ"),
    "double weights": (changed_tensor("model.head.weight", torch.Tensor.double), "='float64 (21, 8)'"),
    "integer weights": (changed_tensor("model.head.weight", torch.Tensor.int), "='int32 (21, 8)'"),
    "transposed": (changed_tensor("model.head.weight", lambda t: t.T.contiguous()), "='float32 (8, 21)'"),
    "weights not a number": (changed_tensor("model.head.weight", lambda t: t * NAN), "must be finite"),
    "weights infinite": (changed_tensor("model.ln_f.weight", lambda t: t + INF), "must be finite"),
    "codes not a number": (changed_tensor("model.blocks.0.vq.codebook", lambda t: t * NAN), "must be finite"),
    "moments not a number": (changed_tensor(f"{HEAD}.exp_avg", lambda t: t * NAN), "must be finite"),
    "a step beyond the end": (changed_json("progress", step=21), "step=21: must be"),
    "a step far beyond": (changed_json("progress", step=10**9), "step=1000000000: must be"),
    "a step below 0": (changed_json("progress", step=-1), "step=-1: must be"),
    "half a step": (changed_json("progress", step=1.5), "step=1.5: must be"),
    "another step": (changed_json("progress", step=10), "curves.step=11: must be"),
    "a true step": (changed_json("progress", step=True), "step=True: must be"),
    "no curves": (changed_json("progress", curves=None), "curves=None: must be"),
    "foreign curves": (changed_curves(step=[1], tokens=[21], lr=[1e-3], train_loss=[2.0]), "curves.lr=0.001"),
    "curves of unequal length": (changed_curves(val_loss=[1.0]), "curves.val_loss=[1.0]: 1 values for 5"),
    "losses that are texts": (changed_curves(val_loss=["1"] * 5), "curves='val_loss': must be"),
    "a loss that is not a number": (changed_curves(val_loss=[3.0] * 4 + [NAN]), "val_loss=[nan]: must be"),
    "evaluated elsewhere": (changed_curves(val_step=[0, 1, 2, 3, 4]), "curves.val_step="),
    "pending": (changed_json("progress", pending=[1.0]), "pending=1: must have 0 losses"),
    "losses of other steps": (changed_json("progress", losses=[1.0] * 21), "losses=21: must have 20 losses"),
    "losses of nothing": (changed_json("progress", losses=[None] * 20), "losses='list': must be"),
    "endless time": (changed_json("progress", wall_time_s=INF), "wall_time_s=inf: must be"),
    "time that is a text": (changed_json("progress", train_time_s="1"), "train_time_s='1': must be"),
    "diagnostics of nothing": (changed_json("progress", diagnostics=None), "diagnostics=None: must be"),
    "no corpus": (lambda h, t: h.update(corpus="null"), "corpus=None: must be"),
    "another alphabet": (changed_json("corpus", vocabulary="abc"), "vocabulary='abc': must be 21 different"),
    "an unsorted alphabet": (changed_json("corpus", vocabulary="zyxwvutsrqponmlkjihgf"), "in order"),
    "a hash that is a number": (changed_json("corpus", sha256=5), "must have the texts"),
    "a billion blocks": (changed_json("model", n_layer=10**9), "n_layer=1000000000: must be"),
    "many blocks": (changed_json("model", n_layer=10**4), "n_layer=10000: has 1 blocks"),
    "a model of all memory": (changed_json("model", n_embd=8 * 10**9), "n_embd=8000000000: must be"),
    "a wide model": (changed_json("model", n_embd=2**20), "of"),
    "many codes": (changed_json("model", vq_codes=10**6), "of"),
    "a long context": (changed_json("model", block_size=10**6), "of"),
    "another precision": (changed_json("train", precision="float64"), "has float64"),
    "a rule without mirrors": (changed_json("model", method="bp"), "has none"),
    "deep JSON": (lambda h, t: h.update(progress="[" * 100_000 + "]" * 100_000), "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_by_what_is_wrong(whole, tmp_path, name):
    change, words = HOSTILE[name]
    header, tensors = content(whole)
    del header["sha256"]
    change(header, tensors)
    path = tmp_path / "c.safetensors"
    safetensors.torch.save_file(tensors, path, metadata=header)
    before = path.read_bytes()
    with pytest.raises(ValueError) as refused:
        train(MODEL, toy_train(), toy_corpus(), checkpoint=path, resume=True)
    assert str(refused.value).startswith(f"checkpoint {path} is damaged: ") and words in str(refused.value)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_every_flipped_bit_is_noticed(whole, tmp_path):
    """A thousand places; all that is left unnoticed are spaces that fill the header."""
    data, path, source = whole.read_bytes(), tmp_path / "c", torch.Generator().manual_seed(0)
    for place in torch.randint(len(data), (1000,), generator=source).tolist():
        bit = 1 << place % 8
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        try:
            load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert data[place : place + 1] == b" ", place


def test_a_checkpoint_whose_checksum_has_lost_its_name_is_not_one_of_old(whole, tmp_path):
    header, tensors = content(whole)
    header["sha257"] = header.pop("sha256")
    safetensors.torch.save_file(tensors, tmp_path / "c", metadata=header)
    with pytest.raises(ValueError, match="header=.*'sha257'.*: must have"):
        load_checkpoint(tmp_path / "c")


def test_the_header_alone_says_how_far_a_run_is(whole, tmp_path):
    data = whole.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    header = load_checkpoint(path, tensors=False)
    assert header.tensors == {} and header.progress == load_checkpoint(whole).progress
    with pytest.raises(ValueError, match="sha256"):
        load_checkpoint(path)


def test_a_checksum_depends_on_all_that_is_written():
    header, tensors = {"a": "1", "b": "2"}, {"x": torch.arange(4.0), "y": torch.zeros(2, 3)}
    known = integrity.checksum(header, tensors)
    assert known == integrity.checksum(dict(reversed(header.items())), dict(reversed(tensors.items())))
    others = [
        integrity.checksum(header | {"a": "2"}, tensors),
        integrity.checksum({"a": "1"}, tensors),
        integrity.checksum(header, tensors | {"x": torch.arange(4.0).double()}),
        integrity.checksum(header, tensors | {"y": torch.zeros(3, 2)}),
        integrity.checksum(header, {"x": tensors["x"], "z": tensors["y"]}),
        integrity.checksum(header, tensors | {"x": torch.tensor([0.0, 1.0, 2.0, -3.0])}),
    ]
    assert len({known, *others}) == 7


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", [*MODEL_CASES, *RULE_CASES])
def test_what_a_run_writes_is_never_refused(tmp_path, name, precision):
    """Every trained tensor has its moments after one step, and the run on the meta device has the same."""
    changes = {**MODEL_CASES, **RULE_CASES}[name]
    model = replace(toy_model(n_embd=12, n_head=3, n_layer=1 if name == "ln-none" else 2), **changes)
    config = toy_train(precision=precision, vq_start=2 if model.vq_codes else 0, lr=1e-4)
    run = RunState(model, config, toy_corpus(), torch.device("cpu"))
    run.evaluate()
    for step in range(4):
        run.save(tmp_path / "c")
        saved = load_checkpoint(tmp_path / "c")
        assert saved.progress["step"] == step
        RunState(model, config, toy_corpus(), torch.device("cpu"), checkpoint=saved)
        run.advance()
    built, bare = build_model(model, config), model_without_numbers(model, config)
    assert trained_names(built) == trained_names(bare)
    groups = build_optimizer(built, config).param_groups
    assert [id(p) for group in groups for p in group["params"]] == [
        id({**dict(built.named_parameters()), **dict(built.named_buffers())}[n]) for n in trained_names(built)
    ]


def test_a_checkpoint_of_old_has_no_checksum_and_no_losses(whole, tmp_path):
    header, tensors = content(whole)
    del header["sha256"]
    progress = json.loads(header["progress"])
    del progress["losses"]
    header["progress"] = json.dumps(progress)
    safetensors.torch.save_file(tensors, tmp_path / "old", metadata=header)
    old, new = load_checkpoint(tmp_path / "old"), load_checkpoint(whole)
    assert old.progress == new.progress | {"losses": []} and asdict(old)["corpus"] == asdict(new)["corpus"]


def test_a_run_that_went_on_from_a_checkpoint_of_old_goes_on_again(tmp_path):
    """It has the losses of its later steps only, which is no damage, but cannot be made longer."""
    config, path = toy_train(min_lr_ratio=1.0), tmp_path / "c"
    whole = train(MODEL, config, toy_corpus())
    for stop in (6, 13):
        with pytest.MonkeyPatch.context() as monkeypatch:
            interrupt_after(monkeypatch, stop)
            assert train(MODEL, config, toy_corpus(), checkpoint=path, resume=True).steps_done == stop
        header, tensors = content(path)
        if stop == 6:
            progress = json.loads(header["progress"])
            del progress["losses"], header["sha256"]
            header["progress"] = json.dumps(progress)
            safetensors.torch.save_file(tensors, path, metadata=header)
    assert len(load_checkpoint(path).progress["losses"]) == 7
    found = train(MODEL, config, toy_corpus(), checkpoint=path, resume=True)
    assert found.curves == whole.curves
    with pytest.raises(ValueError, match="does not hold the loss of every step"):
        lengthened(load_checkpoint(path), 30, tmp_path / "longer")
