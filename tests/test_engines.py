"""Every engine gives the oracle's answer on every block of every case: codes, amax, error and bytes."""

from typing import Any

import numpy as np
import pytest
from cases import CASES, Case
from conftest import CUDA, Engine
from engine_helpers import adversarial_blocks, assert_same
from hypothesis import HealthCheck, given, settings

import nvfp4sweep


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
#: Of engines that take seconds a case, interpreted or compiled anew, those that test_case searches and that
#: are packed as others are.
PACKED_AS_OTHERS = {
    "triton": {"amax-subnormal", "tiny", "subnormal", "block-96"},
    "jit": {
        "float16", "bfloat16", "float16-ends", "sparse-bfloat16", "axis-0-bfloat16", "one-block",
        "one-dimension", "blocks-over-decades-min-code-8", "min-code-100", "min-code-126", "block-32",
        "block-32-over-decades", "axis-0-block-32", "block-96", "experts-given-amax", "two-batch-axes",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", PACKABLE, ids=str)
def test_quantized_bytes(case: Case, engine: Engine) -> None:
    if not CUDA and case.name in PACKED_AS_OTHERS.get(engine.name, ()):
        pytest.skip("packed as other cases are")
    weight = case.weight(engine.rows)
    expected = nvfp4sweep.quantize(weight, implementation="oracle", **case.options)
    packed, scale, global_scale = engine.quantize(weight, **case.options)
    assert_same(packed, expected.packed, "packed")
    assert_same(scale, expected.scale.view(np.uint8), "scale")
    assert_same(global_scale, expected.global_scale, "global_scale")


def test_calibrate_is_the_amax_of_the_sweep(engine: Engine) -> None:
    weight = CASES[0].weight(engine.rows)
    assert_same(engine.calibrate(weight), engine.sweep(weight).amax, "amax")


def test_blocks_on_the_grid(engine: Engine) -> None:
    examples, blocks = (5, 16) if engine.rows < 8 else (60, 2)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(drawn=adversarial_blocks(blocks))
    def check(drawn: tuple[Any, float]) -> None:
        weight, amax = drawn
        expected = nvfp4sweep.sweep(weight, global_amax=amax, implementation="oracle")
        assert_same(engine.sweep(weight, global_amax=amax).code, expected.code, "code")

    check()
