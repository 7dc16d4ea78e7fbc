"""Importances and Hessians in XLA programs: exact, traced, mapped and sharded."""

import functools
import warnings
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_helpers import SMALL, gaussian, run_python, same, same_quantized, same_sweep
from objective_cases import HESSIANS, IMPORTANCES, OBJECTIVE_CASES

import nvfp4sweep
import nvfp4sweep_jax
from nvfp4sweep.problem import make_problem
from nvfp4sweep_jax import _exact_sums, _triton

ROWS = 24
SHAPE = (ROWS, 96)
BY_NAME = {str(case): case for case in OBJECTIVE_CASES}
RNG = np.random.default_rng(0)
PROBLEM = make_problem(SHAPE)

oracle = partial(nvfp4sweep.sweep, implementation="oracle")


@functools.cache
def search(argument):
    """All operands are traced, so that one compilation serves all cases of a shape."""

    def run(weight, amax, values):
        options = {argument: values, "implementation": "xla"}
        return nvfp4sweep_jax.sweep(weight, global_amax=amax, **options)

    return jax.jit(run)


def in_one_program(case):
    """Whether `search` takes the case: another dtype is widened, and one importance of each input given."""
    others = case.weights.options.keys() - {"global_amax"}
    return case.weight(ROWS).shape == SHAPE and not others and case.name != "importance-full"


CASES = list(filter(in_one_program, OBJECTIVE_CASES))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    weight, options = case.weight(ROWS), case.options(ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nvfp4sweep.ZeroHessianWarning)
        expected = oracle(weight, **options)
    values = options[case.argument].astype(np.float32)
    if case.argument == "importance":
        values = np.broadcast_to(values, (1, SHAPE[-1]))[0]
    weight = weight.astype(np.float32)
    same_sweep(search(case.argument)(weight, expected.global_amax, values), expected)


def test_there_are_such_cases():
    assert sum(case.argument == "importance" for case in CASES) > 30
    assert sum(case.argument == "hessian" for case in CASES) > 30


@pytest.mark.parametrize("name", ["experts-axis-1/importance-per-matrix", "experts-axis-1/hessian-stacked"])
def test_other_layouts(name):
    """Eager, and of Hessians under jit with vmap over the experts, which is the same."""
    case = BY_NAME[name]
    weight, options = case.weight(ROWS), case.options(ROWS)
    expected = nvfp4sweep.quantize(weight, implementation="oracle", **options)
    found = nvfp4sweep_jax.quantize(jnp.asarray(weight), implementation="xla", **options)
    same_quantized(found, expected)
    if case.argument == "importance":  # as in test_vmap_with_what_all_share
        return
    inner = {**options, "axis": options["axis"] - 1, "batch_dims": 0}
    values = inner.pop(case.argument)

    def one(weight, values):
        return nvfp4sweep_jax.quantize(weight, implementation="xla", **inner, **{case.argument: values})

    mapped = jax.jit(jax.vmap(one))(weight, values)
    for field in ("packed", "scale", "global_scale"):
        same(getattr(mapped, field), getattr(expected, field))


def test_vmap_with_what_all_share():
    weight = gaussian((2, *SHAPE))
    importance = IMPORTANCES["lognormal-1"](RNG, PROBLEM)
    calibrate = partial(nvfp4sweep_jax.calibrate, implementation="xla", **SMALL)
    expected = partial(nvfp4sweep.calibrate, **SMALL)
    mapped = jax.vmap(lambda w: calibrate(w, importance=importance))(weight)
    same(mapped, expected(weight, batch_dims=1, importance=importance))
    several = np.stack([importance, importance[::-1]])
    mapped = jax.vmap(lambda h: calibrate(jnp.asarray(weight[0]), importance=h))(several)
    same(mapped, np.stack([expected(weight[0], importance=h) for h in several]))


def test_concrete_values_are_checked():
    hessian = HESSIANS["zero-blocks"](RNG, PROBLEM)
    weight = gaussian(SHAPE)
    with pytest.warns(nvfp4sweep.ZeroHessianWarning, match="3 of 6 blocks of 16 inputs are all zeros"):
        found = nvfp4sweep_jax.sweep(jnp.asarray(weight), hessian=hessian, implementation="xla")
    with pytest.warns(nvfp4sweep.ZeroHessianWarning):
        same_sweep(found, nvfp4sweep.sweep(weight, hessian=hessian))
    # Those of a traced call are not looked at, unless they are concrete.
    traced = jax.jit(lambda w: nvfp4sweep_jax.calibrate(w, importance=np.float32([-1]), implementation="xla"))
    with pytest.raises(ValueError, match=r"importance\[0\] is -1"):
        traced(weight)
    for argument, shape in (("importance", SHAPE[-1:]), ("hessian", hessian.shape)):
        for value in (np.nan, np.inf, -1):
            found = search(argument)(weight, np.float32(3), np.full(shape, value, np.float32))
            assert found.code.shape == (ROWS, 6)


def test_lowers_for_cuda_without_calls():
    traced = search("hessian").trace(weight := jnp.ones(SHAPE), jnp.float32(1), jnp.ones((6, 16, 16)))
    assert "custom_call" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert weight.dtype == jnp.float32


# --- sums that pairs of float64 do not hold ---------------------------------------------------------


def test_signs_of_sums_are_exact():
    """Terms over all of float32's range, in sums that are exactly 0 or the least product away from it."""
    rng = np.random.default_rng(3)
    count, length = 64, 3
    h = np.ldexp(rng.integers(1, 2**24, (length, count)), rng.integers(-149, 103, (length, count)))
    u, v, rest = (
        np.ldexp(rng.integers(-(2**20), 2**20, (length, count)), shift) for shift in (-150, -40, -150)
    )
    h, u, v, rest = (np.concatenate([x, x[::-1]]) for x in (h, u, v, rest))
    u[length:] *= -1  # the sum is 0
    h = np.concatenate([h, np.full((1, count), 2.0**-149)])
    last = rng.integers(-1, 2, (1, count)) * 2.0**-150
    u, v, rest = (np.concatenate([x, y]) for x, y in ((u, last), (v, last * 0 + 2.0**-150), (rest, last * 0)))

    @jax.jit
    def signs(h, u, v, rest):
        with jax.enable_x64(True):
            h, u, v, rest = (jax.lax.bitcast_convert_type(x, jnp.float64) for x in (h, u, v, rest))
            total, digits = _exact_sums.nothing(h[0]), _exact_sums.no_digits(h[0])
            for i in range(2 * length + 1):
                f = _exact_sums.Factors(u[i], v[i], rest[i])
                row = _exact_sums.plus_multiple(_exact_sums.nothing(h[0]), h[i], f)
                total = _exact_sums.plus_product(total, f.u, row)
                digits = _exact_sums.plus_digits(digits, h[i], f)
            sign, known = _exact_sums.sign(total)
            by_digits = _exact_sums.sign_of_digits(digits)
            return sign.astype(jnp.int32), known, by_digits.astype(jnp.int32)

    sign, known, by_digits = signs(*(x.view(np.uint32).reshape(*x.shape, 2) for x in (h, u, v, rest)))
    exact = [
        sum(
            Fraction(a) * Fraction(b) * (Fraction(c) + Fraction(d))
            for a, b, c, d in zip(*(x[:, i].tolist() for x in (h, u, v, rest)), strict=True)
        )
        for i in range(count)
    ]
    expected = np.sign([int(x > 0) - int(x < 0) for x in exact])
    assert {-1, 0, 1} == set(expected)
    np.testing.assert_array_equal(by_digits, expected)
    np.testing.assert_array_equal(np.asarray(sign)[known], expected[known])
    assert not np.asarray(known).all()


# --- over devices -----------------------------------------------------------------------------------

SHARDING = """
import re
from functools import partial
import jax, jax.numpy as jnp, numpy as np, nvfp4sweep, nvfp4sweep_jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)

rng = np.random.default_rng(0)
w = rng.standard_normal((32, 256)).astype(np.float32)
x = rng.standard_normal((16, 100, 16)).astype(np.float32)
given = {"importance": np.square(x).mean(1).reshape(256), "hessian": x.swapaxes(1, 2) @ x}
given["hessian"] = (given["hessian"] + given["hessian"].swapaxes(1, 2)) / 2
amax = np.float32(np.abs(w).max())
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
for argument, spec in (("importance", P(None, "b")), ("hessian", P("a", "b"))):
    place = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
    run = jax.jit(lambda w, x: nvfp4sweep_jax.sweep(w, implementation="xla", **{argument: x}))
    whole = place(w, spec), place(given[argument], P(spec[1]))
    compiled = run.lower(*whole).compile()
    found = compiled(*whole)
    same(found, nvfp4sweep.sweep(w, **{argument: given[argument]}))
    assert found.code.sharding.is_equivalent_to(whole[0].sharding, 2)
    assert not re.findall("all-gather|all-to-all|collective-permute", compiled.as_text())

def local(w, x):
    return nvfp4sweep_jax.calibrate(w, global_amax=amax, hessian=x, implementation="xla")

mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("a", "b"), P("b")), out_specs=P("a", "b"))
same([jax.jit(mapped)(w, given["hessian"])], [nvfp4sweep.calibrate(w, hessian=given["hessian"])])
"""


def test_devices_search_their_own_blocks():
    run_python(SHARDING, XLA_FLAGS="--xla_force_host_platform_device_count=8")


# --- Triton's kernels -------------------------------------------------------------------------------


@pytest.mark.skipif(bool(_triton.why_not(jax.devices()[0].platform)), reason="no Triton for this platform")
@pytest.mark.parametrize(
    "name",
    [
        "normal/importance-lognormal-1",
        "normal/importance-full",
        "middle-axis/importance-lognormal-2",
        "two-batch-axes/importance-per-matrix",
        "experts/importance-full",
        "experts/importance-lognormal-1",
        "one-block/hessian-common-0.5",
    ],
)
def test_triton(name):
    case = BY_NAME[name]
    weight, options = case.weight(2), case.options(2)
    values = options.pop(case.argument)
    sweep = partial(nvfp4sweep_jax.sweep, implementation="triton", **options)
    found = jax.jit(lambda w, x: sweep(w, **{case.argument: x}))(weight, values)
    same_sweep(found, oracle(weight, **options, **{case.argument: values}))
