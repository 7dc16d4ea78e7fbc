"""Which codes can have the least weighted error or quadratic form, in float64.

The errors of a few codes from absmax on bound the codes that can do better, below and above (theorems 1, 6
and 10). All codes in between are tried. Errors are held as parts of a block's largest possible error, so that
a margin is a constant, and what it cannot separate is left to _settle.py.

A quotient also keeps XLA from computing an error again in each use: it repeats what it holds for cheap.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4sweep import formats
from nvfp4sweep.problem import Problem
from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax import _words
from nvfp4sweep_jax._quadratic import QuadraticForm
from nvfp4sweep_jax._squares import WeightedSquares

Array = jax.Array

#: Powers of two whose sum reaches all codes.
_STEPS = 7
#: So many codes from absmax on, so far apart, bound the error of the best.
_PROBES = 3
_PROBE_STEP = 2


#: Makes the error of all blocks (None), for use within a turn of a loop.
FormOf = Callable[[None, Array | None], Any]


class Terms(Protocol):
    """The error of all blocks, as a part of the largest possible, and what bounds it."""

    tolerance: float
    peak: Array

    def ratio(self, turn: Array, scale: Array) -> Array: ...

    def is_beaten_below(self, turn: Array, scale: Array, bound: Array) -> Array:
        """Whether this scale and all smaller ones have larger ratios than the bound."""

    def is_beaten_above(self, turn: Array, scale: Array, code: Array, amax: Array, bound: Array) -> Array:
        """Whether this code and all higher ones have, or cannot win."""


class Weighted:
    """Terms with importances."""

    def __init__(self, form_of: FormOf) -> None:
        self.form_of = form_of
        form: WeightedSquares = form_of(None, None)
        self.tolerance = form.tolerance
        self.peak = form.peak()

    def ratio(self, turn: Array, scale: Array) -> Array:
        form: WeightedSquares = self.form_of(None, turn)
        return form.ratio(scale, form.total())

    def is_beaten_below(self, turn: Array, scale: Array, bound: Array) -> Array:
        form: WeightedSquares = self.form_of(None, turn)
        return form.least_ratio_below(scale, form.total()) > bound

    def is_beaten_above(self, turn: Array, scale: Array, code: Array, amax: Array, bound: Array) -> Array:
        form: WeightedSquares = self.form_of(None, turn)
        return form.is_beaten_above(scale, code, amax, self.peak)


class Quadratic:
    """Terms with a Hessian."""

    def __init__(self, form_of: FormOf) -> None:
        self.form_of = form_of
        form: QuadraticForm = form_of(None, None)
        self.tolerance = form.tolerance
        self.c, self.mu = form.bounds()
        self.peak = form.peak(self.c)

    def ratio(self, turn: Array, scale: Array) -> Array:
        form: QuadraticForm = self.form_of(None, turn)
        return form.ratio(scale, form.total(self.c))

    def is_beaten_below(self, turn: Array, scale: Array, bound: Array) -> Array:
        form: QuadraticForm = self.form_of(None, turn)
        return form.least_ratio_below(scale, form.total(self.c), self.c, self.mu) > bound

    def is_beaten_above(self, turn: Array, scale: Array, code: Array, amax: Array, bound: Array) -> Array:
        form: QuadraticForm = self.form_of(None, turn)
        return form.least_ratio_above(scale, form.total(self.c), self.c, self.mu) > bound


def walk(terms: Terms, amax_bits: Array, problem: Problem) -> Array:
    """The codes left of each block, as words."""
    amax = exact.widen(amax_bits)
    lowest, highest = problem.min_code, formats.MAX_CODE

    def scale_of(code: Array) -> Array:
        return exact.block_scale(jnp.clip(code, 0, highest), amax)

    absmax = lowest + _count(lambda _, i: 6 * scale_of(lowest + i) < terms.peak, problem)
    infinite = jnp.full(problem.block_shape, jnp.inf)

    def probe(turn: Array, least: Array) -> Array:
        code = jnp.minimum(absmax + _PROBE_STEP * turn.astype(jnp.int32), highest)
        return jnp.minimum(least, terms.ratio(turn, scale_of(code)))

    bound = lax.fori_loop(0, _PROBES, probe, infinite) + 8 * terms.tolerance

    def is_out_above(turn: Array, i: Array) -> Array:
        code = highest - i
        # Or the code before rounds all elements to 0, as this one does.
        repeats = scale_of(code - 1) >= 4 * terms.peak
        return (code > lowest) & (repeats | terms.is_beaten_above(turn, scale_of(code), code, amax, bound))

    last = highest - _count(is_out_above, problem)

    def is_out_below(turn: Array, i: Array) -> Array:
        code = lowest + i
        return (code < last) & terms.is_beaten_below(turn, scale_of(code), bound)

    first = lowest + _count(is_out_below, problem)
    # A global amax of 0 makes all codes alike; one that is not finite has no right answer.
    alike = (amax_bits == 0) | (amax_bits >= exact.INF_BITS)
    first = jnp.where(alike, lowest, first)
    last = jnp.where(alike, lowest, last)

    def attempt(turn: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        best, word = state
        code = first + turn.astype(jnp.int32)
        ratio = jnp.where(code <= last, terms.ratio(turn, scale_of(code)), jnp.inf)
        margin = 2 * terms.tolerance
        near = jnp.where(ratio <= best + margin, _words.with_code(word, code), word)
        word = jnp.where(ratio < best - margin, _words.from_mask(code, 1), near)
        return jnp.minimum(best, ratio), word

    length = jnp.max(last - first, initial=0) + 1
    word: Array
    _, word = lax.fori_loop(0, length, attempt, (infinite, _words.from_mask(first, 1)))
    return word


def _count(is_met: Callable[[Array, Array], Array], problem: Problem) -> Array:
    """How many of the numbers 0, 1, 2, ... in a row meet this, of 126 at most."""

    def double(turn: Array, found: Array) -> Array:
        more = found + (1 << _STEPS - 1 >> turn).astype(jnp.int32)
        return jnp.where((more <= formats.MAX_CODE) & is_met(turn, more - 1), more, found)

    found: Array = lax.fori_loop(0, _STEPS, double, jnp.zeros(problem.block_shape, jnp.int32))
    return found
