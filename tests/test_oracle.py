"""The oracle against exact rational arithmetic, and the window's theorems against the oracle."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cases import CASES, Case, blocks_over_decades, from_levels, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from nvfp4sweep import formats, oracle
from nvfp4sweep.window import (
    FIRST_UNDOUBLED_CODE,
    last_unhalved_code,
    most_candidates,
    window,
)

GRID = [Fraction(x) for x in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]


def rational_errors(block: Any, global_amax: np.float32) -> dict[int, Fraction]:
    """The definition, letter by letter, in rational arithmetic."""
    errors = {}
    for code in range(1, 127):
        value = np.array(code, np.uint8)
        v = Fraction(float(formats.E4M3_VALUES[value]))
        candidate = np.float32(float(v)) / np.float32(448)
        scale = Fraction(float(np.float32(candidate * global_amax) / np.float32(6)))
        errors[code] = sum(
            (min((abs(Fraction(float(w))) - q * scale) ** 2 for q in GRID) for w in block), Fraction(0)
        )
    return errors


def check_block(block: Any, global_amax: np.float32, min_code: int = 1) -> None:
    errors = {k: e for k, e in rational_errors(block, global_amax).items() if k >= min_code}
    least = min(errors.values())
    code, error = oracle.search(block[None], global_amax, min_code)
    assert code[0] == min(k for k, e in errors.items() if e == least)
    with np.errstate(over="ignore"):
        rounded = np.float32(float(least))
    assert error[0] == rounded or abs(error[0] - rounded) <= np.spacing(rounded)


RATIONAL = [case for case in CASES if case.options.get("block_size", 16) == 16 and case.name not in (
    "no-blocks", "no-columns", "axis-0", "axis-0-bfloat16", "middle-axis", "experts-axis-1",
    "experts", "experts-given-amax", "two-batch-axes", "huge", "amax-largest",
)]  # fmt: skip


@pytest.mark.parametrize("case", RATIONAL, ids=str)
def test_oracle_is_right(case: Case) -> None:
    weight = case.weight(4).astype(np.float32)
    amax = np.float32(case.options.get("global_amax", np.abs(weight).max()))
    for block in weight.reshape(-1, 16)[:5]:
        check_block(block, amax, case.options.get("min_code", 1))


@settings(max_examples=40, deadline=None)
@given(
    block=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=16),
    amax=st.floats(0.0009765625, 1000, width=32),
    min_code=st.sampled_from([1, 8, 119]),
)
def test_oracle_is_right_for_any_block(block: list[float], amax: float, min_code: int) -> None:
    check_block(np.array(block, np.float32), np.float32(amax), min_code)


def test_ties_take_the_lowest_code() -> None:
    """Levels {0, 1.5, 3} are points of the grid at s, s / 2 and 1.5 s: each time the lowest wins."""
    block = np.array([0, 1.5, 3, 3] * 4, np.float32)
    code, error = oracle.search(block[None], np.float32(2688), 1)
    errors = rational_errors(block, np.float32(2688))
    assert error[0] == 0
    assert sum(e == 0 for e in errors.values()) > 1
    assert code[0] == min(k for k, e in errors.items() if e == 0)


@pytest.mark.parametrize("block_size", [4, 16, 32, 64])
@pytest.mark.parametrize("min_code", [1, 8, 60])
def test_window_holds_every_answer(block_size: int, min_code: int) -> None:
    """Theorems 1 to 3 on random and on structured blocks, over every code."""
    rng = np.random.default_rng(3)
    rows = 16 * block_size
    weights = [blocks_over_decades(rng, rows), from_levels(0, 1.5, 3, 6)(rng, rows), normal(rng, rows)]
    bounds = window(block_size)
    outside = np.zeros(127, bool)
    for weight in weights:
        blocks = np.ascontiguousarray(weight).reshape(-1, block_size)
        amax = np.abs(blocks).max()
        codes, _ = oracle.search(blocks, amax, min_code)
        peak = np.abs(blocks).max(axis=1).astype(np.float64)
        value = formats.E4M3_VALUES[codes] * float(amax) / formats.NVFP4_MAX
        trivial = peak <= formats.scale_by_code(amax)[min_code] / 4
        assert (codes[trivial] == min_code).all()
        above = (value >= peak * bounds.upper) & (codes > last_unhalved_code(min_code))
        below = (value < peak * bounds.lower) & (codes < FIRST_UNDOUBLED_CODE)
        assert not (above & ~trivial).any()
        assert not (below & (codes > min_code)).any()
        outside[codes] = True
    assert outside.sum() > 20  # many codes were some block's answer


def test_the_published_window_is_not_exact_everywhere() -> None:
    """-3 .. +7 codes around absmax misses answers where E4M3 has no half of a code: premises matter."""
    block = np.array([6.5, 13, 19.5, 26] * 4, np.float32) * np.float32(2.0**-9)  # the grid at code 13
    code, _ = oracle.search(block[None], np.float32(2688), 1)
    absmax_code = round(26 / 6)
    assert code[0] == 13 > absmax_code + 7
    check_block(block, np.float32(2688))


def test_window_sizes() -> None:
    assert most_candidates(16) == 10
    assert most_candidates(32) == 12
