"""Steps of small pipelines, against closed forms and times worked out by hand."""

import math
from dataclasses import replace

import pytest

from localgpt_core.pipelines.machines import Pipeline
from localgpt_core.pipelines.simulation import played
from localgpt_core.pipelines.stages import Stage

F, B = 3.0, 5.0  # seconds of a pass, with machines of 1 FLOP/s and micro-batches of 1 token
FREE = {"bandwidth_bits_per_s": math.inf, "latency_s": 0.0}
SCHEDULES = ["gpipe", "1f1b"]


def stage(forward=F, backward=B, on=0.0, back=0.0, **more):
    values = {"activation_bits": 0.0, "feedback_bits": 0, **more}
    return Stage(forward, backward, forward_bits=on, error_bits=back, **values)


def step(stages, direct=False, tokens=1, **options):
    stages = [stage()] * stages if isinstance(stages, int) else stages
    given = {"flops_per_s": 1.0, "utilisation": 1.0, "micro_batches": 4, **FREE, **options}
    return played(stages, Pipeline(stages=len(stages), **given), tokens, direct)


def sending(number, on, back):
    """Return stages of which all but the last send ``on`` bits forward and are sent ``back`` bits."""
    return [*[stage(on=on, back=back)] * (number - 1), stage(back=back)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("S", "M"), [(1, 1), (1, 5), (2, 1), (3, 3), (4, 9), (7, 2)])
def test_a_chain_of_errors_has_the_bubble_of_gpipe(S, M, schedule):
    found = step(S, micro_batches=M, schedule=schedule)
    assert found.seconds == pytest.approx((M + S - 1) * (F + B))
    assert found.bubble == pytest.approx((S - 1) / (M + S - 1))
    assert found.tokens_per_s == pytest.approx(M / found.seconds)


@pytest.mark.parametrize("broadcast", ["relay", "multicast"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("S", "M"), [(1, 4), (2, 2), (3, 3), (4, 9)])
def test_direct_feedback_leaves_the_bubble_of_the_forward_pass(S, M, schedule, broadcast):
    found = step(S, direct=True, micro_batches=M, schedule=schedule, broadcast=broadcast)
    assert found.seconds == pytest.approx((M + S - 1) * F + M * B)
    assert found.bubble == pytest.approx(1 - M * (F + B) / found.seconds)


def test_two_stages_of_different_speed_by_hand():
    # F0 0-1, F1 1-2 | F0 1-5, B0 5-11, F1 11-15, B1 15-21 | B0 11-13, B1 21-23
    assert step([stage(1, 2), stage(4, 6)], micro_batches=2).seconds == 23
    # the same passes; gpipe: F0 1-5, F1 5-9, B0 9-15, B1 15-21
    assert step([stage(1, 2), stage(4, 6)], micro_batches=2, schedule="gpipe").seconds == 23
    # direct: the errors are made at 5 and 15, and the first stage is done before the last
    direct = step([stage(1, 2), stage(4, 6)], direct=True, micro_batches=2)
    assert direct.seconds == 21 and direct.bubble == pytest.approx(1 - (6 + 20) / 42)


@pytest.mark.parametrize(("S", "M"), [(1, 3), (3, 8), (4, 2)])
def test_micro_batches_in_flight(S, M):
    assert step(S, micro_batches=M, schedule="gpipe").in_flight == (M,) * S
    found = step(S, micro_batches=M, schedule="1f1b").in_flight
    assert found == tuple(min(M, S - s) for s in range(S)) and max(found) <= S


def test_what_is_kept_is_that_of_the_stage_that_keeps_most():
    stages = [stage(activation_bits=8.0), stage(activation_bits=8.0 * 5, feedback_bits=80), stage()]
    found = step(stages, micro_batches=9, tokens=10)
    assert found.in_flight == (3, 2, 1)
    assert (found.activation_bytes, found.feedback_bytes) == (2 * 5 * 10, 10)


def test_errors_that_wait_are_counted():
    stages = [stage(back=16.0), stage(back=8.0)]
    # gpipe: the last stage makes all errors before it has used one
    assert step(stages, micro_batches=6, schedule="gpipe").error_bytes == 6
    # 1f1b: it uses each at once, and the first stage its own when it comes
    assert step(stages, micro_batches=6).error_bytes == 2
    # direct feedback: the last one is there at 7 F = 21, before the first is used up at 6 F + B = 23
    assert step(stages, direct=True, micro_batches=6, schedule="gpipe").error_bytes == 2 * 6


@pytest.mark.parametrize("direct", [False, True])
def test_one_stage_sends_nothing(direct):
    found = step([stage(back=16.0)], direct=direct, bandwidth_bits_per_s=1.0, latency_s=9.0)
    assert (found.forward_bytes, found.backward_bytes, found.link_share) == (0, 0, 0)
    assert found.seconds == 4 * (F + B) and found.bubble == 0


@pytest.mark.parametrize("direct", [False, True])
def test_bytes_are_those_of_all_micro_batches_on_one_link(direct):
    found = step(sending(3, 8.0, 24.0), direct, tokens=5, micro_batches=4)
    assert (found.forward_bytes, found.backward_bytes) == (4 * 5 * 1, 4 * 5 * 3)
    wide = [stage(on=8.0, back=8.0), stage(on=32.0, back=16.0), stage()]
    assert (step(wide).forward_bytes, step(wide).backward_bytes) == (16, 8)  # the busiest link


@pytest.mark.parametrize(
    ("direct", "broadcast", "hops"),
    [(False, "relay", 6), (True, "relay", 6), (True, "multicast", 4)],
)
def test_latency_alone_is_paid_per_hop(direct, broadcast, hops):
    options = {"broadcast": broadcast, "schedule": "gpipe", "micro_batches": 7, "latency_s": 1.0}
    found = step(4, direct, flops_per_s=1e12, **options)
    assert found.seconds == pytest.approx(hops, abs=1e-9)


def test_under_1f1b_latency_is_paid_in_every_round():
    # One in flight at the last stage but one: S = 2 keeps two there, so two micro-batches a round trip.
    found = step(2, flops_per_s=1e12, micro_batches=8, latency_s=1.0)
    assert found.seconds == pytest.approx(8 / 2 * 2, abs=1e-9)


S, M, X, Y = 4, 9, 2.0, 3.0
DIRECT_WIDE = (S - 1) * X + (M + S - 2) * Y  # of errors that are wider than the stream, the last is late
DIRECT_NARROW = (M + S - 2) * Y + (S - 1) * X


@pytest.mark.parametrize(
    ("direct", "on", "back", "seconds"),
    [
        (False, X, Y, (M + S - 2) * (X + Y)),
        (True, X, Y, DIRECT_WIDE),
        (True, Y, X, DIRECT_NARROW),
    ],
)
def test_links_alone_by_closed_forms(direct, on, back, seconds):
    options = {"micro_batches": M, "schedule": "gpipe", "bandwidth_bits_per_s": 1.0}
    found = step(sending(S, on, back), direct, flops_per_s=1e12, **options)
    assert found.seconds == pytest.approx(seconds, abs=1e-9)
    assert found.link_share == pytest.approx(M * max(on, back) / seconds)


def test_by_multicast_one_link_reaches_all():
    options = {"micro_batches": M, "schedule": "gpipe", "bandwidth_bits_per_s": 1.0, "broadcast": "multicast"}
    found = step(sending(S, X, Y), True, flops_per_s=1e12, **options)
    assert found.seconds == pytest.approx((S - 1) * X + M * Y, abs=1e-9)


def test_tokens_and_utilisation_scale_time():
    options = {"bandwidth_bits_per_s": 1.0, "micro_batches": 5}
    once = step(sending(3, 1.0, 2.0), **options)
    slow = step(sending(3, 1.0, 2.0), tokens=2, **options)
    assert slow.seconds == pytest.approx(2 * once.seconds)
    assert step(3, utilisation=0.25).seconds == pytest.approx(4 * step(3).seconds)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("stages", 0, "must be an integer of at least 1"),
        ("micro_batches", 2.0, "must be an integer"),
        ("micro_batch_size", 0, "must be an integer"),
        ("probes", 0, "must be an integer"),
        ("bits", 0, "must be an integer"),
        ("schedule", "zb", "allowed are 'gpipe', '1f1b'"),
        ("broadcast", "", "allowed are 'relay', 'multicast'"),
        ("flops_per_s", 0.0, "must be positive"),
        ("bandwidth_bits_per_s", math.nan, "must be positive"),
        ("latency_s", -1.0, "must be finite and not negative"),
        ("latency_s", math.inf, "must be finite and not negative"),
        ("tangent_cost", -1.0, "must be finite and not negative"),
        ("utilisation", 1.5, r"must be in \(0, 1\]"),
    ],
)
def test_assumptions_are_checked(field, value, allowed):
    with pytest.raises(ValueError, match=f"^{field}={value!r}: {allowed}"):
        replace(Pipeline(), **{field: value})
