"""The Triton kernels within XLA programs: on CUDA, or on the CPU in Triton's interpreter."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax_helpers import gaussian, run_python, same, same_quantized, same_sweep

import nvfp4sweep
import nvfp4sweep_jax
from nvfp4sweep_jax import _triton

DEVICE = jax.devices()[0]
SWEEP = partial(nvfp4sweep_jax.sweep, implementation="triton")

needs_kernels = pytest.mark.skipif(
    bool(_triton.why_not(DEVICE.platform)), reason=f"{DEVICE}: {_triton.why_not(DEVICE.platform)}"
)


@needs_kernels
@pytest.mark.parametrize("options", [{}, {"axis": 2, "batch_dims": 1, "global_amax": [5.25, 0]}])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_all_functions(options, transform):
    weight = gaussian((2, 4, 32)).astype(ml_dtypes.bfloat16)
    expected = nvfp4sweep.sweep(weight, **options)
    options = {"implementation": "triton", **options}
    array = jnp.asarray(weight)
    same_sweep(transform(partial(nvfp4sweep_jax.sweep, **options))(array), expected)
    same(transform(partial(nvfp4sweep_jax.calibrate, **options))(array), expected.amax)
    quantized = transform(partial(nvfp4sweep_jax.quantize, **options))(array)
    same_quantized(quantized, nvfp4sweep.quantize(weight, **(options | {"implementation": None})))
    assert quantized.packed.devices() == {DEVICE}


@needs_kernels
def test_empty_weights():
    for shape in ((0, 32), (3, 0), (0, 2, 32)):
        weight = np.zeros(shape, np.float32)
        options = {"batch_dims": len(shape) - 2}
        same_sweep(jax.jit(partial(SWEEP, **options))(weight), nvfp4sweep.sweep(weight, **options))


@needs_kernels
def test_transformations():
    weight = gaussian((3, 4, 64))
    expected = nvfp4sweep.sweep(weight, batch_dims=1)
    same_sweep(jax.jit(jax.vmap(SWEEP))(weight), expected)
    same_sweep(jax.vmap(lambda w, g: SWEEP(w, global_amax=g))(weight, expected.global_amax), expected)
    same_sweep(jax.jit(lambda w: lax.map(SWEEP, w))(weight), expected)
    one = jnp.asarray(weight[0])
    amaxes = jnp.array([3.0, 4.0])
    codes = jax.vmap(lambda g: SWEEP(one, global_amax=g).code)(amaxes)
    same(codes, np.stack([nvfp4sweep.sweep(weight[0], global_amax=g).code for g in (3, 4)]))
    nested = jax.vmap(jax.vmap(SWEEP))(weight.reshape(3, 2, 2, 64))
    same_sweep(nested, nvfp4sweep.sweep(weight.reshape(3, 2, 2, 64), batch_dims=2))
    gradient = jax.grad(lambda w: jnp.sum(SWEEP(w).amax) + jnp.sum(w))(one)
    same(gradient, np.ones_like(weight[0]))


@needs_kernels
def test_elements_that_are_not_finite():
    weight = gaussian((2, 4, 32))
    weight[1, 2, 3] = np.inf
    for given in (None, 3.0):
        with pytest.raises(ValueError, match=r"^weight\[1, 2, 3\] is inf"):
            nvfp4sweep_jax.calibrate(jnp.asarray(weight), global_amax=given, implementation="triton")
    weight[1, 2, 3] = np.nan
    # Of one code: the interpreter takes seconds for all.
    assert np.isnan(SWEEP(jnp.asarray(weight), check_finite=False, min_code=126).global_amax)


LOWERING = """
from functools import partial
import jax, jax.numpy as jnp, nvfp4sweep_jax
from nvfp4sweep_jax import _triton

weight = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16)
calibrate = partial(nvfp4sweep_jax.calibrate, block_size=4)  # compiles in a fraction of the time
named = partial(calibrate, implementation="triton")
for call in (lambda: jax.jit(named).trace(weight), lambda: named(jnp.ones((2, 16)))):
    try:
        call()
    except ValueError as error:
        assert "it needs a CUDA device" in str(error), error
    else:
        raise SystemExit("triton served without a CUDA device")

_triton.capability = lambda: 90  # as if there were one
for function, kernels in ((calibrate, 3), (partial(named, global_amax=1.0), 2)):
    traced = jax.jit(function).trace(weight)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @triton_kernel_call_ffi") == kernels, text.count("custom_call @")
    assert "stablehlo.while" not in text  # nothing of the XLA engine
traced = jax.jit(calibrate).trace(weight)
for platform in ("cpu", "tpu"):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "triton" not in text and "stablehlo.while" in text
"""


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the package jax-cuda13-plugin is missing"
)
def test_traced_arrays_lower_to_the_kernels_for_cuda_alone(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run_python(LOWERING)


SHARDING = """
import re
from functools import partial
import jax, numpy as np, nvfp4sweep, nvfp4sweep_jax
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from nvfp4sweep_jax import _triton, _xla
from nvfp4sweep_jax._operands import Operands

def search(*arrays, given, problem, outputs):
    # In place of the kernels, which have no devices here: what a device is asked for its own part.
    found = _xla.search(Operands(**dict(zip(given, arrays, strict=True))), problem, outputs)
    return [getattr(found, name) for name in outputs]

mlir.register_lowering(_triton._search_p, mlir.lower_fun(search, multiple_results=True), platform="cpu")

def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)

small = {"block_size": 4}
sweep = partial(nvfp4sweep_jax.sweep, implementation="triton", **small)
quantize = partial(nvfp4sweep_jax.quantize, implementation="triton", **small)
w = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
# Each layout is compiled, which takes seconds; test_jax_processes.py has more.
for kind, spec in ((AxisType.Auto, P("a", "b")), (AxisType.Explicit, P(("b", "a"), None))):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    x = jax.device_put(w, NamedSharding(mesh, spec))
    compiled = jax.jit(sweep).lower(x).compile()
    found = compiled(x)
    same(found, nvfp4sweep.sweep(w, **small))
    assert found.code.sharding.is_equivalent_to(x.sharding, 2)
    assert not re.findall("all-gather|all-to-all|collective-permute", compiled.as_text())
x = jax.device_put(w, NamedSharding(mesh, P("b")))
assert np.array_equal(jax.jit(quantize)(x).packed, nvfp4sweep.quantize(w, **small).packed)

mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
narrow = w[:, :16]  # shards would cut blocks: XLA moves them
found = sweep(jax.device_put(narrow, NamedSharding(mesh, P(None, ("a", "b")))))
same(found, nvfp4sweep.sweep(narrow, **small))

experts = w.reshape(8, 4, 256)
x = jax.device_put(experts, NamedSharding(mesh, P("b", None, "a")))
expected = nvfp4sweep.sweep(experts, batch_dims=1, **small)
same(jax.jit(partial(sweep, batch_dims=1))(x), expected)
same(jax.jit(jax.vmap(sweep))(x), expected)

bad = w.copy()
bad[3, 70] = bad[30, 0] = np.nan
try:
    sweep(jax.device_put(bad, NamedSharding(mesh, P("a", "b"))))
except ValueError as error:
    assert "weight[3, 70] is nan" in str(error), error
else:
    raise SystemExit("NaN passed")

mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
local = lambda w: sweep(w, global_amax=np.float32(5.25))[:3]
mapped = jax.shard_map(local, mesh=mesh, in_specs=P(None, "a"), out_specs=P(None, "a"))
same(jax.jit(mapped)(w), nvfp4sweep.sweep(w, global_amax=5.25, **small)[:3])
"""


def test_devices_search_their_own_blocks(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run_python(SHARDING, XLA_FLAGS="--xla_force_host_platform_device_count=8")
