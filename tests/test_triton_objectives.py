"""The CUDA kernels for importances and Hessians, in Triton's interpreter: cases that it runs in seconds."""

import functools
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from conftest import CUDA, Engine, _engine
from engine_helpers import assert_same
from objective_cases import OBJECTIVE_CASES, ObjectiveCase

import nvfp4sweep

# On a device test_objectives.py runs all cases, by JAX.
pytestmark = pytest.mark.skipif(CUDA, reason="the kernels do not run in the interpreter")

ROWS = 2
BY_NAME = {str(case): case for case in OBJECTIVE_CASES}
NAMES = [
    "normal/importance-ones",
    "normal/importance-zeros",
    "normal/importance-all-zero",
    "normal/importance-twelve-decades",
    "normal/importance-full",
    "zero-blocks/importance-lognormal-2",
    "all-zero/importance-lognormal-2",
    "no-blocks/importance-lognormal-2",
    "no-columns/importance-lognormal-2",
    "float16/importance-lognormal-2",
    "strided/importance-lognormal-2",
    "blocks-over-decades-min-code-8/importance-lognormal-2",
    "min-code-100/importance-lognormal-2",
    "block-3/importance-full",
    "block-32/importance-lognormal-2",
    "block-96/importance-lognormal-2",
    "axis-0/importance-full",
    "axis-0-bfloat16/importance-lognormal-2",
    "middle-axis/importance-full",
    "experts/importance-full",
    "experts-axis-1/importance-per-matrix",
    "one-block/hessian-common-0.5",
    "no-blocks/hessian-common-0.5",
    "all-zero/hessian-common-0.5",
    "min-code-126/hessian-common-0.5",
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return _engine("triton")


def check(engine: Engine, weight: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nvfp4sweep.ZeroHessianWarning)
        expected = nvfp4sweep.sweep(weight, implementation="oracle", **options)
        got = engine.sweep(weight, **options)
    for field, value in expected._asdict().items():
        assert_same(getattr(got, field), value, field)


@pytest.mark.parametrize("case", [BY_NAME[name] for name in NAMES], ids=str)
def test_case(case: ObjectiveCase, engine: Engine) -> None:
    check(engine, case.weight(ROWS), **case.options(ROWS))


@pytest.mark.parametrize("name", ["importance", "hessian"])
def test_what_pairs_of_float64_cannot_tell_apart(name: str, engine: Engine) -> None:
    """The largest importance ties at a scale and its double, and one smaller by 2^200 decides."""
    case = BY_NAME[f"normal/{name}-all-of-float32"]
    weight, given = case.weight(24), case.options(24)[name]
    given = given[32:48] if name == "importance" else given[2:3]
    check(engine, weight[[4, 11], 32:48], global_amax=float(np.abs(weight).max()), **{name: given})


def test_edges_of_rounders(engine: Engine) -> None:
    case = BY_NAME["rounder-edges/hessian-common-0.5"]
    check(engine, case.weight(32)[:, :16], **{**case.options(32), "hessian": case.options(32)["hessian"][:1]})


def integer_forms(rng: np.random.Generator, *shape: int) -> Any:
    """A^T A in small integers, which float32 holds exactly."""
    a = rng.integers(-1, 2, (*shape, 16, 16))
    return (a.swapaxes(-1, -2) @ a + 4 * np.eye(16)).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "options"),
    [((2, 32), {}), ((32, 2), {"axis": 0}), ((2, 32, 1), {"axis": 1, "batch_dims": 1, "min_code": 9})],
    ids=["rows", "axis-0", "experts"],
)
def test_hessians_of_layouts(shape: tuple[int, ...], options: dict[str, Any], engine: Engine) -> None:
    """Of the experts each has Hessians of its own, and of the second one is zero."""
    rng = np.random.default_rng(5)
    weight = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    hessian = integer_forms(rng, *shape[: options.get("batch_dims", 0)], 2)
    if "batch_dims" in options:
        hessian[1, 0] = 0
    check(engine, weight, hessian=hessian, **options)


@pytest.mark.parametrize(
    ("shape", "options", "importance"),
    [
        ((5, 512), {}, (512,)),
        ((5, 512), {}, (5, 512)),
        ((2, 3, 512), {"batch_dims": 1}, (2, 1, 512)),
        ((32, 96), {"axis": 0}, (32, 1)),
        ((32, 96), {"axis": 0}, (32, 96)),
        ((2, 16, 64), {"axis": 1, "batch_dims": 1}, (2, 16, 1)),
        ((2, 16, 64), {"axis": 1}, (16, 1)),
    ],
)
def test_tiles_that_follow_each_other(
    shape: tuple[int, ...],
    options: dict[str, Any],
    importance: tuple[int, ...],
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program takes several, and loads once what they share; the last program has fewer."""
    from nvfp4sweep import triton_launch, triton_sweeps

    monkeypatch.setattr(triton_sweeps, "_FEWEST_GROUPS", 1)
    monkeypatch.setattr(triton_sweeps, "_LARGEST_GROUP", 2)
    triton_launch.plan.cache_clear()
    rng = np.random.default_rng(7)
    weight = rng.standard_normal(shape).astype(np.float32)
    check(engine, weight, importance=rng.lognormal(0, 1, importance).astype(np.float32), **options)
    triton_launch.plan.cache_clear()


def test_what_cannot_be_weighed(engine: Engine) -> None:
    weight = np.random.default_rng(0).standard_normal((1, 32)).astype(np.float32)
    refuse = functools.partial(engine.calibrate, min_code=126)  # after a search, here of one code
    h = np.ones(32)
    h[3] = -1
    with pytest.raises(ValueError, match=r"importance\[3\] is -1"):
        refuse(weight, importance=h)
    hessian = np.zeros((2, 16, 16), np.float32)
    with pytest.warns(nvfp4sweep.ZeroHessianWarning, match="2 of 2 blocks of 16 inputs"):
        assert_same(engine.calibrate(weight, hessian=hessian), engine.calibrate(weight), "amax")
    hessian[1, 3, 3] = -1
    with pytest.raises(ValueError, match=r"hessian\[1\] has the eigenvalue -1: it must be positive"):
        refuse(weight, hessian=hessian)
    weight[0, 21] = np.nan
    with pytest.raises(ValueError, match=r"weight\[0, 21\] is nan"):
        refuse(weight, importance=1.0)
