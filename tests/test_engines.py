"""Every engine gives the oracle's answer on every block of every case: codes, amax, error and bytes."""

from typing import Any

import numpy as np
import pytest
from cases import CASES, Case
from conftest import Engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import nvfp4sweep
from nvfp4sweep import formats


def assert_same(got: Any, expected: Any, what: str) -> None:
    """Equal bit for bit, dtype and shape included: a NaN fails unless it is expected."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), what
    bits = np.dtype(f"u{got.itemsize}")
    different = got.view(bits) != expected.view(bits)
    assert not different.any(), f"{what}: {different.sum()} of {different.size} differ"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, engine: Engine) -> None:
    weight = case.weight(engine.rows)
    before = weight.copy()
    expected = nvfp4sweep.sweep(weight, implementation="oracle", **case.options)
    got = engine.sweep(weight, **case.options)
    for field in expected._fields:
        assert_same(getattr(got, field), getattr(expected, field), field)
    assert_same(weight, before, "the weight must not change")


PACKABLE = [case for case in CASES if case.options.get("block_size", 16) % 2 == 0]


@pytest.mark.parametrize("case", PACKABLE, ids=str)
def test_quantized_bytes(case: Case, engine: Engine) -> None:
    weight = case.weight(engine.rows)
    expected = nvfp4sweep.quantize(weight, implementation="oracle", **case.options)
    packed, scale, global_scale = engine.quantize(weight, **case.options)
    assert_same(packed, expected.packed, "packed")
    assert_same(scale, expected.scale.view(np.uint8), "scale")
    assert_same(global_scale, expected.global_scale, "global_scale")


def test_calibrate_is_the_amax_of_the_sweep(engine: Engine) -> None:
    weight = CASES[0].weight(engine.rows)
    assert_same(engine.calibrate(weight), engine.sweep(weight).amax, "amax")


_SCALES = formats.scale_by_code(np.float32(1)).astype(np.float64)


@st.composite
def adversarial_blocks(draw: st.DrawFn) -> tuple[Any, float]:
    """Blocks on and next to the grid of some scale of a global amax, where scales tie or nearly do."""
    amax = draw(st.sampled_from([1.0, 3.0, 5.25, 4.8125, 7.0, 2688.0, 1e-3, 3.7e4]))
    scale = np.float64(amax) * _SCALES[draw(st.integers(9, 126))]
    points = st.sampled_from([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7.9375])
    w = draw(arrays.arrays(np.float64, (2, 16), elements=points)) * scale
    nudges = draw(arrays.arrays(np.int8, (2, 16), elements=st.sampled_from([0, 0, 0, 1, -1])))
    w32 = w.astype(np.float32)
    towards = np.where(nudges > 0, np.float32(np.inf), np.float32(0))
    return np.where(nudges == 0, w32, np.nextafter(w32, towards)), amax


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=adversarial_blocks())
def test_blocks_on_the_grid(drawn: tuple[Any, float], engine: Engine) -> None:
    weight, amax = drawn
    if engine.rows < 8:
        weight = weight[:1]
    expected = nvfp4sweep.sweep(weight, global_amax=amax, implementation="oracle")
    assert_same(engine.sweep(weight, global_amax=amax).code, expected.code, "code")
