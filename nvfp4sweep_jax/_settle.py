"""Exact comparison of the codes that a screen leaves (theorem 5), two at a time.

Mostly few blocks are contested. So in each round each group of blocks has one of its contested ones settled,
whose elements are gathered. Where many are contested all are, in passes over the weight.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4sweep.problem import Problem
from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax import _blocks, _words

Array = jax.Array
Pair = tuple[Array, Array]

_GROUP = 32
#: Rounds before the first look whether a block is left, for which a host waits. They seldom leave one.
_BLIND_ROUNDS = 2
#: Of codes that are left for a block, in each later round.
_DUELS = 4
#: Above one block in so many a pass over all is cheaper than rounds.
_MANY = 32


def settle(words: Array, weight: Array, amax_bits: Array, problem: Problem) -> Array:
    """int32 codes, from words of the blocks' shape: the lowest of those left with the least exact error."""
    total = words.size
    groups = -(-total // _GROUP)
    amaxes = amax_bits.reshape(-1)

    def few(flat: Array, turn: Array, duels: int = _DUELS) -> Array:
        """A contested block of each group."""
        table = flat.reshape(_GROUP, groups)
        row = lax.broadcasted_iota(jnp.int32, table.shape, 0)
        row = jnp.min(jnp.where(_words.is_contested(table), row, _GROUP), axis=0)
        block = row * groups + lax.iota(jnp.int32, groups)
        known = jnp.where(row < _GROUP, block, 0)
        bits = amaxes[0] if amaxes.size == 1 else amaxes[known // (total // amaxes.size)]
        element = _blocks.gatherer(known, _within(weight, turn), problem)
        word = flat.at[known].get(mode="promise_in_bounds")
        for _ in range(duels):
            word = _duel(word, bits, element, problem)
        return flat.at[block].set(word, mode="drop", unique_indices=True)

    def many(flat: Array, turn: Array) -> Array:
        """Every contested block, by one duel."""
        element = _blocks.reader(_blocks.block_view(_within(weight, turn), problem), problem)
        return _padded(_duel(flat[:total].reshape(words.shape), amax_bits, element, problem), groups)

    def compare(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        flat, turn, left = carry
        flat = lax.cond(left > total // _MANY, many, few, flat, turn)
        return flat, turn + 1, _contested(flat)

    flat = _padded(words, groups)
    # A loop, as XLA would fuse the screen into each of its uses otherwise.
    flat = lax.fori_loop(0, _BLIND_ROUNDS, lambda turn, flat: few(flat, turn, 1), flat)
    carry = flat, jnp.int32(0), _contested(flat)
    flat, _, _ = lax.while_loop(lambda carry: carry[2] > 0, compare, carry)
    return _words.code_of(flat[:total].reshape(words.shape))


def _within(weight: Array, turn: Array) -> Array:
    """The weight, for use within this turn of a loop. What depends on it alone XLA would take out: slices, or
    the weight as another type, whether the loop runs or not."""
    within: Array
    within, _ = lax.optimization_barrier((weight, turn))  # type: ignore[no-untyped-call]
    return within


def _padded(words: Array, groups: int) -> Array:
    """Flat, with settled words behind."""
    return jnp.pad(words.reshape(-1), (0, groups * _GROUP - words.size), constant_values=_words.SETTLED)


def _contested(flat: Array) -> Array:
    return jnp.sum(_words.is_contested(flat), dtype=jnp.int32)


def _duel(word: Array, amax_bits: Array, element: Callable[[Any], Array], problem: Problem) -> Array:
    """What is left of contested words when their lowest two codes are compared."""
    amax = exact.widen(amax_bits)
    scales = [exact.block_scale(code, amax) for code in (_words.code_of(word), _words.rival_of(word))]
    ours, theirs = exact_objectives(scales, element, problem)
    after = _words.after_duel(word, exact.less(theirs, ours))
    return jnp.where(_words.is_contested(word), after, word)


def exact_objectives(scales: list[Array], element: Callable[[Any], Array], problem: Problem) -> list[Pair]:
    """s^2 B - 2 s A at each scale as a float64 pair: the error less its constant part."""
    inverses = [exact.reciprocal(scale) for scale in scales]

    def add(sums: list[Pair], w: Array) -> list[Pair]:
        magnitude = exact.widen(exact.magnitude_bits(w))
        points = [exact.nearest_e2m1(magnitude, inverse) for inverse in inverses]
        return [(a + magnitude * q, b + q * q) for (a, b), q in zip(sums, points, strict=True)]

    zeros = [(scale * 0, scale * 0) for scale in scales]
    objectives = []
    for scale, (a, b) in zip(scales, _blocks.fold(element, problem, add, zeros), strict=True):
        # Every product is exact: scale has 24 bits, b 26 at most, a split half 27.
        square_high, square_low = exact.split(scale * scale)
        f_high, f_low = exact.two_sum(square_high * b, square_low * b)
        twice = -2 * scale
        top, bottom = exact.split(a)
        g_high, g_low = exact.two_sum(twice * top, twice * bottom)
        high, carry = exact.two_sum(f_high, g_high)
        objectives.append(exact.two_sum(high, (f_low + g_low) + carry))
    return objectives
