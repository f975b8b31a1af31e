"""What a GPU replays, as far as it can be seen without one: who asks for it, and what must not rely on it."""

from types import SimpleNamespace

import pytest
import torch
from toys import toy_corpus, toy_model, toy_train

from localgpt_core.common.modes import tf32_on_gpu
from localgpt_core.parallel.parts import Split
from localgpt_core.training import RunState, before
from localgpt_core.training import state as run_state
from localgpt_core.training.step import build_model, build_optimizer, compiled, training_step

GPU = torch.device("cuda")


@pytest.fixture
def modes(monkeypatch):
    found = []
    monkeypatch.setattr(torch, "compile", lambda model, mode=None, **given: found.append(mode) or model)
    return found


def test_a_gpu_replays_and_a_cpu_does_not(modes):
    there = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=GPU)]))
    compiled(there)
    compiled(there, replayed=False)
    compiled(build_model(toy_model(), toy_train()))
    assert modes == ["reduce-overhead", None, None]


@pytest.mark.parametrize(("accumulate", "expected"), [(1, True), (2, False)])
def test_gradients_that_are_added_up_are_not_overwritten_by_a_replay(accumulate, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(run_state, "compiled", lambda model, replayed: asked.append(replayed) or model)
    split = Split(accumulate=accumulate)
    RunState(toy_model(), toy_train(compile=True), toy_corpus(), torch.device("cpu"), split=split)
    assert asked == [expected]


class InMemory(torch.autograd.Function):
    """``apply(loss, memory)``: the loss, written to ``memory``, as a replayed graph does."""

    @staticmethod
    def forward(ctx, loss, memory):
        ctx.mark_dirty(memory)
        return memory.copy_(loss)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


def test_the_loss_of_a_step_outlives_the_next_replay(monkeypatch):
    model, config = build_model(toy_model(), toy_train()), toy_train()
    optimizer, batch = build_optimizer(model, config), torch.randint(5, (2, 2, 5))
    memory, forward = torch.zeros(()), model.forward

    def replayed(idx, targets):
        logits, loss = forward(idx, targets)
        return logits, InMemory.apply(loss, memory.detach())

    monkeypatch.setattr(model, "forward", replayed)
    first = training_step(model, optimizer, config, *batch, 0)
    value = first.item()
    assert value == memory.item()
    training_step(model, optimizer, config, *batch, 1)
    assert first.item() == value != memory.item()


@pytest.mark.parametrize(("on_gpu", "calls"), [(False, 1), (True, 3)])
def test_the_replay_is_what_is_compared(on_gpu, calls, monkeypatch):
    called = []
    monkeypatch.setattr(
        before, "_gradients", lambda m, forward, *rest: called.append(forward) or {"w": torch.ones(2)}
    )
    model = SimpleNamespace(config=toy_model())
    before.check_compiled(model, "compiled", toy_train(), SimpleNamespace(is_cuda=on_gpu), None)
    assert called == [model] + ["compiled"] * calls


@pytest.mark.parametrize(("device", "inside"), [("cpu", "highest"), ("cuda", "high")])
def test_only_a_gpu_multiplies_in_tf32_and_only_meanwhile(device, inside):
    with tf32_on_gpu(torch.device(device)):
        assert torch.get_float32_matmul_precision() == inside
    assert torch.get_float32_matmul_precision() == "highest"
