"""benchmarks.scaling: what the simulation takes for a run."""

import dataclasses

import pytest

pytest.importorskip("simpy")
pytest.importorskip("safetensors", reason="the extra [checkpoint] is not installed")

from benchmarks.scaling import Cluster, Rates, Tensor, faster, simulate

INSTANT = 1e30
FREE = Rates(*[INSTANT] * len(Rates.__annotations__))
#: Seconds a byte: each a digit of its own.
SLOW = Rates(read=1, read_cached=1e1, amax=1e2, quantize=1e3, report=1e4, write=1e5, sync=1e6)
WEIGHT, COPIED = Tensor(1000, True), Tensor(1000, False)
MODEL = [(WEIGHT,) * 3, (WEIGHT,) * 3]


def seconds(model: list[tuple[Tensor, ...]], rates: Rates, *cluster: int, skip_bad: bool = False) -> float:
    return simulate(model, Cluster(rates, *cluster, skip_bad=skip_bad)).seconds


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_weight_goes_through_all_steps(skip_bad: bool) -> None:
    found = simulate([(WEIGHT,)], Cluster(SLOW, skip_bad=skip_bad))
    first, again = 1000 + 10, 100
    assert found.before == pytest.approx(first if skip_bad else 0, rel=1e-12)
    written = 1000 * (4 + 8 / 16) / 16
    # By turns it is read again meanwhile.
    expected = first + (again if skip_bad else 0) + 1 + 0.1 + written / 1e5 + written / 1e6
    assert found.seconds == pytest.approx(expected, rel=1e-12)
    assert found.busy["device"] == pytest.approx(1)


def test_what_is_not_quantized_is_copied() -> None:
    found = simulate([(COPIED,)], Cluster(SLOW))
    assert found.before == 0
    assert found.seconds == pytest.approx(1000 + 0.01 + 0.001, rel=1e-12)


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
    for name, expected in (("read", 6.0), ("sync", 6 * 4.5 / 16)):
        rates = dataclasses.replace(FREE, **{name: 1000})
        assert seconds(MODEL, rates) == pytest.approx(expected)
        assert seconds(MODEL, rates, 1, 2) == pytest.approx(expected)
        assert seconds(MODEL, rates, 2, 1) == pytest.approx(expected / 2)


def test_shards_are_read_while_others_are_quantized() -> None:
    """By turns the longer of both counts, and what the first or the last shard needs beside it."""
    model = [(WEIGHT,)] * 10
    rates = dataclasses.replace(FREE, read=1000, report=500)
    assert seconds(model, rates) == pytest.approx(1 + 10 * 2)
    assert seconds(model, rates, skip_bad=True) == pytest.approx(10 + 10 * 2)


def test_all_ranks_search_before_where_all_is_searched_before() -> None:
    rates = dataclasses.replace(FREE, amax=1000)
    assert seconds(MODEL, rates, 1, 2, skip_bad=True) == pytest.approx(3)
    assert seconds(MODEL, rates, 1, 6, skip_bad=True) == pytest.approx(1)
    assert seconds(MODEL, rates, 1, 6) == pytest.approx(3)


def test_what_another_host_has_read_is_read_again() -> None:
    rates = dataclasses.replace(FREE, read=1000)
    assert seconds(MODEL, rates, 2, 1, skip_bad=True) == pytest.approx(2 * seconds(MODEL, rates, 2, 1))


def test_faster() -> None:
    assert faster(SLOW, ("read", "write"), 10) == dataclasses.replace(SLOW, read=10, write=1e6)
