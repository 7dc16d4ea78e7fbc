"""The XLA engine is exact: against the oracle and, for the settling of ties, rational arithmetic.

It also runs all of tests/cases.py, as the engine "jit" of test_engines.py.
"""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax_helpers import SHAPE, gaussian, same, same_quantized, same_sweep

import nvfp4sweep
import nvfp4sweep_jax
from nvfp4sweep import formats
from nvfp4sweep.problem import make_problem
from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax import _blocks, _screen, _squares, _words


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


@pytest.mark.parametrize("factor", [1e36, 1e-30, 1e-36, 1e-38, 1e-44])
def test_xla_is_exact_at_the_ends_of_float32(factor):
    check_xla(gaussian() * np.float32(factor))
    check_xla_quantize(gaussian() * np.float32(factor))


@pytest.mark.parametrize("given", [0, 1e-45, 1e-42, 1e-35, 2.0**-100, 1e-3, 3e4, 3e38])
def test_xla_is_exact_for_any_global_amax(given):
    for factor in (1, 1e-38):
        check_xla(gaussian() * np.float32(factor), global_amax=given)
        check_xla_quantize(gaussian() * np.float32(factor), global_amax=given)


@pytest.mark.parametrize("factor", [0.1, 0.5, 0.7, 0.8, 0.86, 0.9, 0.95, 0.99, 1.01, 1.1])
def test_xla_is_exact_where_scales_end(factor):
    """Blocks around and above the largest that E4M3 reaches, with one and with several large elements."""
    rng = np.random.default_rng(7)
    for _ in range(4):
        weight = rng.uniform(-1, 1, SHAPE).astype(np.float32)
        weight[::2] *= np.where(rng.random(weight[::2].shape) < 0.1, 1, 0.2).astype(np.float32)
        check_xla(weight, global_amax=factor)


@pytest.mark.parametrize("min_code", [119, 122])
def test_xla_is_exact_for_min_code(min_code):
    """An octave of codes that is left, and less. The cases have 8, 100 and 126."""
    for kind in ("levels", "gaussian"):
        check_xla(structured(kind), min_code=min_code, global_amax=10.5)


@pytest.mark.parametrize("block_size", [8, 128])
def test_xla_is_exact_for_block_sizes(block_size):
    """The cases have 1, 3, 32 and 96."""
    check_xla(structured("levels"), block_size=block_size, global_amax=10.5)


def test_xla_takes_empty_weights():
    check_xla(np.zeros((3, 0), np.float32))


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_few_and_many_contested_blocks(share):
    """Rounds over a block of each group, and passes over all blocks."""
    rng = np.random.default_rng(8)
    ties = rng.choice(np.array([0, 1.5, 3, 6], np.float32), (64, 1024))
    contested = np.repeat(rng.random((64, 64)) < share, 16, axis=1)
    check_xla(np.where(contested, ties, gaussian(ties.shape)), global_amax=10.5)


def test_words_of_codes_that_are_left():
    first, last = jnp.array([3, 9, 5]), jnp.array([5, 9, 126])
    ranges = _words.from_range(first, last)
    masks = _words.from_mask(jnp.array([3, 9, 5]), jnp.array([0b10110, 0b1, 0b11]))
    same(_words.is_contested(jnp.concatenate([ranges, masks])), np.array([1, 0, 1, 1, 0, 1], bool))
    for word, codes in ((ranges[0], [3, 4, 5]), (masks[0], [4, 5, 7])):
        for winner in codes:
            left = word
            for rival in codes[1:]:
                assert int(_words.rival_of(left)) == rival
                left = _words.after_duel(left, jnp.bool_(rival == winner))
            assert not bool(_words.is_contested(left))
            assert int(_words.code_of(left)) == winner


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
        squares = _squares.Squares(_blocks.reader(weight, problem), problem)
        with jax.enable_x64(True):
            scale = exact.block_scale(code, exact.widen(exact.magnitude_bits(global_amax)))
            ((high, low),) = squares.pairs([scale])
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
            squares = _squares.Squares(_blocks.reader(weight, problem), problem)
            total = squares.error(scale.astype(jnp.float64))
            return lax.bitcast_convert_type(total, jnp.uint32)

    magnitude = np.abs(weight.reshape(-1, 16).astype(np.float64))[..., None]
    residual = magnitude - formats.E2M1_VALUES * scale.reshape(-1, 1, 1).astype(np.float64)
    expected = np.add.accumulate((residual * residual).min(axis=-1), axis=1)[:, -1]
    np.testing.assert_array_equal(np.asarray(error(weight, scale)).view(np.float64).ravel(), expected)


@pytest.mark.parametrize("factor", [1, 1 / 3, 1e-3])
def test_ties_between_scales_take_the_lowest_code(factor):
    weight = structured("levels", seed=3) * np.float32(factor)
    given = np.float32(10.5 * factor)
    code = np.asarray(nvfp4sweep_jax.sweep(jnp.asarray(weight), global_amax=given, implementation="xla").code)
    scales = [Fraction(float(s)) for s in formats.scale_by_code(given)]
    for block, found in zip(weight[0].reshape(-1, 16), code[0], strict=True):
        ws = [abs(Fraction(float(w))) for w in block]
        errors = {k: sum((w - nearest(w, scales[k]) * scales[k]) ** 2 for w in ws) for k in formats.CODES}
        assert found == min(formats.CODES, key=lambda k: (errors[k], k))


def test_the_screen_leaves_ties_and_seldom_more():
    """So the tests above reach `_settle`, and dense weights seldom need it."""

    @jax.jit
    def left(weight, global_amax):
        problem = make_problem(weight.shape)
        bits = exact.magnitude_bits(global_amax).reshape(1, 1)
        words = _screen.screen(weight, bits, problem)
        return lax.population_count(words >> 7)

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
