"""Bits per token that cross a stage's boundary, against numbers worked out by hand."""

import pytest
from cases import SIZES

from localgpt_core import LocalGPTConfig
from localgpt_core.measure.pipeline import StageMessage, stage_message

# Width 12, vocabulary 7. Options: bits forward, backward, broadcast, behind block 0.
CASES = [
    ({}, (192, 192, 0)),
    ({"method": "fa"}, (192, 192, 0)),
    ({"resid_topk": 3}, (3 * 16 + 8, 48, 0)),  # binom(12, 3) = 220 places
    ({"resid_topk": 11}, (11 * 16 + 4, 176, 0)),
    ({"resid_topk": 12}, (192, 192, 0)),
    ({"vq_codes": 1000}, (10 + 16, 192, 0)),
    ({"vq_codes": 1}, (16, 192, 0)),
    ({"vq_codes": 1000, "vq_groups": 3}, (30 + 3 * 16, 192, 0)),  # 3 log2 1000 = 29.9
    ({"vq_codes": 16, "vq_groups": 3, "vq_rms": "fixed"}, (12, 192, 0)),
    ({"vq_codes": 5, "vq_groups": 3, "vq_rms": "fixed", "vq_backward": "tangent"}, (7, 192, 0)),  # of 125
    ({"vq_codes": 16, "vq_groups": 6, "vq_backward": "rotation"}, (24 + 96, 192, 0)),
    ({"vq_codes": 1, "vq_rms": "fixed"}, (0, 192, 0)),
    ({"vq_codes": 2, "vq_groups": 12}, (192, 192, 0)),  # 12 (1 + 16) is more than the stream as it is
    ({"resid_bits": 8}, (12 * 8 + 16, 192, 0)),
    ({"resid_bits": 2}, (24 + 16, 192, 0)),
    ({"resid_bits": 2, "method": "dfa", "dfa_granularity": "block"}, (40, 0, 112)),
    ({"subspace_rank": 4}, (64, 64, 0)),
    ({"subspace_rank": 4, "subspace_mode": "constrain"}, (64 + 3, 192, 0)),
    ({"subspace_rank": 4, "subspace_mode": "constrain", "freeze_emb": True}, (64 + 3, 64, 0)),
    ({"subspace_rank": 4, "subspace_mode": "constrain", "subspace_embeddings": "constrain"}, (64 + 3, 64, 0)),
    ({"resid_topk": 3, "vq_codes": 1000, "subspace_rank": 2}, (26, 32, 0)),
    ({"method": "dfa"}, (192, 192, 112)),
    ({"method": "dfa", "dfa_granularity": "sublayer"}, (192, 0, 112)),
    ({"method": "dfa", "dfa_granularity": "block"}, (192, 0, 112)),
    ({"method": "dfa", "dfa_granularity": "block", "subspace_rank": 4}, (64, 0, 112)),
    (
        {"method": "dfa", "dfa_granularity": "block", "dfa_source": "head"},
        (192, 0, 112),
    ),  # 7 are fewer than 12
    ({"method": "dfa", "dfa_granularity": "block", "fa_grape": True}, (192, 0, 112, 192)),
    ({"method": "dfa", "dfa_granularity": "block", "fa_grape": True, "resid_topk": 3}, (56, 0, 112, 48)),
    ({"method": "fa", "fa_grape": True}, (192, 192, 0)),  # probes stay in their layer
]


@pytest.mark.parametrize(("options", "expected"), CASES, ids=str)
def test_bits_by_hand(options, expected):
    assert stage_message(LocalGPTConfig(**SIZES, **options), 0) == StageMessage(*expected)


def test_an_error_that_all_multiply_by_the_head_is_sent_multiplied_if_that_is_narrower():
    direct = {"method": "dfa", "dfa_granularity": "block", "dfa_source": "head"}
    config = LocalGPTConfig(**{**SIZES, "vocab_size": 100}, **direct)
    assert stage_message(config, 0).broadcast == 16 * 12


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"resid_topk": 3}, (3 * 32 + 8, 96, 0)),
        ({"vq_codes": 1000}, (10 + 32, 384, 0)),
        ({"resid_bits": 8}, (12 * 8 + 32, 384, 0)),
        ({"subspace_rank": 4, "subspace_mode": "constrain"}, (128 + 3, 384, 0)),
        ({"method": "dfa"}, (384, 384, 224)),
    ],
    ids=str,
)
def test_numbers_may_have_other_bits(options, expected):
    assert stage_message(LocalGPTConfig(**SIZES, **options), 0, bits=32) == StageMessage(*expected)


def test_only_the_boundaries_with_a_bottleneck_are_narrow():
    config = LocalGPTConfig(**SIZES, vq_codes=4, bottleneck_at="1")
    assert [stage_message(config, block).forward for block in (0, 1)] == [192, 18]


@pytest.mark.parametrize(
    ("options", "narrow"),
    [
        ({"resid_topk": 3}, (56, 48, 0)),
        ({"subspace_rank": 4}, (64, 64, 0)),
        ({"resid_bits": 4}, (64, 192, 0)),
        ({"vq_codes": 16, "vq_groups": 2, "vq_rms": "fixed"}, (8, 192, 0)),
    ],
    ids=["resid_topk", "subspace", "resid_bits", "codes"],
)
def test_no_bottleneck_narrows_another_boundary(options, narrow):
    config = LocalGPTConfig(**SIZES, **options, bottleneck_at="1")
    assert [stage_message(config, i) for i in (0, 1)] == [StageMessage(192, 192, 0), StageMessage(*narrow)]


def test_the_block_is_checked():
    with pytest.raises(ValueError, match="block=2: must be an integer of at least 0 and at most 1"):
        stage_message(LocalGPTConfig(**SIZES), 2)
    with pytest.raises(ValueError, match="bits=0: must be an integer of at least 1"):
        stage_message(LocalGPTConfig(**SIZES), 0, bits=0)
