"""The oracle against exact rational arithmetic, and the window's theorems against the oracle.

The theorems for importances and Hessians are in test_theorems.py.
"""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cases import CASES, Case, blocks_over_decades, from_levels, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import OBJECTIVE_CASES, ObjectiveCase

from nvfp4sweep import formats, oracle
from nvfp4sweep.window import (
    FIRST_UNDOUBLED_CODE,
    last_unhalved_code,
    most_candidates,
    window,
)

# Integers are exact too, and faster than fractions: weights and scales are multiples of 2^-149, and residuals
# of half of that.
TWICE_GRID = (0, 1, 2, 3, 4, 6, 8, 12)


def in_units(value: Any) -> int:
    """A float32 in units of 2^-149."""
    return int(Fraction(float(value)) * 2**149)


def exact_scales(global_amax: np.float32) -> dict[int, int]:
    """The definition of the scales, letter by letter, in units of 2^-149."""
    scales = {}
    for code in range(1, 127):
        candidate = np.float32(formats.E4M3_VALUES[code]) / np.float32(448)
        scales[code] = in_units(np.float32(candidate * global_amax) / np.float32(6))
    return scales


def exact_residual(w: int, scale: int) -> int:
    """w less its nearest point, in units of 2^-150; in a tie the even code's."""
    magnitude = 2 * abs(w)
    distance = [abs(magnitude - q * scale) for q in TWICE_GRID]
    least = min(distance)
    code = min((code for code in range(8) if distance[code] == least), key=lambda code: code % 2)
    return (magnitude - TWICE_GRID[code] * scale) * (-1 if w < 0 else 1)


def rational_errors(
    block: Any, global_amax: np.float32, importance: Any = None, hessian: Any = None
) -> dict[int, Fraction]:
    """The definition of the errors in rational arithmetic."""
    if hessian is None:
        weights = np.ones(len(block)) if importance is None or not np.any(importance) else importance
        hessian = np.diag(weights)
    h = [[in_units(x) for x in row] for row in hessian]
    ws = [in_units(w) for w in block]
    errors = {}
    for code, scale in exact_scales(global_amax).items():
        r = [exact_residual(w, scale) for w in ws]
        rows = [sum(x * b for x, b in zip(row, r, strict=True) if x) for row in h]
        errors[code] = Fraction(sum(a * row for a, row in zip(r, rows, strict=True)), 2**449)
    return errors


def check_block(block: Any, global_amax: np.float32, min_code: int = 1, **weights: Any) -> None:
    errors = rational_errors(block, global_amax, **weights)
    errors = {k: e for k, e in errors.items() if k >= min_code}
    least = min(errors.values())
    given = {name: values[None] for name, values in weights.items()}
    code, error = oracle.search(block[None], global_amax, min_code, **given, hessian_of=np.zeros(1, np.intp))
    assert code[0] == min(k for k, e in errors.items() if e == least)
    with np.errstate(over="ignore"):
        rounded = np.float32(float(least))
    # Terms of a quadratic form cancel: its sum in float64 is off by a part of their sizes.
    sizes = (
        np.abs(weights["hessian"]).sum(dtype=np.float64) * float(np.abs(block).max()) ** 2
        if "hessian" in weights
        else 0
    )
    assert error[0] == rounded or abs(error[0] - rounded) <= np.spacing(rounded) + sizes * 2.0**-44


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


OBJECTIVES = [
    case
    for case in OBJECTIVE_CASES
    if case.weights.name in ("normal", "common-levels", "integers-power-of-two-amax", "near-midpoints")
]


@pytest.mark.parametrize("case", OBJECTIVES, ids=str)
def test_oracle_is_right_with_weights(case: ObjectiveCase) -> None:
    """The first blocks of a weight with the importances and Hessians of their inputs."""
    weight, options = case.weight(2), case.options(2)
    amax = np.float32(options.get("global_amax", np.abs(weight).max()))
    blocks = weight.reshape(2, -1, 16)
    if case.argument == "importance":
        values = np.broadcast_to(options["importance"], weight.shape).astype(np.float32).reshape(blocks.shape)
    else:
        values = np.broadcast_to(options["hessian"], (2, *options["hessian"].shape))
    for row, column in ((0, 0), (1, 3)):
        if case.argument == "importance" or values[row, column].any():
            check_block(blocks[row, column], amax, **{case.argument: values[row, column]})


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
