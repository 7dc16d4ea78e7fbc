"""What needs a process of its own: imports, missing packages, several devices.

Blocks are of 4 elements, whose search XLA compiles in half the time.
"""

from jax_helpers import run_python


def test_import_is_light():
    run_python("""
import os, sys
import jax  # it sets variables of its own
before = dict(os.environ)
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
expected = nvfp4sweep.calibrate(w, block_size=4)
for implementation in (None, "cpu", "xla", "oracle"):
    found = nvfp4sweep_jax.calibrate(jnp.asarray(w), block_size=4, implementation=implementation)
    assert np.array_equal(found, expected)
assert np.array_equal(jax.jit(lambda w: nvfp4sweep_jax.calibrate(w, block_size=4))(w), expected)
try:
    nvfp4sweep_jax.calibrate(jnp.asarray(w), implementation="triton")
except ValueError as error:
    assert "'triton' cannot serve a JAX array" in str(error), error
    assert "triton is blocked" in str(error), error
else:
    raise SystemExit("triton served without Triton")
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
small = {"block_size": 4}
expected = {axis: nvfp4sweep.sweep(w, axis=axis, **small) for axis in (0, 1)}
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
    compiled = jax.jit(partial(nvfp4sweep_jax.sweep, axis=axis, **small)).lower(x).compile()
    result = compiled(x)
    for found, wanted in zip(result, expected[axis], strict=True):
        assert np.array_equal(found, wanted)
    assert result.amax.sharding.is_equivalent_to(sharding, 2)
    gathers = re.findall("all-gather|all-to-all|collective-permute", compiled.as_text())
    assert not gathers, (axis_type, spec, gathers)
    quantized = nvfp4sweep_jax.quantize(x, axis=axis, **small)
    reference = nvfp4sweep.quantize(w, axis=axis, **small)
    assert np.array_equal(quantized.packed, reference.packed)
    assert np.array_equal(np.asarray(quantized.scale).view("u1"), reference.scale.view("u1"))
    assert np.array_equal(quantized.dequantize(), reference.dequantize())

for value in (np.nan, np.inf):
    bad = w.copy()
    bad[3, 70] = bad[3, 250] = bad[30, 0] = value
    try:
        nvfp4sweep_jax.calibrate(jax.device_put(bad, sharding), **small)
    except ValueError as error:
        assert f"weight[3, 70] is {value}" in str(error), error
    else:
        raise SystemExit("NaN passed")

mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
calibrate = partial(nvfp4sweep_jax.calibrate, **small)
local = partial(calibrate, global_amax=np.float32(5.25))
mapped = jax.shard_map(local, mesh=mesh, in_specs=P(None, "a"), out_specs=P(None, "a"))
assert np.array_equal(jax.jit(mapped)(w), nvfp4sweep.calibrate(w, global_amax=5.25, **small))
x = jax.device_put(w, NamedSharding(mesh, P("a")))
assert np.array_equal(calibrate(x, implementation="oracle"), expected[1].amax)

narrow = w[:, :16]  # 2 elements a device
assert np.array_equal(
    calibrate(jax.device_put(narrow, NamedSharding(mesh, P(None, "a")))),
    nvfp4sweep.calibrate(narrow, **small),
)
explicit = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Explicit,))
cut = jax.device_put(narrow, NamedSharding(explicit, P(None, "a")))
for function in (calibrate, jax.jit(calibrate)):
    try:
        function(cut)
    except ValueError as error:
        assert "axis 1 of a weight of shape (32, 16) is sharded over 8 devices, which cuts" in str(error)
    else:
        raise SystemExit("an explicit sharding cut blocks")

kernel = jax.device_put(w.T, NamedSharding(mesh, P("a")))
params = {"q": {"kernel": kernel}, "k": {"kernel": kernel * 2}}
tree = nvfp4sweep_jax.calibrate_tree(params, group=lambda *_: "qk", **small)
for name, factor in (("q", 1), ("k", 2)):
    options = {"axis": 0, "global_amax": np.abs(w).max() * 2, **small}
    assert np.array_equal(tree[name]["kernel"], nvfp4sweep.calibrate(w.T * factor, **options))
try:
    calibrate(x, implementation="cpu")
except ValueError as error:
    assert "cannot serve an array over several devices" in str(error), error
else:
    raise SystemExit("cpu served a sharded array")
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )


def test_transformations_of_sharded_weights():
    run_python(
        """
import re
from functools import partial
import jax, jax.numpy as jnp, numpy as np, nvfp4sweep, nvfp4sweep_jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

rng = np.random.default_rng(0)
w = rng.choice(np.array([0, 1.5, 3, 6, 2.25], np.float32), (3, 32, 256))
w[:, :8] = rng.standard_normal((3, 8, 256))
expected = nvfp4sweep.sweep(w, batch_dims=1, block_size=4)
sweep = partial(nvfp4sweep_jax.sweep, block_size=4, implementation="xla")
calibrate = partial(nvfp4sweep_jax.calibrate, block_size=4)

def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert np.array_equal(a, b)

mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
x = jax.device_put(w, NamedSharding(mesh, P(None, "a", "b")))
for function in (lambda w: lax.map(sweep, w), jax.vmap(sweep)):
    compiled = jax.jit(function).lower(x).compile()
    same(compiled(x), expected)
    assert not re.findall("all-gather|all-to-all|collective-permute", compiled.as_text())

one = [field[0] for field in expected]
for check_vma in (True, False):
    def local(w):
        return sweep(w, global_amax=lax.pmax(jnp.max(jnp.abs(w)), ("a", "b")))[:3]
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"), check_vma=check_vma)
    same(jax.jit(mapped)(x[0]), one[:3])
rows = jax.shard_map(  # the other axis is left to XLA
    partial(calibrate, global_amax=one[3]),
    mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names={"a"},
)
same([jax.jit(rows)(x[0])], one[:1])

for shape, spec in (((2, 4), P("a", "b")), ((1, 1), P("a"))):
    count = shape[0] * shape[1]
    devices = jax.devices()[:count]
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Explicit,) * 2, devices=devices)
    with jax.set_mesh(mesh):
        y = jax.device_put(w[0], NamedSharding(mesh, spec))
        same(jax.jit(sweep)(y), one)
        loss = lambda w: jnp.sum(calibrate(w)) + jnp.sum(w)
        assert (np.asarray(jax.jit(jax.grad(loss))(y)) == 1).all()
""",
        XLA_FLAGS="--xla_force_host_platform_device_count=8",
    )
