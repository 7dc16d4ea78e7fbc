"""What is particular to JAX: tracing, engines by device, results as pytrees, errors."""

import inspect
import warnings
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax_helpers import SHAPE, SMALL, gaussian, needs_host, same, same_quantized, same_sweep

import nvfp4sweep
import nvfp4sweep_jax
from nvfp4sweep_jax import _call

# --- tracing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "dtype"), [(-1, np.float32), (0, ml_dtypes.bfloat16)])
def test_jit(axis, dtype):
    weight = gaussian(dtype=dtype)
    expected = nvfp4sweep.sweep(weight, axis=axis, **SMALL)
    same_sweep(jax.jit(partial(nvfp4sweep_jax.sweep, axis=axis, **SMALL))(weight), expected)


def test_jit_with_traced_global_amax():
    weight = gaussian()
    traced = jax.jit(lambda w, g: nvfp4sweep_jax.calibrate(w, global_amax=g, **SMALL))
    for given in (4.8125, 1e-42, 0.0):
        same(traced(weight, given), nvfp4sweep.calibrate(weight, global_amax=given, **SMALL))
    # A concrete weight with a traced amax is traced too.
    weight = jnp.asarray(weight)
    closed = jax.jit(lambda g: nvfp4sweep_jax.calibrate(weight, global_amax=g, **SMALL))
    same(closed(jnp.bfloat16(5.25)), nvfp4sweep.calibrate(np.asarray(weight), global_amax=5.25, **SMALL))
    with pytest.raises(ValueError, match=r"global_amax has shape \(2,\)"):
        closed(jnp.ones(2))
    with pytest.raises(TypeError, match="global_amax has dtype complex64"):
        closed(1j)


def test_vmap_is_batch_dims():
    weight = gaussian((3, 32, 64)) * np.array([1, 1e-3, 1e4], np.float32)[:, None, None]
    options = {"batch_dims": 1, "axis": 1, **SMALL}
    expected = nvfp4sweep.sweep(weight, **options)
    mapped = jax.vmap(partial(nvfp4sweep_jax.sweep, axis=0, **SMALL))
    same_sweep(jax.jit(mapped)(weight), expected)
    same_sweep(nvfp4sweep_jax.sweep(jnp.asarray(weight), implementation="xla", **options), expected)
    given = np.array([5.25, 0, 1e-42], np.float32)
    expected = nvfp4sweep.calibrate(weight, batch_dims=1, global_amax=given, **SMALL)
    same(jax.vmap(lambda w, g: nvfp4sweep_jax.calibrate(w, global_amax=g, **SMALL))(weight, given), expected)


@needs_host
def test_loops_over_layers():
    weight = gaussian((3, 32, 64))
    expected = nvfp4sweep.sweep(weight, batch_dims=1, axis=1, **SMALL)
    search = partial(nvfp4sweep_jax.sweep, axis=0, **SMALL)
    same_sweep(jax.jit(lambda w: lax.map(search, w))(weight), expected)
    donating = jax.jit(lambda w: (jax.vmap(search)(w), w + 1), donate_argnums=0)
    found, increased = donating(jnp.array(weight))
    same_sweep(found, expected)
    same(increased, weight + 1)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowers_for_every_platform(platform):
    quantize = partial(nvfp4sweep_jax.quantize, implementation="xla")
    traced = jax.jit(quantize).trace(jax.ShapeDtypeStruct((64, 256), jnp.bfloat16))
    assert "custom_call" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_exports_for_several_platforms():
    weight = gaussian()
    stored = nvfp4sweep.quantize(weight, **SMALL)
    for function, expected in (
        (nvfp4sweep_jax.sweep, nvfp4sweep.sweep(weight, **SMALL)),
        (nvfp4sweep_jax.quantize, (stored.packed, stored.scale, stored.global_scale)),
    ):
        exported = jax.export.export(
            jax.jit(partial(function, implementation="xla", **SMALL)), platforms=("cpu", "cuda", "tpu")
        )(weight)
        for a, b in zip(jax.tree.leaves(exported.call(weight)), expected, strict=True):
            same(a, b)


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
            found = nvfp4sweep_jax.sweep(array, implementation=implementation, **SMALL)
            same_sweep(found, nvfp4sweep.sweep(wide.astype(np.float32), **SMALL))
        calibrate = jax.jit(partial(nvfp4sweep_jax.calibrate, **SMALL))
        same(calibrate(array), nvfp4sweep.calibrate(weight, **SMALL))


def test_strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        calibrate = jax.jit(partial(nvfp4sweep_jax.calibrate, **SMALL))
        same(calibrate(gaussian()), nvfp4sweep.calibrate(gaussian(), **SMALL))


def test_results_are_constants_to_grad():
    weight = jnp.asarray(gaussian())
    calibrate = partial(nvfp4sweep_jax.calibrate, **SMALL)
    gradient = jax.grad(lambda w: jnp.sum(calibrate(w)) + jnp.sum(w))(weight)
    same(gradient, np.ones(SHAPE, np.float32))
    gradient = jax.grad(lambda g: jnp.sum(calibrate(weight, global_amax=g)))(3.0)
    assert gradient == 0


def test_nan_under_jit_gives_nan():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        weight = gaussian(dtype=dtype)
        weight[3, 5] = np.nan
        assert np.isnan(jax.jit(nvfp4sweep_jax.global_amax)(weight))
    weight = weight.astype(np.float32)
    calibrate = partial(nvfp4sweep_jax.calibrate, implementation="xla", **SMALL)
    assert np.isnan(jax.jit(calibrate)(weight)).all()
    with pytest.raises(ValueError, match=r"weight\[3, 5\] is nan"):
        calibrate(jnp.asarray(weight))


def test_traced_global_amax_of_several_weights():
    weights = [gaussian(seed=i) * np.float32(1e-40) for i in range(3)]
    same(jax.jit(nvfp4sweep_jax.global_amax)(*weights), nvfp4sweep.global_amax(*weights))


# --- quantize -------------------------------------------------------------------------------------


@needs_host
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_quantize_is_the_cores(axis, implementation):
    weight = gaussian((2, 32, 48)).astype(ml_dtypes.bfloat16)
    options = {"axis": axis, "block_size": 2 if axis == 0 else 4, "global_amax": 4.8125}
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
    expected = nvfp4sweep.quantize(weight, axis=0, **SMALL)
    quantized = jax.jit(partial(nvfp4sweep_jax.quantize, axis=0, **SMALL))(weight)
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
    expected = nvfp4sweep.sweep(np.asarray(weight), **SMALL)
    result = nvfp4sweep_jax.sweep(weight, implementation=implementation, **SMALL)
    same_sweep(result, expected)
    for array in result:
        assert isinstance(array, jax.Array)
        assert array.devices() == weight.devices()
    quantized = nvfp4sweep_jax.quantize(weight, implementation=implementation, **SMALL)
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
    nvfp4sweep_jax.calibrate(weight, **SMALL)
    monkeypatch.setenv("NVFP4SWEEP_IMPLEMENTATION", "xla")
    nvfp4sweep_jax.calibrate(weight, **SMALL)
    nvfp4sweep_jax.calibrate(weight, implementation="oracle", **SMALL)
    assert engines == ["cpu", "xla", "oracle"]
    monkeypatch.setenv("NVFP4SWEEP_IMPLEMENTATION", "cpu")
    with pytest.raises(ValueError, match="NVFP4SWEEP_IMPLEMENTATION='cpu' cannot serve a traced array"):
        jax.jit(lambda w: nvfp4sweep_jax.calibrate(w))(weight)


def test_engines_that_cannot_serve():
    weight = jnp.asarray(gaussian())
    for name in ("cpu", "oracle"):
        with pytest.raises(ValueError, match=f"implementation='{name}' cannot serve a traced array"):
            jax.jit(partial(nvfp4sweep_jax.calibrate, implementation=name))(weight)
    with pytest.raises(ValueError, match="implementation='fast' is unknown"):
        nvfp4sweep_jax.calibrate(weight, implementation="fast")


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
    calibrate = partial(nvfp4sweep_jax.calibrate, **SMALL)
    with pytest.raises(ValueError, match=rf"^weight\[1, 2, 7\] is {value}: every element must be finite"):
        calibrate(jnp.asarray(weight), global_amax=given, implementation=implementation)
    calibrate(jnp.asarray(weight), global_amax=3.0, implementation="xla", check_finite=False)
    with pytest.raises(ValueError, match=r"^weight\[1, 2, 7\]"):
        nvfp4sweep_jax.global_amax(jnp.asarray(weight))


@needs_host
def test_other_errors_are_the_cores():
    weight = jnp.ones((2, 32))
    for options, error, message in [
        ({"global_amax": -1.0}, ValueError, "global_amax is -1.0: it must be finite"),
        ({"global_amax": jnp.ones(3)}, ValueError, r"global_amax has shape \(3,\)"),
        ({"block_size": 5}, ValueError, "block_size=5 does not divide"),
        ({"importance": jnp.ones(3)}, ValueError, r"importance has shape \(3,\)"),
        ({"hessian": weight}, ValueError, r"hessian has shape \(2, 32\)"),
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
