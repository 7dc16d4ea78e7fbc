"""What is particular to JAX: tracing, sharding, engines by device, and exactness of the XLA engine.

The cases that every engine shares are elsewhere; expected values here come from the oracle or, for
the settling of ties, from exact rational arithmetic.
"""

import inspect
import os
import re
import subprocess
import sys
import warnings
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import nvfp4sweep
import nvfp4sweep_jax
from nvfp4sweep import formats
from nvfp4sweep.problem import make_problem
from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax import _call, _eager, _xla

SHAPE = (16, 128)


@pytest.fixture
def on_host():
    """Arrays are made on the CPU, also where there is a GPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


needs_host = pytest.mark.usefixtures("on_host")


def gaussian(shape=SHAPE, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def same(actual, expected):
    """Equal shape, dtype and bits."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = f"u{actual.itemsize}"
    np.testing.assert_array_equal(actual.view(bits), expected.view(bits))


def same_sweep(actual, expected):
    for name in expected._fields:
        same(getattr(actual, name), getattr(expected, name))


def same_quantized(actual, expected):
    for name in ("packed", "scale", "global_scale"):
        same(getattr(actual, name), getattr(expected, name))
    assert (actual.axis, actual.block_size) == (expected.axis, expected.block_size)


def check_xla(weight, **options):
    expected = nvfp4sweep.sweep(weight, implementation="oracle", **options)
    same_sweep(nvfp4sweep_jax.sweep(jnp.asarray(weight), implementation="xla", **options), expected)


def check_xla_quantize(weight, **options):
    expected = nvfp4sweep.quantize(weight, implementation="oracle", **options)
    same_quantized(nvfp4sweep_jax.quantize(jnp.asarray(weight), implementation="xla", **options), expected)


def structured(kind, seed=1):
    rng = np.random.default_rng(seed)
    weight = gaussian(seed=seed)
    if kind == "levels":  # ties between scales of ratio 1.5
        return rng.choice(np.array([0, 1.5, 3, 6], np.float32), SHAPE)
    if kind == "sparse":
        return weight * (rng.random(SHAPE) < 0.1)
    if kind == "integers":
        return rng.integers(-8, 9, SHAPE).astype(np.float32)
    if kind == "rows":
        return weight * (10.0 ** rng.uniform(-12, 0, (SHAPE[0], 1))).astype(np.float32)
    if kind == "zeros":
        return weight * (np.arange(SHAPE[0])[:, None] % 2 == 0)
    return weight


@pytest.mark.parametrize("kind", ["gaussian", "levels", "sparse", "integers", "rows", "zeros"])
@pytest.mark.parametrize("given", [None, 5.25, 10.5])
def test_xla_is_exact(kind, given):
    check_xla(structured(kind), global_amax=given)
    check_xla_quantize(structured(kind), global_amax=given)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("given", [None, 5.25])
def test_xla_is_exact_in_half_precision(dtype, given):
    check_xla(gaussian().astype(dtype), global_amax=given)
    check_xla((gaussian() * np.float32(1e-6)).astype(dtype))


@pytest.mark.parametrize("factor", [1e36, 1e-30, 1e-36, 1e-38, 1e-44])
def test_xla_is_exact_at_the_ends_of_float32(factor):
    check_xla(gaussian() * np.float32(factor))
    check_xla_quantize(gaussian() * np.float32(factor))


@pytest.mark.parametrize("given", [0, 1e-45, 1e-42, 1e-35, 2.0**-100, 1e-3, 3e4, 3e38])
def test_xla_is_exact_for_any_global_amax(given):
    for factor in (1, 1e-38):
        check_xla(gaussian((4, 128)) * np.float32(factor), global_amax=given)
        check_xla_quantize(gaussian((4, 128)) * np.float32(factor), global_amax=given)


@pytest.mark.parametrize("min_code", [8, 100])
def test_xla_is_exact_for_min_code(min_code):
    check_xla(structured("levels"), min_code=min_code, global_amax=10.5)


@pytest.mark.parametrize("block_size", [1, 8, 32, 64])
def test_xla_is_exact_for_block_sizes(block_size):
    check_xla(structured("levels"), block_size=block_size, global_amax=10.5)


def test_xla_takes_empty_weights():
    check_xla(np.zeros((3, 0), np.float32))


# --- the arithmetic that XLA must not change ------------------------------------------------------


def rationals(high, low):
    return [Fraction(float(h)) + Fraction(float(x)) for h, x in zip(high, low, strict=True)]


def nearest(w, s):
    return min((Fraction(float(q)) for q in formats.E2M1_VALUES), key=lambda q: abs(w - q * s))


@pytest.mark.parametrize("given", [5.25, 1e-42, 3e38])
def test_exact_objective_is_exact(given):
    rng = np.random.default_rng(2)
    weight = rng.choice(np.array([0, 1.5, 3, 6, 2.5, 4.75, 0.3, 0.1], np.float32), (4, 128))
    weight = weight * np.float32(given / 6 if given > 1e-40 else 1e-43)
    problem = make_problem(weight.shape)
    code = rng.integers(90, 127, problem.block_shape).astype(np.int32)
    scales = formats.scale_by_code(given)[code]

    @jax.jit
    def objective(weight, code, global_amax):
        view = _xla._block_view(weight, problem)
        with jax.enable_x64(True):
            scale = exact.block_scale(code, exact.widen(exact.magnitude_bits(global_amax)))
            ((high, low),) = _xla._exact_objectives(view, [scale], problem)
            return tuple(lax.bitcast_convert_type(x, jnp.uint32) for x in (high, low))

    high, low = (
        np.asarray(x).view(np.float64).ravel()
        for x in objective(jnp.asarray(weight), jnp.asarray(code), jnp.float32(given))
    )
    blocks = weight.reshape(-1, 16)
    for found, block, scale in zip(rationals(high, low), blocks, scales.ravel(), strict=True):
        s = Fraction(float(scale))
        terms = [(Fraction(float(w)), nearest(Fraction(float(w)), s)) for w in block]
        assert found == sum((q * s) ** 2 - 2 * w * q * s for w, q in terms)


def test_error_is_summed_in_order_without_contraction():
    weight = gaussian((64, 256))
    problem = make_problem(weight.shape)
    scale = np.random.default_rng(5).uniform(0.1, 0.5, problem.block_shape).astype(np.float32)

    @jax.jit
    def error(weight, scale):
        with jax.enable_x64(True):
            total = _xla._error(_xla._block_view(weight, problem), scale.astype(jnp.float64), problem)
            return lax.bitcast_convert_type(total, jnp.uint32)

    magnitude = np.abs(weight.reshape(-1, 16).astype(np.float64))[..., None]
    residual = magnitude - formats.E2M1_VALUES * scale.reshape(-1, 1, 1).astype(np.float64)
    expected = np.add.accumulate((residual * residual).min(axis=-1), axis=1)[:, -1]
    np.testing.assert_array_equal(np.asarray(error(weight, scale)).view(np.float64).ravel(), expected)


@pytest.mark.parametrize("factor", [1, 1 / 3, 1e-3])
def test_ties_between_scales_take_the_lowest_code(factor):
    weight = (structured("levels", seed=3) * np.float32(factor))[:4, :128]
    given = np.float32(10.5 * factor)
    code = np.asarray(nvfp4sweep_jax.sweep(jnp.asarray(weight), global_amax=given, implementation="xla").code)
    scales = [Fraction(float(s)) for s in formats.scale_by_code(given)]
    for block, found in zip(weight.reshape(-1, 16), code.ravel(), strict=True):
        ws = [abs(Fraction(float(w))) for w in block]
        errors = {k: sum((w - nearest(w, scales[k]) * scales[k]) ** 2 for w in ws) for k in formats.CODES}
        assert found == min(formats.CODES, key=lambda k: (errors[k], k))


def test_the_screen_leaves_ties_and_seldom_more():
    """So the tests above reach `_settle`, and dense weights seldom need it."""

    @jax.jit
    def left(weight, global_amax):
        problem = make_problem(weight.shape)
        bits = exact.magnitude_bits(global_amax).reshape(1, 1)
        screened = _xla._screen(_xla._block_view(weight, problem), bits, problem)
        return lax.population_count(_xla._unpacked(screened)[2])

    assert (np.asarray(left(structured("levels"), np.float32(10.5))) > 1).all()
    assert (np.asarray(left(structured("sparse"), np.float32(5.25))) > 1).any()
    assert (np.asarray(left(gaussian((64, 1024)), np.float32(5.25))) == 1).mean() > 0.99


def test_scales_are_those_of_the_formats():
    rng = np.random.default_rng(4)
    amaxes = np.concatenate(
        [
            rng.uniform(1, 2, 2000) * 2.0 ** rng.integers(-149, 127, 2000),
            np.array([2688 * k + 1344 for k in range(200)]) * 2.0**-149,
            np.array([0, 2.0**-149, 2.0**-126, 2.0**-100, 3.4e38]),
        ]
    ).astype(np.float32)
    codes = np.arange(127, dtype=np.int32)

    @jax.jit
    def tables(amaxes, codes):
        with jax.enable_x64(True):
            wide = exact.widen(exact.magnitude_bits(amaxes))[:, None]
            return (
                exact.narrow(exact.block_amax(codes, wide)),
                exact.narrow(exact.block_scale(codes, wide)),
                exact.checkpoint_scale(amaxes),
            )

    amax, scale, global_scale = tables(jnp.asarray(amaxes), jnp.asarray(codes))
    same(amax, formats.amax_by_code(amaxes))
    same(scale, formats.scale_by_code(amaxes))
    same(global_scale, amaxes / np.float32(2688))
    same(nvfp4sweep_jax.scale_candidates(), nvfp4sweep.scale_candidates())


# --- tracing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_jit(axis, dtype):
    weight = gaussian(dtype=dtype)
    expected = nvfp4sweep.sweep(weight, axis=axis)
    same_sweep(jax.jit(partial(nvfp4sweep_jax.sweep, axis=axis))(weight), expected)


def test_jit_with_traced_global_amax():
    weight = gaussian()
    traced = jax.jit(lambda w, g: nvfp4sweep_jax.calibrate(w, global_amax=g))
    for given in (4.8125, 1e-42, 0.0):
        same(traced(weight, given), nvfp4sweep.calibrate(weight, global_amax=given))
    # A concrete weight with a traced amax is traced too.
    weight = jnp.asarray(weight)
    closed = jax.jit(lambda g: nvfp4sweep_jax.calibrate(weight, global_amax=g))
    same(closed(jnp.bfloat16(5.25)), nvfp4sweep.calibrate(np.asarray(weight), global_amax=5.25))
    with pytest.raises(ValueError, match=r"global_amax has shape \(2,\)"):
        closed(jnp.ones(2))
    with pytest.raises(TypeError, match="global_amax has dtype complex64"):
        closed(1j)


def test_vmap_is_batch_dims():
    weight = gaussian((3, 32, 64)) * np.array([1, 1e-3, 1e4], np.float32)[:, None, None]
    expected = nvfp4sweep.sweep(weight, batch_dims=1, axis=1)
    mapped = jax.vmap(partial(nvfp4sweep_jax.sweep, axis=0))
    same_sweep(jax.jit(mapped)(weight), expected)
    same_sweep(
        nvfp4sweep_jax.sweep(jnp.asarray(weight), batch_dims=1, axis=1, implementation="xla"), expected
    )
    given = np.array([5.25, 0, 1e-42], np.float32)
    expected = nvfp4sweep.calibrate(weight, batch_dims=1, global_amax=given)
    same(jax.vmap(lambda w, g: nvfp4sweep_jax.calibrate(w, global_amax=g))(weight, given), expected)


@needs_host
def test_loops_over_layers():
    weight = gaussian((3, 32, 64))
    expected = nvfp4sweep.sweep(weight, batch_dims=1, axis=1)
    search = partial(nvfp4sweep_jax.sweep, axis=0)
    same_sweep(jax.jit(lambda w: lax.map(search, w))(weight), expected)
    same_sweep(
        jax.jit(lambda w: lax.scan(lambda carry, layer: (carry, search(layer)), 0, w)[1])(weight), expected
    )
    donating = jax.jit(lambda w: (jax.vmap(search)(w), w + 1), donate_argnums=0)
    found, increased = donating(jnp.array(weight))
    same_sweep(found, expected)
    same(increased, weight + 1)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for_every_platform(platform):
    traced = jax.jit(nvfp4sweep_jax.quantize).trace(jax.ShapeDtypeStruct((64, 256), jnp.bfloat16))
    assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_no_64_bit_mode_leaks():
    assert not jax.config.jax_enable_x64
    jaxpr = jax.make_jaxpr(nvfp4sweep_jax.sweep)(gaussian())
    assert {str(v.aval.dtype) for v in jaxpr.jaxpr.outvars} == {"float32", "uint8"}
    assert not jax.config.jax_enable_x64
    assert jnp.arange(2.0).dtype == jnp.float32


@needs_host
def test_64_bit_mode_of_the_user():
    weight = gaussian() * np.float32(1e-38)
    wide = weight.astype(np.float64) * (1 + 2.0**-30)
    with jax.enable_x64(True):
        array = jnp.asarray(wide)
        assert array.dtype == jnp.float64
        for implementation in ("cpu", "xla"):
            found = nvfp4sweep_jax.sweep(array, implementation=implementation)
            same_sweep(found, nvfp4sweep.sweep(wide.astype(np.float32)))
        same(jax.jit(nvfp4sweep_jax.calibrate)(array), nvfp4sweep.calibrate(weight))


def test_strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        same(jax.jit(nvfp4sweep_jax.calibrate)(gaussian()), nvfp4sweep.calibrate(gaussian()))


def test_results_are_constants_to_grad():
    weight = jnp.asarray(gaussian())
    gradient = jax.grad(lambda w: jnp.sum(nvfp4sweep_jax.calibrate(w)) + jnp.sum(w))(weight)
    same(gradient, np.ones(SHAPE, np.float32))
    gradient = jax.grad(lambda g: jnp.sum(nvfp4sweep_jax.calibrate(weight, global_amax=g)))(3.0)
    assert gradient == 0


def test_nan_under_jit_gives_nan():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        weight = gaussian((32, 256), dtype=dtype)
        weight[3, 5] = np.nan
        assert np.isnan(jax.jit(nvfp4sweep_jax.global_amax)(weight))
    weight = weight.astype(np.float32)
    assert np.isnan(jax.jit(nvfp4sweep_jax.calibrate)(weight)).all()
    with pytest.raises(ValueError, match=r"weight\[3, 5\] is nan"):
        nvfp4sweep_jax.calibrate(jnp.asarray(weight), implementation="xla")


def test_traced_global_amax_of_several_weights():
    weights = [gaussian(seed=i) * np.float32(1e-40) for i in range(3)]
    same(jax.jit(nvfp4sweep_jax.global_amax)(*weights), nvfp4sweep.global_amax(*weights))


# --- quantize -------------------------------------------------------------------------------------


@needs_host
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_quantize_is_the_cores(axis, implementation):
    weight = gaussian((2, 32, 48)).astype(ml_dtypes.bfloat16)
    options = {"axis": axis, "block_size": 2 if axis == 0 else 16, "global_amax": 4.8125}
    expected = nvfp4sweep.quantize(weight, **options)
    found = nvfp4sweep_jax.quantize(jnp.asarray(weight), implementation=implementation, **options)
    same_quantized(found, expected)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        same(found.dequantize(dtype), expected.dequantize(dtype))


@pytest.mark.parametrize("given", [None, 1e-42, 1e30])
def test_dequantize_is_the_cores(given):
    weight = gaussian((2, 32, 32)) * np.array([1, 1e-36], np.float32)[:, None, None]
    expected = nvfp4sweep.quantize(weight, batch_dims=1, global_amax=given)
    found = nvfp4sweep_jax.quantize(jnp.asarray(weight), batch_dims=1, global_amax=given)
    for dtype in (jnp.float32, jnp.bfloat16):
        same(found.dequantize(dtype), expected.dequantize(dtype))


def unpacked(axis, transform=lambda function: function):
    """float4 elements, float32 scales, and the weight that they stand for."""
    weight = jnp.asarray(gaussian((32, 64)) * np.float32(0.3))
    stored = nvfp4sweep_jax.quantize(weight, axis=axis)
    assert stored.scale.dtype == jnp.float8_e4m3fn
    elements = transform(lambda tensor: tensor.unpack())(stored)
    return elements, stored.scale.astype(jnp.float32) * stored.global_scale, stored.dequantize()


@needs_host
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("transform", [lambda function: function, jax.jit])
def test_unpacked_elements(axis, transform):
    elements, scale, expected = unpacked(axis, transform)
    assert elements.dtype == jnp.float4_e2m1fn
    same(elements.astype(jnp.float32) * jnp.repeat(scale, 16, axis), expected)


@needs_host
@pytest.mark.parametrize("axis", [0, 1])
def test_qwix_takes_unpacked_elements(axis):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qwix = pytest.importorskip("qwix")
    elements, scale, expected = unpacked(axis)
    same(qwix.dequantize(qwix.QArray(elements, scale, qtype="nvfp4")), expected)


@needs_host
def test_scaled_matmul_takes_unpacked_elements():
    """Its shapes and dtypes: it runs on a GPU only."""

    def product(x, w):
        return jax.nn.scaled_matmul(x.unpack(), w.unpack(), x.scale, w.scale)

    stored = [nvfp4sweep_jax.quantize(jnp.asarray(gaussian((1, rows, 64)))) for rows in (8, 32)]
    assert jax.eval_shape(product, *stored).shape == (1, 8, 32)


def test_quantized_tensor_is_a_pytree():
    weight = gaussian()
    expected = nvfp4sweep.quantize(weight, axis=0)
    quantized = jax.jit(partial(nvfp4sweep_jax.quantize, axis=0))(weight)
    assert isinstance(quantized, nvfp4sweep_jax.QuantizedTensor)
    same_quantized(quantized, expected)
    same_quantized(jax.jit(lambda t: t)(quantized), expected)
    same(jax.jit(lambda t: t.dequantize(jnp.bfloat16))(quantized), expected.dequantize(ml_dtypes.bfloat16))
    assert len(jax.tree.leaves(quantized)) == 3


def test_odd_blocks_cannot_be_packed():
    with pytest.raises(ValueError, match="block_size=1 is odd"):
        nvfp4sweep_jax.quantize(jnp.ones((2, 4)), block_size=1)


# --- engines and errors ---------------------------------------------------------------------------


@needs_host
@pytest.mark.parametrize("implementation", [None, "cpu", "xla", "oracle"])
def test_results_live_with_the_weight(implementation):
    weight = jnp.asarray(gaussian())
    expected = nvfp4sweep.sweep(np.asarray(weight))
    result = nvfp4sweep_jax.sweep(weight, implementation=implementation)
    same_sweep(result, expected)
    for array in result:
        assert isinstance(array, jax.Array)
        assert array.devices() == weight.devices()
    quantized = nvfp4sweep_jax.quantize(weight, implementation=implementation)
    assert quantized.scale.dtype == jnp.float8_e4m3fn
    assert all(leaf.devices() == weight.devices() for leaf in jax.tree.leaves(quantized))


@needs_host
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_the_host_engine_reads_the_arrays_own_memory(dtype, monkeypatch):
    weight = jnp.asarray(gaussian(), dtype)
    pointers = []

    def calibrate(array, **options):
        pointers.append(array.__array_interface__["data"][0])
        return original(array, **options)

    original = nvfp4sweep.calibrate
    monkeypatch.setattr(nvfp4sweep, "calibrate", calibrate)
    nvfp4sweep_jax.calibrate(weight)
    assert pointers == [weight.unsafe_buffer_pointer()]


@needs_host
def test_the_environment_names_the_engine(monkeypatch):
    engines = []
    choose = _call._choose_engine
    monkeypatch.setattr(_call, "_choose_engine", lambda *args: engines.append(choose(*args)) or engines[-1])
    weight = jnp.asarray(gaussian())
    nvfp4sweep_jax.calibrate(weight)
    monkeypatch.setenv("NVFP4SWEEP_IMPLEMENTATION", "xla")
    nvfp4sweep_jax.calibrate(weight)
    nvfp4sweep_jax.calibrate(weight, implementation="oracle")
    assert engines == ["cpu", "xla", "oracle"]
    monkeypatch.setenv("NVFP4SWEEP_IMPLEMENTATION", "cpu")
    with pytest.raises(ValueError, match="NVFP4SWEEP_IMPLEMENTATION='cpu' cannot serve a traced array"):
        jax.jit(lambda w: nvfp4sweep_jax.calibrate(w))(weight)


def test_engines_that_cannot_serve():
    weight = jnp.asarray(gaussian())
    for name in ("triton", "cpu", "oracle"):
        with pytest.raises(ValueError, match=f"implementation='{name}' cannot serve a traced array"):
            jax.jit(partial(nvfp4sweep_jax.calibrate, implementation=name))(weight)
    with pytest.raises(NotImplementedError, match="pallas engine is not built yet"):
        nvfp4sweep_jax.calibrate(weight, implementation="pallas")
    with pytest.raises(ValueError, match="implementation='fast' is unknown"):
        nvfp4sweep_jax.calibrate(weight, implementation="fast")


def test_triton_takes_arrays_through_torch():
    """On CUDA, or on the CPU in Triton's interpreter."""
    device = jax.devices()[0]
    if reason := _eager.why_not_triton(device):
        pytest.skip(f"triton cannot serve {device}: {reason}")
    with np.errstate(all="ignore"):  # the interpreter computes with NumPy, overflow included
        weight = gaussian((2, 4, 32)).astype(ml_dtypes.bfloat16)
        for options in ({}, {"axis": 2, "batch_dims": 1, "global_amax": [5.25, 0]}):
            expected = nvfp4sweep.sweep(weight, **options)
            array = jnp.asarray(weight)
            same_sweep(nvfp4sweep_jax.sweep(array, implementation="triton", **options), expected)
            same(nvfp4sweep_jax.calibrate(array, implementation="triton", **options), expected.amax)
            quantized = nvfp4sweep_jax.quantize(array, implementation="triton", **options)
            same_quantized(quantized, nvfp4sweep.quantize(weight, **options))
            assert quantized.packed.devices() == {device}
        weight[1, 2, 3] = np.inf
        with pytest.raises(ValueError, match=r"^weight\[1, 2, 3\] is inf"):
            nvfp4sweep_jax.calibrate(jnp.asarray(weight), implementation="triton")


def test_arrays_of_other_kinds():
    torch = pytest.importorskip("torch")
    for function in (nvfp4sweep_jax.calibrate, nvfp4sweep_jax.global_amax):
        with pytest.raises(
            TypeError, match="a PyTorch tensor, and a JAX array is needed here: use nvfp4sweep_torch"
        ):
            function(torch.ones(2, 16))
        with pytest.raises(
            TypeError, match=r"a NumPy array, and a JAX array is needed here: use nvfp4sweep$"
        ):
            function(np.ones((2, 16), np.float32))
        with pytest.raises(TypeError, match="weight is a list: it must be a JAX array"):
            function([[1.0] * 16])
        with pytest.raises(TypeError, match="weight has dtype int32"):
            function(jnp.ones((2, 16), jnp.int32))


@needs_host
@pytest.mark.parametrize("implementation", ["cpu", "xla", "oracle"])
@pytest.mark.parametrize("given", [None, 3.0])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_elements_that_are_not_finite(implementation, given, value):
    weight = gaussian((2, 4, 32))
    weight[1, 2, 7] = value
    weight[1, 3, 0] = value
    with pytest.raises(ValueError, match=rf"^weight\[1, 2, 7\] is {value}: every element must be finite"):
        nvfp4sweep_jax.calibrate(jnp.asarray(weight), global_amax=given, implementation=implementation)
    nvfp4sweep_jax.calibrate(jnp.asarray(weight), global_amax=3.0, implementation="xla", check_finite=False)
    with pytest.raises(ValueError, match=r"^weight\[1, 2, 7\]"):
        nvfp4sweep_jax.global_amax(jnp.asarray(weight))


@needs_host
def test_other_errors_are_the_cores():
    weight = jnp.ones((2, 32))
    for options, error, message in [
        ({"global_amax": -1.0}, ValueError, "global_amax is -1.0: it must be finite"),
        ({"global_amax": jnp.ones(3)}, ValueError, r"global_amax has shape \(3,\)"),
        ({"block_size": 5}, ValueError, "block_size=5 does not divide"),
        ({"importance": weight}, NotImplementedError, "importance"),
        ({"hessian": weight}, NotImplementedError, "hessian"),
    ]:
        for implementation in ("cpu", "xla"):
            with pytest.raises(error, match=message):
                nvfp4sweep_jax.calibrate(weight, implementation=implementation, **options)
    with pytest.raises(ValueError, match="weights is empty"):
        nvfp4sweep_jax.global_amax()
    with pytest.raises(ValueError, match="weights differ in their leading batch_dims=1 axes"):
        nvfp4sweep_jax.global_amax(jnp.ones((2, 16)), jnp.ones((3, 16)), batch_dims=1)


def test_global_amax_of_concrete_weights():
    weights = [gaussian((2, 4, 32), seed) * np.float32(10.0**-seed) for seed in range(3)]
    for batch_dims in (0, 1):
        found = nvfp4sweep_jax.global_amax(*map(jnp.asarray, weights), batch_dims=batch_dims)
        same(found, nvfp4sweep.global_amax(*weights, batch_dims=batch_dims))


def test_signatures_are_the_cores():
    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    for name in ("calibrate", "sweep", "quantize", "global_amax", "scale_candidates"):
        assert parameters(getattr(nvfp4sweep_jax, name)) == parameters(getattr(nvfp4sweep, name))
    assert nvfp4sweep_jax.Sweep is nvfp4sweep.Sweep


# --- parameter trees ------------------------------------------------------------------------------


def parameters():
    """Two attention layers as flax names them, one [out, in] weight, and what is no weight."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape) * rng.uniform(0.1, 10), jnp.float32)

    def layer():
        return {name: {"kernel": array(64, 32), "bias": array(32)} for name in ("q", "k", "v", "out")}

    return {"layers": [layer(), layer()], "head": {"weight": array(16, 48)}, "step": 3, "scale": array(64)}


def qkv(name, leaf):
    """One group a layer."""
    fused = re.sub("/[qkv]/", "/qkv/", name)
    return fused if fused != name else None


@needs_host
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_tree(transform):
    params = parameters()
    found = transform(nvfp4sweep_jax.calibrate_tree)(params)
    for layer, amaxes in zip(params["layers"], found["layers"], strict=True):
        for name, weight in layer.items():
            same(amaxes[name]["kernel"], nvfp4sweep.calibrate(np.asarray(weight["kernel"]), axis=0))
            assert amaxes[name]["bias"] is None
    same(found["head"]["weight"], nvfp4sweep.calibrate(np.asarray(params["head"]["weight"])))
    assert found["step"] is None
    assert found["scale"] is None


@needs_host
@pytest.mark.parametrize("check_finite", [True, False])
def test_tree_shares_amaxes_in_groups(check_finite):
    params = parameters()
    found = nvfp4sweep_jax.calibrate_tree(params, group=qkv, check_finite=check_finite)
    for layer, amaxes in zip(params["layers"], found["layers"], strict=True):
        kernels = {name: np.asarray(weight["kernel"]) for name, weight in layer.items()}
        shared = nvfp4sweep.global_amax(*(kernels[name] for name in "qkv"))
        for name in "qkv":
            expected = nvfp4sweep.calibrate(kernels[name], axis=0, global_amax=shared)
            same(amaxes[name]["kernel"], expected)
        same(amaxes["out"]["kernel"], nvfp4sweep.calibrate(kernels["out"], axis=0))


@needs_host
def test_tree_rules():
    params = {
        "experts": {"kernel": jnp.asarray(gaussian((3, 32, 8)))},
        "conv": jnp.asarray(gaussian((2, 48, 4))),
    }
    found = nvfp4sweep_jax.calibrate_tree(
        params,
        where=lambda name, leaf: True,
        axis=lambda name, leaf: None if name == "experts/kernel" else 1,
        batch_dims=lambda name, leaf: int(name == "experts/kernel"),
        block_size=8,
    )
    experts, conv = (np.asarray(x) for x in (params["experts"]["kernel"], params["conv"]))
    same(found["experts"]["kernel"], nvfp4sweep.calibrate(experts, axis=1, batch_dims=1, block_size=8))
    same(found["conv"], nvfp4sweep.calibrate(conv, axis=1, block_size=8))
    assert nvfp4sweep_jax.calibrate_tree({"bias": jnp.ones(4)}) == {"bias": None}


@needs_host
@pytest.mark.parametrize(
    ("leaf", "options", "error", "message"),
    [
        (np.ones((20, 8)), {}, ValueError, "length 20, which block_size=16 does not divide"),
        (np.ones((2, 16, 8)), {}, ValueError, "no rule tells its input axis"),
        (np.ones((16, 8)), {"axis": 2}, ValueError, "axis=2 is out of range"),
        (np.full((16, 8), np.nan), {}, ValueError, r"weight\[0, 0\] is nan"),
        (np.ones((16, 8)), {"implementation": "no"}, ValueError, "implementation='no' is unknown"),
        (np.ones((16, 8), np.int32), {"where": lambda name, leaf: True}, TypeError, "weight has dtype int32"),
        (3.0, {"where": lambda name, leaf: True}, TypeError, "the leaf is a float"),
    ],
)
def test_tree_errors_name_the_leaf(leaf, options, error, message):
    leaf = jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
    with pytest.raises(error, match=r"params\['a/kernel'\]: .*" + message):
        nvfp4sweep_jax.calibrate_tree({"a": {"kernel": leaf}}, **options)


@needs_host
def test_a_group_names_the_leaf_that_is_not_finite():
    params = {"a": {"kernel": jnp.ones((16, 8))}, "b": {"kernel": jnp.full((16, 8), jnp.inf)}}
    with pytest.raises(ValueError, match=r"params\['b/kernel'\]: weight\[0, 0\] is inf"):
        nvfp4sweep_jax.calibrate_tree(params, group=lambda *_: "all")


@needs_host
def test_tree_groups_must_stack_alike():
    params = {name: jnp.ones((experts, 16, 16)) for name, experts in (("a", 2), ("b", 3))}
    with pytest.raises(ValueError, match=r"params\['b'\]: group 'all' has a of leading axes \(2,\)"):
        nvfp4sweep_jax.calibrate_tree(
            params, where=lambda *_: True, axis=1, batch_dims=1, group=lambda *_: "all"
        )


# --- in processes of their own --------------------------------------------------------------------


def run_python(code, **environment):
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr


def test_import_is_light():
    run_python("""
import os, sys
before = dict(os.environ)
import jax
flags = dict(jax.config.values)
import nvfp4sweep_jax
assert not {"torch", "triton", "numba"} & set(sys.modules), sorted(sys.modules)
assert dict(jax.config.values) == flags
assert dict(os.environ) == before
""")


def test_works_without_torch():
    run_python("""
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, NoTorch())
import jax, jax.numpy as jnp, numpy as np, nvfp4sweep, nvfp4sweep_jax
w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
expected = nvfp4sweep.calibrate(w)
for implementation in (None, "cpu", "xla", "oracle"):
    found = nvfp4sweep_jax.calibrate(jnp.asarray(w), implementation=implementation)
    assert np.array_equal(found, expected)
assert np.array_equal(jax.jit(nvfp4sweep_jax.calibrate)(w), expected)
try:
    nvfp4sweep_jax.calibrate(jnp.asarray(w), implementation="triton")
except ValueError as error:
    assert "'triton' cannot serve a JAX array" in str(error), error
    assert "torch is blocked" in str(error), error
else:
    raise SystemExit("triton served without torch")
""")


def test_sharded_weights():
    run_python(
        """
import re
from functools import partial
import jax, numpy as np, nvfp4sweep, nvfp4sweep_jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

rng = np.random.default_rng(0)
w = rng.choice(np.array([0, 1.5, 3, 6, 2.25], np.float32), (32, 256))
w[:8] = rng.standard_normal((8, 256))
w[0, 0] = 5.25
expected = {axis: nvfp4sweep.sweep(w, axis=axis) for axis in (0, 1)}
layouts = [
    (AxisType.Auto, 1, P(None, ("a", "b"))),
    (AxisType.Auto, 0, P("a", "b")),
    (AxisType.Explicit, 1, P("a", "b")),
]
for axis_type, axis, spec in layouts:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, spec)
    x = jax.device_put(w, sharding)
    assert len(x.devices()) == 8
    compiled = jax.jit(partial(nvfp4sweep_jax.sweep, axis=axis)).lower(x).compile()
    result = compiled(x)
    for found, wanted in zip(result, expected[axis], strict=True):
        assert np.array_equal(found, wanted)
    assert result.amax.sharding.is_equivalent_to(sharding, 2)
    gathers = re.findall("all-gather|all-to-all|collective-permute", compiled.as_text())
    assert not gathers, (axis_type, spec, gathers)
    quantized = nvfp4sweep_jax.quantize(x, axis=axis)
    reference = nvfp4sweep.quantize(w, axis=axis)
    assert np.array_equal(quantized.packed, reference.packed)
    assert np.array_equal(np.asarray(quantized.scale).view("u1"), reference.scale.view("u1"))
    assert np.array_equal(quantized.dequantize(), reference.dequantize())

for value in (np.nan, np.inf):
    bad = w.copy()
    bad[3, 70] = bad[3, 250] = bad[30, 0] = value
    try:
        nvfp4sweep_jax.calibrate(jax.device_put(bad, sharding))
    except ValueError as error:
        assert f"weight[3, 70] is {value}" in str(error), error
    else:
        raise SystemExit("NaN passed")

mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
local = partial(nvfp4sweep_jax.calibrate, global_amax=np.float32(5.25))
mapped = jax.shard_map(local, mesh=mesh, in_specs=P(None, "a"), out_specs=P(None, "a"))
assert np.array_equal(jax.jit(mapped)(w), nvfp4sweep.calibrate(w, global_amax=5.25))
x = jax.device_put(w, NamedSharding(mesh, P("a")))
assert np.array_equal(nvfp4sweep_jax.calibrate(x, implementation="oracle"), expected[1].amax)

narrow = w[:, :64]  # 8 elements a device
assert np.array_equal(
    nvfp4sweep_jax.calibrate(jax.device_put(narrow, NamedSharding(mesh, P(None, "a")))),
    nvfp4sweep.calibrate(narrow),
)
explicit = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
cut = jax.device_put(narrow, NamedSharding(explicit, P(None, "a")))
for function in (nvfp4sweep_jax.calibrate, jax.jit(nvfp4sweep_jax.calibrate)):
    try:
        function(cut)
    except ValueError as error:
        assert "axis 1 of a weight of shape (32, 64) is sharded over 8 devices, which cuts" in str(error)
    else:
        raise SystemExit("an explicit sharding cut blocks")

kernel = jax.device_put(w.T, NamedSharding(mesh, P("a")))
params = {"q": {"kernel": kernel}, "k": {"kernel": kernel * 2}}
tree = nvfp4sweep_jax.calibrate_tree(params, group=lambda *_: "qk")
for name, factor in (("q", 1), ("k", 2)):
    amax = np.abs(w).max() * 2
    assert np.array_equal(tree[name]["kernel"], nvfp4sweep.calibrate(w.T * factor, axis=0, global_amax=amax))
try:
    nvfp4sweep_jax.calibrate(x, implementation="cpu")
except ValueError as error:
    assert "cannot serve an array over several devices" in str(error), error
else:
    raise SystemExit("cpu served a sharded array")
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
