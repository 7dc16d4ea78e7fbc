"""The codes that are left for a block, in an int32: what a screen makes and the settling reduces to one.

Either bits 0 .. 6 are a code and bits 7 .. 29 a mask, whose bit j says that code + j is left; or, where
bit 30 is set, all codes of a range are: bits 0 .. 6 are the best so far, 7 .. 13 the next one to compare
it with, and 14 .. 20 the last one. One small array, so that XLA computes the screen once and not once an
output.
"""

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

_RANGE = 1 << 30
_CODE = 127
SETTLED = 1 << 7
_LONGEST = 22  # distance within a mask


def from_mask(first: Array, mask: Array | int) -> Array:
    """The codes first + j for each bit j of the mask, which has one at least."""
    return first | mask << 7


def from_range(first: Array, last: Array) -> Array:
    """The codes first .. last."""
    return jnp.where(first == last, from_mask(first, 1), first | (first + 1) << 7 | last << 14 | _RANGE)


def with_code(word: Array, code: Array) -> Array:
    """These codes and a higher one; where they are too far apart for a mask, all from the lowest to it."""
    first = word & _CODE
    distance = code - first
    masked = word | jnp.left_shift(1 << 7, jnp.minimum(distance, _LONGEST))
    is_range = (word >= _RANGE) | (distance > _LONGEST)
    return jnp.where(is_range, from_range(first, code), masked)


def is_contested(word: Array) -> Array:
    mask = word >> 7
    return (mask & (mask - 1)) != 0  # a range has bit 30 and a next code


def code_of(word: Array) -> Array:
    """The lowest code left, or the best so far."""
    return (word & _CODE) + jnp.where(word >= _RANGE, 0, _trailing_zeros(word >> 7))


def rival_of(word: Array) -> Array:
    """The code to compare code_of(word) with, where there is one."""
    mask = word >> 7
    return jnp.where(word >= _RANGE, mask & _CODE, (word & _CODE) + _trailing_zeros(mask & (mask - 1)))


def after_duel(word: Array, rival_wins: Array) -> Array:
    """What is left when the loser is out."""
    mask = word >> 7
    higher = mask & (mask - 1)
    left = jnp.where(rival_wins, higher, mask ^ (higher & -higher))
    rival, last = mask & _CODE, word >> 14 & _CODE
    best = jnp.where(rival_wins, rival, word & _CODE)
    in_range = jnp.where(rival == last, from_mask(best, 1), best | (rival + 1) << 7 | last << 14 | _RANGE)
    return jnp.where(word >= _RANGE, in_range, word & _CODE | left << 7)


def _trailing_zeros(bits: Array) -> Array:
    return lax.population_count((bits & -bits) - 1)
