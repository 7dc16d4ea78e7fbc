"""calibrate_tree: weights of a parameter tree, by their names."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_helpers import gaussian, needs_host, same

import nvfp4sweep
import nvfp4sweep_jax


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


def test_importances_and_hessians_by_rule():
    rng = np.random.default_rng(1)
    params = {name: {"kernel": gaussian((32, 8), seed=i)} for i, name in enumerate("abc")}
    h = rng.lognormal(0, 2, (32, 1)).astype(np.float32)
    hessian = h.reshape(2, 16, 1) * np.eye(16, dtype=np.float32)
    found = nvfp4sweep_jax.calibrate_tree(
        jax.tree.map(jnp.asarray, params),
        importance=lambda name, leaf: {"a/kernel": h}.get(name),
        hessian=lambda name, leaf: {"b/kernel": hessian}.get(name),
    )
    for name in "ab":
        same(found[name]["kernel"], nvfp4sweep.calibrate(params[name]["kernel"], axis=0, importance=h))
    same(found["c"]["kernel"], nvfp4sweep.calibrate(params["c"]["kernel"], axis=0))
    with pytest.raises(ValueError, match=r"params\['a/kernel'\]: importance\[0, 0\] is -1"):
        nvfp4sweep_jax.calibrate_tree(
            {"a": {"kernel": jnp.asarray(params["a"]["kernel"])}},
            importance=lambda name, leaf: -np.ones((1, 1)),
        )
