"""Every engine gives the oracle's answer on every block of every case: codes, amax, error and bytes."""

from typing import Any

import numpy as np
import pytest
from cases import CASES, Case
from conftest import Engine
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


def test_blocks_on_the_grid(engine: Engine) -> None:
    slow = engine.rows < 8

    @settings(max_examples=20 if slow else 60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(drawn=adversarial_blocks())
    def check(drawn: tuple[Any, float]) -> None:
        weight, amax = drawn
        if slow:
            weight = weight[:1]
        expected = nvfp4sweep.sweep(weight, global_amax=amax, implementation="oracle")
        assert_same(engine.sweep(weight, global_amax=amax).code, expected.code, "code")

    check()
