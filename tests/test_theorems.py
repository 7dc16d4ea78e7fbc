"""The theorems for importances and Hessians (window.py), by construction and against the oracle's answers."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import (
    blocks_over_decades,
    from_levels,
    near_midpoints,
    normal,
    one_large_element,
    sparse,
)
from objective_cases import HESSIANS, IMPORTANCES

from nvfp4sweep import formats, oracle, packing
from nvfp4sweep.objectives import hessian_bounds, normalised_hessian
from nvfp4sweep.problem import make_problem
from nvfp4sweep.window import FIRST_UNDOUBLED_CODE, UPPER_RATIO, last_unhalved_code

ROUNDING = 1e-12  # of float64 sums of 256 products
WEIGHTS = {
    "normal": normal,
    "over-decades": blocks_over_decades,
    "levels": from_levels(0, 1.5, 3, 6),
    "midpoints": near_midpoints,
    "one-large": one_large_element,
    "sparse": sparse,
}


class Found(NamedTuple):
    """Blocks |w| [n, 16] with the residuals [n, 126, 16] and scales [126] of codes 1 .. 126, and answers."""

    w: Any
    residuals: Any
    scales: Any
    code: Any

    def answers(self, errors: Any) -> Any:
        return errors[np.arange(len(errors)), self.code - 1]


def search(blocks: Any, min_code: int = 1, **weights: Any) -> Found:
    amax = np.abs(blocks).max()
    scales = formats.scale_by_code(amax)[1:]
    code = packing.encode(np.repeat(blocks[:, None], len(scales), axis=1), scales[:, None])
    q = formats.E2M1_VALUES[code & 7] * np.where(code & 8, -1, 1)
    residuals = blocks.astype(np.float64)[:, None] - q * scales.astype(np.float64)[:, None]
    found, _ = oracle.search(blocks, amax, min_code, **weights)
    return Found(np.abs(blocks.astype(np.float64)), residuals, scales.astype(np.float64), found)


def blocks_of(name: str) -> Any:
    return np.ascontiguousarray(WEIGHTS[name](np.random.default_rng(5), 32)).reshape(-1, 16)


# --- importances ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", ["lognormal-1", "lognormal-3", "zeros", "one-hot", "twelve-decades"])
@pytest.mark.parametrize("min_code", [1, 60])
def test_importance_theorems(weight: str, name: str, min_code: int) -> None:
    blocks = blocks_of(weight)
    problem = make_problem((32, 96))
    h = np.broadcast_to(IMPORTANCES[name](np.random.default_rng(0), problem), (32, 96)).reshape(-1, 16).copy()
    found = search(blocks, min_code, importance=h)
    h = np.where(h.any(axis=1, keepdims=True), h, 1).astype(np.float64)
    errors = (h[:, None] * found.residuals**2).sum(axis=2)
    least = found.answers(errors)[:, None]
    counted = np.where(h > 0, found.w, 0)
    peak = counted.max(axis=1)
    answer = found.scales[found.code - 1]

    trivial = peak <= found.scales[min_code - 1] / 4  # theorem 3
    assert (found.code[trivial] == min_code).all()
    above = (found.code > last_unhalved_code(min_code)) & ~trivial  # theorem 1
    assert (peak[above] > UPPER_RATIO * answer[above] * (1 - ROUNDING)).all()

    excess = np.maximum(0, found.w[:, None] - 6 * found.scales[:, None])  # theorem 6
    clipping = (h[:, None] * excess**2).sum(axis=2)
    assert (clipping <= errors * (1 + ROUNDING)).all()
    out = clipping > least * (1 + ROUNDING)
    assert (found.code - 1 >= out.sum(axis=1)).all()

    bound = (16 * h * found.w / (111 * h + h.sum(axis=1, keepdims=True))).max(axis=1)  # theorem 7
    free = (found.code < FIRST_UNDOUBLED_CODE) & (found.code > min_code) & ~trivial
    assert (answer[free] >= bound[free] * (1 - ROUNDING)).all()


def test_a_weighted_optimum_far_below_absmax() -> None:
    """A large element that hardly counts: no fixed number of codes below absmax is enough."""
    block = np.random.default_rng(0).uniform(0.1, 0.3, (1, 16)).astype(np.float32)
    block[0, 0] = 6
    absmax = int(np.abs(formats.E4M3_VALUES - 1).argmin())
    offsets = []
    for importance in (1, 1e-1, 1e-2, 1e-3, 1e-4):
        h = np.ones((1, 16), np.float32)
        h[0, 0] = importance
        code, _ = oracle.search(block, np.float32(2688), 1, importance=h)
        offsets.append(int(code[0]) - absmax)
    assert offsets == [0, -3, -7, -16, -31]


# --- Hessians -------------------------------------------------------------------------------------

NAMES = ["identity", "diagonal", "common-0.9", "512-tokens", "5-tokens", "rank-1", "dead-inputs", "integers"]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("min_code", [1, 60])
def test_hessian_theorems(weight: str, name: str, min_code: int) -> None:
    blocks = blocks_of(weight)
    few = normalised_hessian(HESSIANS[name](np.random.default_rng(0), make_problem((32, 96))))
    c, mu = hessian_bounds(few)
    index = np.tile(np.arange(6), 32)
    found = search(blocks, min_code, hessian=few, hessian_of=index)
    h, c, mu = few.astype(np.float64)[index], c.astype(np.float64)[index], mu.astype(np.float64)[index]
    errors = np.einsum("nki,nij,nkj->nk", found.residuals, h, found.residuals)
    sizes = np.einsum("nki,ni->nk", found.residuals**2, c)
    slack = ROUNDING * sizes
    best = (errors + slack)[:, min_code - 1 :].min(axis=1)
    mu = mu[:, None]

    # Theorem 10: between which the errors lie, and which codes are out.
    assert (errors <= sizes + slack).all()
    assert (errors >= mu * sizes - slack).all()
    assert (found.answers(mu * sizes - slack) <= best).all()
    counted = np.where(c > 0, found.w, 0)
    kept = np.minimum(found.w[:, None], np.maximum(0, found.scales[:, None] / 2 - found.w[:, None]))
    upwards = np.einsum("nki,ni->nk", kept**2, c)
    excess = np.maximum(0, found.w[:, None] - 6 * found.scales[:, None])
    downwards = np.einsum("nki,ni->nk", excess**2, c)
    for bound in (np.where(mu > 0, mu * part, -np.inf) for part in (upwards, downwards)):
        assert (bound <= errors + slack).all()
        assert (found.answers(bound - slack) <= best).all()
    zero = found.scales >= 4 * counted.max(axis=1, keepdims=True)
    whole = errors[:, -1:]
    assert (np.abs(errors - whole)[zero] <= (2 * slack)[zero]).all()

    # Theorem 12: which small scales are out.
    nu = np.maximum(0, -mu[:, 0])
    size = (c * found.w**2).sum(axis=1)
    form = np.maximum(0, np.einsum("ni,nij,nj->n", blocks.astype(np.float64), h, blocks.astype(np.float64)))
    reach = 6 * np.sqrt((1 + nu) * c.sum(axis=1))
    lost = np.sqrt(np.maximum(0, best + nu * size))
    scale = (np.sqrt(np.maximum(0, form - ROUNDING * size)) - lost) / np.where(reach > 0, reach, 1)
    assert (found.scales[found.code - 1] >= scale * (1 - ROUNDING)).all()


@pytest.mark.parametrize("name", [*NAMES, "huge", "tiny", "uneven-inputs"])
def test_hessian_bounds(name: str) -> None:
    h = normalised_hessian(HESSIANS[name](np.random.default_rng(1), make_problem((1, 512))))
    assert ((np.abs(h).max(axis=(1, 2)) >= 1) & (np.abs(h).max(axis=(1, 2)) < 2)).all()
    c, mu = hessian_bounds(h)
    wide = h.astype(np.float64)
    assert (c >= np.abs(wide).sum(axis=2)).all()
    assert ((c == 0) == ~wide.any(axis=2)).all()
    rest = wide - mu[:, None, None] * (c[:, :, None] * np.eye(16))
    scale = np.abs(wide).max(axis=(1, 2))
    assert (np.linalg.eigvalsh(rest)[:, 0] >= -ROUNDING * scale).all()


def test_a_hessian_optimum_far_above_absmax() -> None:
    """With a common factor the sum of the residuals counts most: a coarse scale can make it vanish."""
    rng = np.random.default_rng(0)
    blocks = rng.standard_normal((2000, 16)).astype(np.float32)
    hessian = HESSIANS["common-0.9"](rng, make_problem((1, 16)))
    found = search(blocks, hessian=hessian, hessian_of=np.zeros(2000, np.intp))
    absmax = np.abs(found.scales - np.abs(blocks).max(axis=1, keepdims=True) / 6).argmin(axis=1) + 1
    offset = found.code - absmax
    assert offset.max() > 8
    assert offset.min() < -3
