"""What is special to the CPU engine with importances and Hessians: tiles, layouts, memory, integers."""

import os
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import minilm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import HESSIANS, IMPORTANCES

import nvfp4sweep
from nvfp4sweep.problem import make_problem

pytest.importorskip("numba")
import numba

from nvfp4sweep import cpu_exact, cpu_searches

LARGE = np.random.default_rng(0).standard_normal((2048, 1040)).astype(np.float32)  # 65 blocks a row


def options_for(weight: Any, axis: int = -1) -> list[dict[str, Any]]:
    problem, rng = make_problem(weight.shape, axis=axis), np.random.default_rng(1)
    return [
        {"importance": IMPORTANCES["lognormal-2"](rng, problem), "axis": axis},
        {"hessian": HESSIANS["512-tokens"](rng, problem), "axis": axis},
    ]


def same(got: nvfp4sweep.Sweep, wanted: nvfp4sweep.Sweep, part: Any = ...) -> None:
    for field in ("amax", "code", "error"):
        np.testing.assert_array_equal(getattr(got, field)[part], getattr(wanted, field))


@pytest.mark.parametrize("which", [0, 1], ids=["importance", "hessian"])
def test_large_weights_use_threads_and_keep_order(which: int) -> None:
    options = options_for(LARGE)[which]
    found = nvfp4sweep.sweep(LARGE, **options)
    for part in (slice(0, 20), slice(1000, 1020), slice(2028, 2048)):
        wanted = nvfp4sweep.sweep(
            LARGE[part], global_amax=found.global_amax, implementation="oracle", **options
        )
        same(found, wanted, part)


@pytest.mark.parametrize("which", [0, 1], ids=["importance", "hessian"])
def test_layouts_agree(which: int) -> None:
    """Strided, transposed, read-only and unaligned arrays, larger than one slab; and weights along axis 0."""
    options = options_for(LARGE)[which]
    expected = nvfp4sweep.sweep(LARGE, **options)
    read_only = LARGE.copy()
    read_only.flags.writeable = False
    unaligned = np.frombuffer(b"\0" + LARGE.tobytes(), np.uint8)[1:].view(np.float32).reshape(LARGE.shape)
    padded = np.zeros((2048, 1100), np.float32)
    padded[:, 7 : 7 + 1040] = LARGE
    for weight in (
        read_only,
        unaligned,
        padded[:, 7 : 7 + 1040],
        LARGE.T.copy().T,
        LARGE[::-1, ::-1][::-1, ::-1],
    ):
        same(nvfp4sweep.sweep(weight, **options), expected)
    along_axis_0 = {k: v[:, None] if k == "importance" else v for k, v in options.items()} | {"axis": 0}
    for weight in (LARGE.T, LARGE.T.copy()):
        found = nvfp4sweep.sweep(weight, **along_axis_0)
        same(nvfp4sweep.Sweep(*(f.T for f in found)), expected)


@pytest.mark.parametrize("shape", [(1, 16), (1, 16 * 1030), (3, 16 * 257), (65, 48), (130, 16), (5000, 16)])
def test_any_number_of_lanes(shape: tuple[int, int]) -> None:
    """Rows and positions that tiles and tasks do not divide."""
    weight = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    for options in options_for(weight):
        same(
            nvfp4sweep.sweep(weight, **options), nvfp4sweep.sweep(weight, implementation="oracle", **options)
        )


@pytest.mark.parametrize("strides", ["fortran", "negative", "every second", "read-only"])
def test_importances_of_any_strides(strides: str) -> None:
    weight = LARGE[:96, :480]
    h = np.random.default_rng(3).lognormal(0, 1, weight.shape).astype(np.float32)
    arrange: dict[str, Callable[[Any], Any]] = {
        "fortran": np.asfortranarray,
        "negative": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
        "every second": lambda a: np.repeat(np.repeat(a, 2, axis=0), 2, axis=1)[::2, ::2],
        "read-only": lambda a: np.broadcast_to(a, a.shape),
    }
    for axis in (0, 1):
        wanted = nvfp4sweep.sweep(weight, importance=h, axis=axis, implementation="oracle")
        same(nvfp4sweep.sweep(weight, importance=arrange[strides](h), axis=axis), wanted)


@pytest.mark.parametrize("view", ["contiguous", "strided", "transposed"])
def test_no_copy_of_the_weight(view: str) -> None:
    """Nor of an importance that repeats."""
    big = np.zeros((8192, 2048), np.float32)
    weight = {"contiguous": big, "strided": big[:, :1024], "transposed": big.T}[view]
    for axis in (0, 1):
        for options in options_for(weight, axis):
            nvfp4sweep.calibrate(weight[:16, :16], axis=axis)
            tracemalloc.start()
            try:
                amax = nvfp4sweep.calibrate(weight, **options)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            weights = next(value.nbytes for value in options.values() if isinstance(value, np.ndarray))
            slabs = 3 * 4 * cpu_searches.ELEMENTS_A_SLAB * (1 + len(os.sched_getaffinity(0)))
            assert peak - amax.nbytes < min(slabs, weight.nbytes // 2) + 12 * weights


# --- sums of integers -----------------------------------------------------------------------------


@numba.njit
def sign_of_sum(terms: Any) -> Any:
    digits = np.zeros(cpu_exact.DIGITS, np.int64)
    for i in range(len(terms)):
        cpu_exact.add_product(digits, terms[i, 0], terms[i, 1], terms[i, 2], terms[i, 3])
    return cpu_exact.sign_of(digits), digits.any()


NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 1.0, 3.0, 2.0**127, 2.0**-149, 1 + 2.0**-23, float(np.finfo(np.float32).max)]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=6), st.integers(-1, 1))
def test_signs_are_those_of_exact_sums(products: list[tuple[float, float, float]], nudge: int) -> None:
    """Of sums that cancel but for the least product there is, or to nothing."""
    least = 2.0**-149
    terms = [(*p, 1.0) for p in products] + [(c, a, b, -1.0) for a, b, c in products]
    terms += [(least, least, least * nudge, 1.0)]
    total = sum(Fraction(a) * Fraction(b) * Fraction(c) * int(sign) for a, b, c, sign in terms)
    assert sign_of_sum(np.array(terms)) == (nudge, False)
    assert nudge == (total > 0) - (total < 0)
    some = [(*p, 1.0) for p in products]
    total = sum(Fraction(a) * Fraction(b) * Fraction(c) for a, b, c in products)
    assert sign_of_sum(np.array(some)) == ((total > 0) - (total < 0), False)


# --- a real model ---------------------------------------------------------------------------------


@pytest.mark.skipif(bool(minilm.missing()), reason=str(minilm.missing()))
@pytest.mark.parametrize("layer", ["encoder.layer.0.attention.self.query", "encoder.layer.5.output.dense"])
def test_a_layer_of_minilm(layer: str) -> None:
    """Real weights and real activations, every eighth row against the oracle; and what it is for."""
    name = f"{layer}.weight"
    weight = minilm.model().get_parameter(name).detach().numpy()
    moments = minilm.hessians()[name]
    hessian, importance = moments.hessian().numpy(), moments.importance().numpy()
    plain = nvfp4sweep.sweep(weight)
    for options in ({"importance": importance}, {"hessian": hessian}):
        found = nvfp4sweep.sweep(weight, **options)
        wanted = nvfp4sweep.sweep(
            weight[::8], global_amax=found.global_amax, implementation="oracle", **options
        )
        same(found, wanted, slice(None, None, 8))
        assert (found.code != plain.code).mean() > 0.1
