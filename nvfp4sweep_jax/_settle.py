"""Exact comparison of the codes that are left for a block, two at a time.

Mostly few blocks are contested. So in each round each group of blocks has one of its contested ones settled,
whose elements are gathered. Where many are contested all are, in passes over the weight.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax import _words
from nvfp4sweep_jax._arithmetic import Pair

Array = jax.Array
#: What the exact errors of blocks at each scale compare by.
Compare = Callable[[list[Array]], list[Pair]]
#: Makes it, for the blocks of these numbers or for all, within a turn of a loop.
MakeCompare = Callable[[Array | None, Array], Compare]

_GROUP = 32
#: Of codes that are left for a block, in each later round.
_DUELS = 4
#: Above one block in so many a pass over all is cheaper than rounds.
_MANY = 32


def settle(
    words: Array, compare: MakeCompare, amax_bits: Array, *, blind_rounds: int = 0, passes: bool = True
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
        pairs = compare(known, turn)
        word = flat.at[known].get(mode="promise_in_bounds")
        word = lax.fori_loop(0, duels, lambda _, word: _duel(word, bits, pairs), word)
        return flat.at[block].set(word, mode="drop", unique_indices=True)

    def many(flat: Array, turn: Array) -> Array:
        """Every contested block, by one duel."""
        return _padded(_duel(flat[:total].reshape(words.shape), amax_bits, compare(None, turn)), groups)

    def settle_some(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        flat, turn, left = carry
        flat = lax.cond(left > total // _MANY, many, few, flat, turn) if passes else few(flat, turn)
        return flat, turn + 1, _contested(flat)

    flat = _padded(words, groups)
    if blind_rounds:
        flat = lax.fori_loop(0, blind_rounds, lambda turn, flat: few(flat, turn, 1), flat)
    carry = flat, jnp.int32(0), _contested(flat)
    flat, _, _ = lax.while_loop(lambda carry: carry[2] > 0, settle_some, carry)
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


def _duel(word: Array, amax_bits: Array, pairs: Compare) -> Array:
    """What is left of contested words when their lowest two codes are compared."""
    amax = exact.widen(amax_bits)
    ours, theirs = pairs(
        [exact.block_scale(code, amax) for code in (_words.code_of(word), _words.rival_of(word))]
    )
    after = _words.after_duel(word, exact.less(theirs, ours))
    return jnp.where(_words.is_contested(word), after, word)
