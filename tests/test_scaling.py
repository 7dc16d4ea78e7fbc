"""benchmarks.scaling: what the simulation takes for a run."""

import dataclasses

import pytest

pytest.importorskip("simpy")
pytest.importorskip("safetensors", reason="the extra [checkpoint] is not installed")

from benchmarks.scaling import Cluster, Rates, Tensor, faster, simulate

INSTANT = 1e30
FREE = Rates(INSTANT, INSTANT, INSTANT, INSTANT, INSTANT, INSTANT)
#: Seconds a byte: each a digit of its own.
SLOW = Rates(read=1, read_cached=1e1, amax=1e2, quantize=1e3, report=1e4, write=1e5)
WEIGHT, COPIED = Tensor(1000, True), Tensor(1000, False)
MODEL = [(WEIGHT,) * 3, (WEIGHT,) * 3]


def seconds(model: list[tuple[Tensor, ...]], rates: Rates, *cluster: int, keeps: bool = True) -> float:
    return simulate(model, Cluster(rates, *cluster, keeps=keeps)).seconds


def test_a_weight_goes_through_all_steps() -> None:
    found = simulate([(WEIGHT,)], Cluster(SLOW))
    first = 1000 + 10
    assert found.first_pass == pytest.approx(first, rel=1e-12)
    written = 1000 * (4 + 8 / 16) / 16 / 1e5
    assert found.seconds == pytest.approx(first + 100 + 1 + 0.1 + written, rel=1e-12)
    assert found.busy["device"] == pytest.approx(1)
    assert seconds([(WEIGHT,)], SLOW, keeps=False) == pytest.approx(found.seconds + 1000 - 100, rel=1e-12)


def test_what_is_not_quantized_is_copied() -> None:
    found = simulate([(COPIED,)], Cluster(SLOW))
    assert found.first_pass == 0
    assert found.seconds == pytest.approx(1000 + 0.01, rel=1e-12)


def test_steps_overlap() -> None:
    """The slowest of them counts, and what the first and the last weight need beside it."""
    rates = dataclasses.replace(FREE, read_cached=1000, quantize=500)
    assert seconds([(WEIGHT,) * 10], rates) == pytest.approx(1 + 10 * 2)
    assert seconds([(WEIGHT,) * 10], dataclasses.replace(FREE, report=1000)) == pytest.approx(10)


def test_who_shares_what() -> None:
    """Processes share the disk; they have cores and devices of their own, and hosts have all."""
    for name in ("quantize", "report"):
        rates = dataclasses.replace(FREE, **{name: 1000})
        assert seconds(MODEL, rates) == pytest.approx(6)
        assert seconds(MODEL, rates, 1, 2) == pytest.approx(3)
    assert seconds(MODEL, dataclasses.replace(FREE, quantize=1000), 1, 1, 2) == pytest.approx(3)
    for name, expected in (("read", 6.0), ("write", 6 * 4.5 / 16)):
        rates = dataclasses.replace(FREE, **{name: 1000})
        assert seconds(MODEL, rates) == pytest.approx(expected)
        assert seconds(MODEL, rates, 1, 2) == pytest.approx(expected)
        assert seconds(MODEL, rates, 2, 1) == pytest.approx(expected / 2)


def test_ranks_without_a_shard_search_too() -> None:
    rates = dataclasses.replace(FREE, amax=1000)
    assert seconds(MODEL, rates, 1, 2) == pytest.approx(3)
    assert seconds(MODEL, rates, 1, 6) == pytest.approx(1)


def test_faster() -> None:
    assert faster(SLOW, ("read", "write"), 10) == dataclasses.replace(SLOW, read=10, write=1e6)
