"""Batches that are gathered where a run's text is: to the last bit those of the pure function."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localgpt_core.corpus import batches
from localgpt_core.corpus.batches import AHEAD, Batches, batch, resident, windows

IDS = (np.arange(50) * 7 % 50).astype(np.uint8)


@settings(deadline=None)
@given(st.integers(2, 60), st.data())
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_batches_are_those_of_the_pure_function(dtype, n, data):
    text = (np.arange(n) * 3 % n).astype(dtype)
    text.setflags(write=False)  # as that of a corpus is
    sizes = {"batch_size": data.draw(st.integers(1, 5)), "block_size": data.draw(st.integers(1, n - 1))}
    seed, first = data.draw(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 10**6)))
    gathered = Batches(text, **sizes, seed=seed)
    for step in (first, first + 1, 0, first + AHEAD, AHEAD - 1, AHEAD):
        for found, expected in zip(gathered(step), batch(text, **sizes, seed=seed, step=step), strict=True):
            assert found.dtype == torch.int64 and found.is_contiguous()
            assert torch.equal(found, expected)


def test_the_places_of_many_steps_are_drawn_at_one_time(monkeypatch):
    drawn, draw = [], batches._starts
    monkeypatch.setattr(batches, "_starts", lambda *args: drawn.append(args[-1]) or draw(*args))
    gathered = Batches(IDS, batch_size=2, block_size=5, seed=1)
    for step in range(AHEAD + 2):
        gathered(step)
    assert drawn == [*range(2 * AHEAD)]


def test_batches_are_where_they_are_asked_for():
    gathered = Batches(IDS, batch_size=2, block_size=5, seed=1, device="meta")
    assert all(ids.is_meta and ids.shape == (2, 5) for ids in gathered(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 50}, "block_size=50: a window of 51 characters does not fit into 50"),
        ({"batch_size": 0}, "batch_size=0: must be"),
        ({"seed": 2**64}, "seed=18446744073709551616: must be"),
    ],
)
def test_bad_batches_are_named_before_the_first(change, message):
    with pytest.raises(ValueError, match=message):
        Batches(IDS, **{"batch_size": 2, "block_size": 5, "seed": 0, **change})


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_windows_of_a_resident_text_are_those_of_the_array(dtype):
    text = IDS.astype(dtype)
    kept = resident(text, "cpu")
    assert kept.element_size() == (1 if dtype == np.uint8 else 4)
    for found, expected in zip(windows(kept, 6), windows(text, 6), strict=True):
        assert found.dtype == torch.int64 and torch.equal(found, expected)
    assert all(part.is_meta for part in windows(resident(text, "meta"), 6))
    text[0] += 1
    assert kept[0] != text[0]  # a copy
