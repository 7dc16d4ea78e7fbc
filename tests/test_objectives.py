"""With importances and Hessians every engine gives the oracle's answer on every block; identities hold."""

import functools
import warnings
from typing import Any

import numpy as np
import pytest
from cases import CASES
from conftest import Engine
from engine_helpers import adversarial_blocks, assert_same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from objective_cases import HESSIANS, IMPORTANCES, OBJECTIVE_CASES, ObjectiveCase, lognormal

import nvfp4sweep
from nvfp4sweep.problem import make_problem

ROWS = 24  # of a case, at most
BY_NAME = {str(case): case for case in OBJECTIVE_CASES}


def unwarned(function: Any, *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nvfp4sweep.ZeroHessianWarning)
        return function(*arguments, **options)


@functools.cache
def expected(name: str, rows: int) -> nvfp4sweep.Sweep:
    """The oracle's answer, once for all engines."""
    case = BY_NAME[name]
    return unwarned(nvfp4sweep.sweep, case.weight(rows), implementation="oracle", **case.options(rows))


@pytest.mark.parametrize("case", OBJECTIVE_CASES, ids=str)
def test_case(case: ObjectiveCase, objective_engine: Engine) -> None:
    rows = min(ROWS, objective_engine.rows)
    weight, options = case.weight(rows), case.options(rows)
    before = weight.copy(), options[case.argument].copy()
    got = unwarned(objective_engine.sweep, weight, **options)
    for field, value in expected(str(case), rows)._asdict().items():
        assert_same(getattr(got, field), value, field)
    assert_same(weight, before[0], "the weight must not change")
    assert_same(options[case.argument], before[1], f"the {case.argument} must not change")


@pytest.mark.parametrize(
    "name", ["normal/importance-lognormal-2", "axis-0/importance-full", "bfloat16/hessian-common-0.5"]
)
def test_calibrate_and_quantize(name: str, objective_engine: Engine) -> None:
    case, rows = BY_NAME[name], min(ROWS, objective_engine.rows)
    weight, options = case.weight(rows), case.options(rows)
    assert_same(objective_engine.calibrate(weight, **options), expected(name, rows).amax, "amax")
    stored = nvfp4sweep.quantize(weight, implementation="oracle", **options)
    for got, wanted in zip(
        objective_engine.quantize(weight, **options),
        (stored.packed, stored.scale.view(np.uint8), stored.global_scale),
        strict=True,
    ):
        assert_same(got, wanted, "quantize")


def test_zero_hessians_are_told(objective_engine: Engine) -> None:
    """Of 6 blocks of inputs 3 have no activations: their weights are searched by plain squared error."""
    case, rows = BY_NAME["normal/hessian-zero-blocks"], min(ROWS, objective_engine.rows)
    weight, options = case.weight(rows), case.options(rows)
    with pytest.warns(nvfp4sweep.ZeroHessianWarning, match="3 of 6 blocks of 16 inputs are all zeros"):
        got = objective_engine.sweep(weight, **options)
    assert_same(got.code[:, ::2], objective_engine.sweep(weight).code[:, ::2], "code")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("given", [None, 3.0], ids=["own amax", "given amax"])
def test_what_does_not_count_must_be_finite_too(value: float, given: Any, objective_engine: Engine) -> None:
    weight = np.ones((2, 32), np.float32)
    weight[1, 21] = value
    counts = (np.arange(32) != 21).astype(np.float32)
    for options in ({"importance": counts}, {"hessian": counts.reshape(2, 16, 1) * np.eye(16)}):
        with pytest.raises(ValueError, match=r"weight\[1, 21\] is"):
            objective_engine.calibrate(weight, global_amax=given, **options)


# --- identities -----------------------------------------------------------------------------------

WEIGHTS = [
    case
    for case in CASES
    if case.name
    in (
        "normal",
        "bfloat16",
        "common-levels",
        "integers-amax-2688",
        "sparse",
        "blocks-over-decades",
        "axis-0",
    )
]


@pytest.mark.parametrize("case", WEIGHTS, ids=str)
@pytest.mark.parametrize("value", [1.0, 0.7, 3e-30])
def test_equal_importances_give_the_plain_answer(case: Any, value: float, objective_engine: Engine) -> None:
    weight = case.weight(min(ROWS, objective_engine.rows))
    plain = objective_engine.sweep(weight, **case.options)
    weighted = objective_engine.sweep(weight, importance=np.float32(value), **case.options)
    assert_same(weighted.code, plain.code, "code")
    assert_same(weighted.amax, plain.amax, "amax")
    if value == 1:
        assert_same(weighted.error, plain.error, "error")


@pytest.mark.parametrize("case", WEIGHTS, ids=str)
def test_diagonal_hessians_give_the_answer_of_importances(case: Any, objective_engine: Engine) -> None:
    weight = case.weight(min(ROWS, objective_engine.rows))
    axis = case.options.get("axis", -1)
    problem = make_problem(weight.shape, axis=axis)
    h = lognormal(1)(np.random.default_rng(0), weight.shape[axis])
    for importance in (h, np.ones_like(h)):
        shaped = importance.reshape(-1, *(1,) * (weight.ndim - 1 - problem.axis))
        hessian = importance.reshape(-1, 16, 1) * np.eye(16, dtype=np.float32)
        weighted = objective_engine.sweep(weight, importance=shaped, **case.options)
        formed = objective_engine.sweep(weight, hessian=hessian, **case.options)
        for field in weighted._fields:
            assert_same(getattr(formed, field), getattr(weighted, field), field)
    assert_same(formed.code, objective_engine.sweep(weight, **case.options).code, "plain code")


@pytest.mark.parametrize("argument", ["importance", "hessian"])
def test_a_power_of_two_changes_nothing(argument: str, objective_engine: Engine) -> None:
    weight = CASES[0].weight(min(ROWS, objective_engine.rows))
    make = IMPORTANCES["lognormal-1"] if argument == "importance" else HESSIANS["512-tokens"]
    values = make(np.random.default_rng(0), make_problem(weight.shape))
    once = objective_engine.sweep(weight, **{argument: values})
    again = objective_engine.sweep(weight, **{argument: values * np.float32(2.0**-60)})
    assert_same(again.code, once.code, "code")
    assert_same(again.error * np.float32(2.0**60), once.error, "error")


# --- any block ------------------------------------------------------------------------------------

SOME = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@SOME
@given(
    drawn=adversarial_blocks(),
    h=arrays.arrays(
        np.float32, (16,), elements=st.sampled_from([0, 1, 1, 2, 3, 0.1, 1e-6, 2.0**-40, 1e30, 1e-44])
    ),
)
def test_any_importance(drawn: tuple[Any, float], h: Any, objective_engine: Engine) -> None:
    check(objective_engine, *drawn, importance=h)


@SOME
@given(
    drawn=adversarial_blocks(),
    a=arrays.arrays(np.float64, (4, 16), elements=st.sampled_from([0, 0, 0, 1, -1, 2, 0.3, 1e-3])),
    ridge=st.sampled_from([0, 0, 1, 0.01]),
    scale=st.sampled_from([1, 1, 1e-30, 1e30]),
)
def test_any_hessian(
    drawn: tuple[Any, float], a: Any, ridge: float, scale: float, objective_engine: Engine
) -> None:
    """Sums of a few squares: singular, and with values that tie."""
    hessian = ((a.T @ a + ridge * np.eye(16)) * scale).astype(np.float32)
    check(objective_engine, *drawn, hessian=hessian[None])


def check(engine: Engine, weight: Any, amax: float, **options: Any) -> None:
    if engine.rows < 8:
        weight = weight[:1]
    wanted = unwarned(nvfp4sweep.sweep, weight, global_amax=amax, implementation="oracle", **options)
    got = unwarned(engine.sweep, weight, global_amax=amax, **options)
    assert_same(got.code, wanted.code, "code")
    assert_same(got.error, wanted.error, "error")
