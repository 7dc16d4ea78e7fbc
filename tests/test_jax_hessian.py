"""HessianAccumulator for JAX: against float64, under transformations, and over several devices."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

from nvfp4sweep_jax import HessianAccumulator  # noqa: E402

RNG = np.random.default_rng(0)


def gaussian(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jnp.asarray(RNG.standard_normal(shape), dtype)


def close(actual: Any, x: Any, rtol: float = 5e-6) -> None:
    """Whether it is the mean of x_b x_b^T of x [..., K], in float64 but for its last rounding."""
    blocks = np.asarray(x, np.float64).reshape(-1, x.shape[-1] // 16, 16)
    expected = np.einsum("tbi,tbj->bij", blocks, blocks) / len(blocks)
    actual = np.asarray(actual)
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    assert (actual == actual.swapaxes(-1, -2)).all()
    assert abs(actual - expected).max() <= rtol * abs(expected).max()


# --- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("leading", [(), (7,), (3, 5), (2, 3, 4)])
def test_mean_over_tokens(dtype: Any, leading: tuple[int, ...]) -> None:
    x = gaussian(*leading, 64, dtype=dtype)
    empty = HessianAccumulator((64, 8), axis=0)
    accumulator = empty.add(x)
    close(accumulator.hessian(), x)
    assert int(accumulator.tokens) == np.prod(leading)
    assert int(empty.tokens) == 0
    assert not empty.total.any()
    diagonal = jnp.diagonal(accumulator.hessian(), axis1=1, axis2=2)
    assert (accumulator.importance() == diagonal.reshape(64, 1)).all()


def test_batches_add_up() -> None:
    x = gaussian(50, 96)
    parts = HessianAccumulator((8, 96))
    for part in (x[:1], x[1:20], x[20:20], x[20:]):
        parts = parts.add(part)
    close(parts.hessian(), x)
    assert int(parts.tokens) == 50


def test_agrees_with_pytorch() -> None:
    torch = pytest.importorskip("torch")
    import nvfp4sweep_torch

    x = gaussian(3, 7, 32)
    ours = HessianAccumulator((3, 32, 8), axis=1, batch_dims=1).add(x)
    theirs = nvfp4sweep_torch.HessianAccumulator((3, 32, 8), axis=1, batch_dims=1)
    theirs.add(torch.from_numpy(np.array(x)))
    np.testing.assert_allclose(ours.hessian(), theirs.hessian().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.importance(), theirs.importance().numpy(), rtol=1e-5)
    assert ours.tokens.tolist() == theirs.tokens.tolist()


def test_full_precision_whatever_the_default() -> None:
    x = gaussian(33, 64)
    with jax.default_matmul_precision("bfloat16"):
        program = str(jax.make_jaxpr(lambda x: HessianAccumulator((8, 64)).add(x).total)(x))
        accumulator = HessianAccumulator((8, 64)).add(x)
    assert "HIGHEST" in program
    assert "bf16" not in program
    close(accumulator.hessian(), x)


def test_64_bit_mode() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(RNG.standard_normal((7, 32)))
        assert x.dtype == jnp.float64
        accumulator = HessianAccumulator((8, 32)).add(x)
        assert accumulator.total.dtype == jnp.float32
        assert accumulator.tokens.dtype == jnp.int32
        close(accumulator.hessian(), x.astype(jnp.float32))


def test_no_matrix_of_all_inputs() -> None:
    x = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16)
    add = jax.jit(lambda x: HessianAccumulator((8, 4096)).add(x))
    memory = add.lower(x).compile().memory_analysis()
    if memory is None:
        pytest.skip("this backend does not tell what a program needs")
    assert memory.temp_size_in_bytes <= 4 * (4 * 64 * 4096)


# --- weights of any layout ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "batch_dims", "expected"),
    [
        ((8, 32), -1, 0, (32,)),
        ((32, 8), 0, 0, (32, 1)),
        ((4, 32, 8), 1, 0, (32, 1)),
        ((4, 8, 32), -1, 1, (4, 1, 32)),
        ((4, 32, 8), 1, 1, (4, 32, 1)),
        ((2, 4, 32, 8), 2, 2, (2, 4, 32, 1)),
    ],
)
def test_importance_broadcasts_to_the_weight(
    shape: tuple[int, ...], axis: int, batch_dims: int, expected: tuple[int, ...]
) -> None:
    accumulator = HessianAccumulator(shape, axis=axis, batch_dims=batch_dims)
    x = gaussian(*shape[:batch_dims], 5, 32)
    importance = accumulator.add(x).importance()
    assert importance.shape == expected
    assert jnp.broadcast_shapes(shape, expected) == shape
    np.testing.assert_allclose(importance.flatten(), (x**2).mean(-2).flatten(), rtol=1e-5)


def test_experts_one_at_a_time_and_all_together() -> None:
    x = gaussian(3, 7, 32)
    empty = HessianAccumulator((3, 8, 32), batch_dims=1)
    together = empty.add(x)
    apart = empty
    for expert in (2, np.int64(0), jnp.asarray(1)):
        apart = apart.add(x[int(expert), :4], expert).add(x[int(expert), 4:], expert=expert)
    assert apart.tokens.tolist() == together.tokens.tolist() == [7, 7, 7]
    for expert in range(3):
        close(together.hessian()[expert], x[expert])
        close(apart.hessian()[expert], x[expert])
    nested = HessianAccumulator((2, 3, 8, 32), batch_dims=2).add(x[1], (1, 2))
    assert nested.tokens.tolist() == [[0, 0, 0], [0, 0, 7]]


def test_what_was_never_seen_is_zero() -> None:
    accumulator = HessianAccumulator((3, 8, 32), batch_dims=1).add(gaussian(7, 32), 1)
    assert accumulator.hessian().any((1, 2, 3)).tolist() == [False, True, False]
    assert not HessianAccumulator((8, 32)).importance().any()


def test_merge_is_the_sum() -> None:
    x = gaussian(3, 7, 32)
    empty = HessianAccumulator((3, 8, 32), batch_dims=1)
    both = empty.add(x[0], 0).merge(empty.add(x[1], 0).add(x[2], 2))
    assert both.tokens.tolist() == [14, 0, 7]
    close(both.hessian()[0], x[:2])
    close(both.hessian()[2], x[2])
    with pytest.raises(
        ValueError, match=r"other is for a weight of shape \(8, 32\).* it must be .*\(3, 8, 32\)"
    ):
        empty.merge(HessianAccumulator((8, 32)))
    with pytest.raises(TypeError, match="other is a tuple"):
        empty.merge((empty.total, empty.tokens))


# --- transformations ------------------------------------------------------------------------------


def test_pytree() -> None:
    accumulator = HessianAccumulator((3, 8, 32), batch_dims=1).add(gaussian(3, 7, 32))
    leaves, structure = jax.tree.flatten(accumulator)
    assert [leaf.shape for leaf in leaves] == [(3, 2, 16, 16), (3,)]
    again = jax.tree.unflatten(structure, leaves)
    assert (again.importance() == accumulator.importance()).all()
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(accumulator)]
    assert paths == [".total", ".tokens"]
    doubled = jax.tree.map(jnp.add, accumulator, accumulator)
    assert doubled.tokens.tolist() == [14, 14, 14]
    np.testing.assert_array_equal(doubled.hessian(), accumulator.hessian())
    with pytest.raises(AttributeError):
        accumulator.total = leaves[0]


def test_jit_scan_and_vmap() -> None:
    x = gaussian(4, 6, 64)
    empty = HessianAccumulator((8, 64))
    jitted = jax.jit(lambda accumulator, x: accumulator.add(x))
    accumulator = empty
    for batch in x:
        accumulator = jitted(accumulator, batch)
    assert jitted._cache_size() == 1
    scanned, _ = jax.lax.scan(lambda carry, batch: (carry.add(batch), None), empty, x)
    for result in (accumulator, scanned):
        assert int(result.tokens) == 24
        close(result.hessian(), x)
    layers = jax.vmap(lambda x: HessianAccumulator((8, 64)).add(x))(x)
    hessians = jax.vmap(HessianAccumulator.hessian)(layers)
    for hessian, batch in zip(hessians, x, strict=True):
        close(hessian, batch)
    close(jax.jit(lambda x: HessianAccumulator((8, 64)).add(x).hessian())(x), x)


def test_traced_experts() -> None:
    x, experts = gaussian(6, 5, 32), jnp.array([0, 2, 2, -1, 3, 0])
    scanned, _ = jax.lax.scan(
        lambda carry, pair: (carry.add(*pair), None),
        HessianAccumulator((3, 8, 32), batch_dims=1),
        (x, experts),
    )
    assert scanned.tokens.tolist() == [10, 0, 10]  # -1 and 3 are nobody's
    close(scanned.hessian()[0], x[jnp.array([0, 5])])
    close(scanned.hessian()[2], x[1:3])
    nested = HessianAccumulator((2, 3, 8, 32), batch_dims=2)
    added = jax.jit(lambda expert: nested.add(x[0], (1, expert)))(2)
    assert added.tokens.tolist() == [[0, 0, 0], [0, 0, 5]]
    with pytest.raises(ValueError, match="is out of range"):
        jax.jit(lambda expert: nested.add(x[0], expert))(2)
    with pytest.raises(ValueError, match="with batch_dims=0"):
        jax.jit(lambda expert: HessianAccumulator((8, 32)).add(x[0], expert))(0)


def test_no_gradient() -> None:
    gradient = jax.grad(lambda x: HessianAccumulator((8, 32)).add(x).hessian().sum())(gaussian(7, 32))
    assert not gradient.any()


def test_several_devices() -> None:
    program = """
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from nvfp4sweep_jax import HessianAccumulator

x = jax.random.normal(jax.random.key(0), (4, 8, 64))
empty = HessianAccumulator((8, 64))
expected = empty.add(x)
for kind in AxisType.Auto, AxisType.Explicit:
    mesh = jax.make_mesh((4,), ("a",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        for spec in P("a"), P(None, "a"), P(None, None, "a"):
            sharded = jax.device_put(x, NamedSharding(mesh, spec))
            for add in empty.add, jax.jit(empty.add), jax.jit(HessianAccumulator((8, 64)).add):
                found = add(sharded)
                assert found.tokens == 32
                np.testing.assert_allclose(found.hessian(), expected.hessian(), rtol=1e-5, atol=1e-6)
    stacked = HessianAccumulator((4, 8, 64), batch_dims=1)
    with jax.set_mesh(mesh):
        found = jax.jit(stacked.add)(jax.device_put(x, NamedSharding(mesh, P("a"))))
        np.testing.assert_allclose(found.hessian(), stacked.add(x).hessian(), rtol=1e-5, atol=1e-6)

mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
summed = jax.shard_map(
    lambda x: jax.lax.psum(HessianAccumulator((8, 64)).add(x), "a"), mesh=mesh, in_specs=P("a"), out_specs=P()
)(x)
assert summed.tokens == 32
np.testing.assert_allclose(summed.hessian(), expected.hessian(), rtol=1e-5, atol=1e-6)
"""
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr


# --- errors ---------------------------------------------------------------------------------------


def test_layouts_are_checked() -> None:
    with pytest.raises(ValueError, match="length 40, which block_size=16 does not divide"):
        HessianAccumulator((40, 8), axis=0)
    with pytest.raises(ValueError, match="axis=0 is one of the batch_dims=1 leading axes"):
        HessianAccumulator((16, 8, 32), axis=0, batch_dims=1)


@pytest.mark.parametrize("add", [HessianAccumulator.add, jax.jit(HessianAccumulator.add)])
def test_activations_of_another_shape(add: Any) -> None:
    with pytest.raises(ValueError, match=r"activations has shape \(32, 3\): it must be \[\.\.\., 32\]"):
        add(HessianAccumulator((8, 32)), gaussian(32, 3))
    with pytest.raises(ValueError, match=r"it must be \[3, \.\.\., 32\].*expert must say"):
        add(HessianAccumulator((3, 8, 32), batch_dims=1), gaussian(7, 32))


def test_expert_and_activations_of_another_kind() -> None:
    stacked, x = HessianAccumulator((3, 8, 32), batch_dims=1), gaussian(7, 32)
    for expert in (-1, 3, (0, 1), ()):
        with pytest.raises(ValueError, match="is out of range"):
            stacked.add(x, expert)
    with pytest.raises(TypeError, match=r"expert=1\.0 is a float"):
        stacked.add(x, 1.0)
    with pytest.raises(ValueError, match=r"expert=0 is given for a weight .* with batch_dims=0"):
        HessianAccumulator((8, 32)).add(x, 0)
    with pytest.raises(TypeError, match="activations is a NumPy array"):
        stacked.add(np.array(x))
    with pytest.raises(TypeError, match="activations has dtype int32"):
        stacked.add(jnp.zeros((7, 32), jnp.int32), 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_nonfinite_activations_are_found_in_the_end(value: float) -> None:
    x = gaussian(7, 64).at[3, 40].set(value)
    accumulator = HessianAccumulator((8, 64)).add(x).add(gaussian(7, 64))
    for result in (accumulator.hessian, accumulator.importance):
        with pytest.raises(ValueError, match=r"inputs 32 \.\. 47 are not finite"):
            result()
    stacked = HessianAccumulator((3, 8, 64), batch_dims=1).add(x, 2)
    with pytest.raises(ValueError, match=r"inputs 32 \.\. 47 of expert 2 are not finite"):
        stacked.hessian()
    assert not jnp.isfinite(jax.jit(HessianAccumulator.hessian)(accumulator)).all()
