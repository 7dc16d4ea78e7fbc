"""Exact comparison of the codes that are left for a block, two at a time.

Mostly few blocks are contested. So in each round each group of blocks has one of its contested ones settled,
whose elements are gathered. Where many are contested all are, in passes over the weight.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax import _words

Array = jax.Array


class Form(Protocol):
    """The exact error of some blocks."""

    def sign_of_difference(self, scale: Array, other: Array) -> tuple[Array, Array]:
        """Of the errors at two scales, and whether it is known."""

    #: The same where it was not known, slowly; None if it always is.
    sign_by_digits: Callable[[Array, Array], Array] | None


#: Makes it, for the blocks of these numbers or for all (None), within a turn of a loop.
FormOf = Callable[[Array | None, Array], Form]

_GROUP = 32
#: Of codes that are left for a block, in each later round.
_DUELS = 4
#: Above one block in so many a pass over all is cheaper than rounds.
_MANY = 32


def settle(
    words: Array, form_of: FormOf, amax_bits: Array, *, blind_rounds: int = 0, passes: bool = True
) -> Array:
    """int32 codes, from words of the blocks' shape: the lowest of those left with the least exact error.

    Args:
        blind_rounds: rounds before the first look whether a block is left, for which a host waits. They are
            a loop: XLA would fuse what makes the words into each of their uses otherwise.
        passes: whether passes over all blocks may be made; they hold what they compare for all at once.
    """
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
        form = form_of(known, turn)
        word = flat.at[known].get(mode="promise_in_bounds")
        word = lax.fori_loop(0, duels, lambda _, word: _duel(word, bits, form, to_the_end=True), word)
        return flat.at[block].set(word, mode="drop", unique_indices=True)

    def many(flat: Array, turn: Array) -> Array:
        """Every contested block, by one duel; it may leave some as they are."""
        return _padded(_duel(flat[:total].reshape(words.shape), amax_bits, form_of(None, turn)), groups)

    def settle_some(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        flat, turn, left, before = carry
        if passes:
            flat = lax.cond((left > total // _MANY) & (left < before), many, few, flat, turn)
        else:
            flat = few(flat, turn)
        return flat, turn + 1, _contested(flat), left

    flat = _padded(words, groups)
    if blind_rounds:
        flat = lax.fori_loop(0, blind_rounds, lambda turn, flat: few(flat, turn, 1), flat)
    carry = flat, jnp.int32(0), _contested(flat), jnp.int32(total + 1)
    flat, *_ = lax.while_loop(lambda carry: carry[2] > 0, settle_some, carry)
    return _words.code_of(flat[:total].reshape(words.shape))


def within(x: Array, turn: Array) -> Array:
    """x, for use within this turn of a loop. What depends on it alone XLA would take out: slices of the
    weight, or the weight as another type, whether the loop runs or not."""
    kept: Array
    kept, _ = lax.optimization_barrier((x, turn))  # type: ignore[no-untyped-call]
    return kept


def _padded(words: Array, groups: int) -> Array:
    """Flat, with settled words behind."""
    return jnp.pad(words.reshape(-1), (0, groups * _GROUP - words.size), constant_values=_words.SETTLED)


def _contested(flat: Array) -> Array:
    return jnp.sum(_words.is_contested(flat), dtype=jnp.int32)


def _duel(word: Array, amax_bits: Array, form: Form, to_the_end: bool = False) -> Array:
    """What is left of contested words when their lowest two codes are compared.

    Those stay as they are of which the comparison is not known, unless it goes to the end.
    """
    amax = exact.widen(amax_bits)
    scales = [exact.block_scale(code, amax) for code in (_words.code_of(word), _words.rival_of(word))]
    sign, known = form.sign_of_difference(*scales)
    contested = _words.is_contested(word)
    if to_the_end and form.sign_by_digits is not None:
        by_digits = form.sign_by_digits
        unknown = contested & ~known
        sign = lax.cond(jnp.any(unknown), lambda: jnp.where(unknown, by_digits(*scales), sign), lambda: sign)
        known = contested
    return jnp.where(contested & known, _words.after_duel(word, sign > 0), word)
