"""The cases with an importance or a hessian: weights of tests/cases.py times weights of their errors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from cases import CASES, FLOAT32_MAX, Array, Case

from nvfp4sweep.problem import Problem, make_problem


@dataclass(frozen=True)
class ObjectiveCase:
    """A case with the weights of its errors: `make` gives an importance or a hessian for a problem."""

    weights: Case
    name: str
    make: Callable[[np.random.Generator, Problem], Array]
    argument: str

    def weight(self, rows: int) -> Array:
        return self.weights.weight(rows)

    def options(self, rows: int) -> dict[str, Any]:
        """All arguments of the call: NumPy arrays and numbers."""
        options = self.weights.options
        shaping = {k: v for k, v in options.items() if k in ("axis", "block_size", "batch_dims")}
        problem = make_problem(self.weight(rows).shape, **shaping)
        rng = np.random.default_rng(sum(str(self).encode()))
        return {**options, self.argument: self.make(rng, problem)}

    def __str__(self) -> str:
        return f"{self.weights.name}/{self.name}"


def per_input(
    values: Callable[[np.random.Generator, int], Array],
) -> Callable[[np.random.Generator, Problem], Array]:
    """One importance an input: [K] for the last axis, [K, 1] for the one before it."""

    def make(rng: np.random.Generator, problem: Problem) -> Array:
        length = problem.shape[problem.axis]
        return values(rng, length).reshape(length, *(1,) * (len(problem.shape) - 1 - problem.axis))

    return make


def lognormal(sigma: float) -> Callable[[np.random.Generator, int], Array]:
    return lambda rng, length: rng.lognormal(0, sigma, length).astype(np.float32)


def with_zeros(rng: np.random.Generator, length: int) -> Array:
    """Whole blocks and single inputs that do not count."""
    h = lognormal(1)(rng, length)
    h[rng.random(length) < 0.3] = 0
    h[: 16 if length > 16 else 0] = 0
    return h


def one_hot(rng: np.random.Generator, length: int) -> Array:
    h = np.zeros(length, np.float32)
    h[np.arange(0, length, 16) + rng.integers(0, 16, len(h[::16]))] = 3
    return h


def twelve_decades(rng: np.random.Generator, length: int) -> Array:
    return (10.0 ** rng.uniform(-12, 0, length)).astype(np.float32)


def all_of_float32(rng: np.random.Generator, length: int) -> Array:
    """From the least subnormal to the largest, within each block."""
    h = np.ldexp(rng.uniform(1, 2, length), rng.integers(-149, 127, length)).astype(np.float32)
    h[::16] = FLOAT32_MAX
    return h


def full(rng: np.random.Generator, problem: Problem) -> Array:
    """As large as the weight, and in another dtype."""
    return rng.lognormal(0, 1, problem.shape).astype(ml_dtypes.bfloat16)


def per_matrix(rng: np.random.Generator, problem: Problem) -> Array:
    """Experts: one an input and matrix."""
    shape = [1] * len(problem.shape)
    shape[problem.axis] = problem.shape[problem.axis]
    shape[: problem.batch_dims] = problem.batch_shape
    return rng.lognormal(0, 1, shape).astype(np.float32)


IMPORTANCES: dict[str, Callable[[np.random.Generator, Problem], Array]] = {
    "ones": per_input(lambda rng, length: np.ones(length, np.float32)),
    "lognormal-1": per_input(lognormal(1)),
    "lognormal-2": per_input(lognormal(2)),
    "lognormal-3": per_input(lognormal(3)),
    "float64": per_input(lambda rng, length: rng.lognormal(0, 1, length)),
    "huge": per_input(lambda rng, length: (rng.lognormal(0, 1, length) * 1e36).astype(np.float32)),
    "tiny": per_input(lambda rng, length: (rng.lognormal(0, 1, length) * 1e-43).astype(np.float32)),
    "powers-of-two": per_input(lambda rng, length: np.exp2(rng.integers(-20, 20, length)).astype(np.float32)),
    "zeros": per_input(with_zeros),
    "one-hot": per_input(one_hot),
    "all-zero": per_input(lambda rng, length: np.zeros(length, np.float32)),
    "twelve-decades": per_input(twelve_decades),
    "all-of-float32": per_input(all_of_float32),
    "scalar": lambda rng, problem: np.array(0.7, np.float32),
    "full": full,
    "per-matrix": per_matrix,
}


def tokens(count: int) -> Callable[[np.random.Generator, Problem], Array]:
    """The second moments of Gaussian activations: singular if there are fewer tokens than inputs."""

    def make(rng: np.random.Generator, problem: Problem) -> Array:
        blocks = problem.hessian_shape[-3]
        x = rng.standard_normal((blocks, count, 16)) * rng.lognormal(0, 0.5, (blocks, 1, 16))
        return (x.swapaxes(1, 2) @ x / count).astype(np.float32)

    return make


def common_factor(rho: float, scale: float = 1.0) -> Callable[[np.random.Generator, Problem], Array]:
    one = np.float32(scale) * ((1 - rho) * np.eye(16) + rho)
    return lambda rng, problem: np.tile(one.astype(np.float32), (problem.hessian_shape[-3], 1, 1))


def diagonal(rng: np.random.Generator, problem: Problem) -> Array:
    h = rng.lognormal(0, 1, problem.hessian_shape[-3:-1]).astype(np.float32)
    return h[:, :, None] * np.eye(16, dtype=np.float32)


def diagonal_of_all_of_float32(rng: np.random.Generator, problem: Problem) -> Array:
    """Terms so far apart that pairs of float64 hold few of them."""
    blocks = problem.hessian_shape[-3]
    return all_of_float32(rng, 16 * blocks).reshape(blocks, 16, 1) * np.eye(16, dtype=np.float32)


def integer_forms(rng: np.random.Generator, problem: Problem) -> Array:
    """A^T A of small integers: quadratic forms that tie."""
    a = rng.integers(-1, 2, (problem.hessian_shape[-3], 16, 16))
    return (a.swapaxes(1, 2) @ a).astype(np.float32)


def zero_blocks(rng: np.random.Generator, problem: Problem) -> Array:
    h = tokens(64)(rng, problem)
    h[::2] = 0
    return h


def dead_inputs(rng: np.random.Generator, problem: Problem) -> Array:
    h = tokens(64)(rng, problem)
    h[:, ::3] = 0
    h[:, :, ::3] = 0
    return h


def uneven_inputs(rng: np.random.Generator, problem: Problem) -> Array:
    """Inputs over 40 decades: what float32 cannot hold once the largest is 1."""
    scale = (10.0 ** rng.uniform(-20, 0, (problem.hessian_shape[-3], 16))).astype(np.float32)
    h = tokens(64)(rng, problem)
    return h * scale[:, :, None] * scale[:, None, :]


def stacked(rng: np.random.Generator, problem: Problem) -> Array:
    return rng.lognormal(0, 1, problem.hessian_shape[:-2])[..., None, None] * tokens(32)(rng, problem)


HESSIANS: dict[str, Callable[[np.random.Generator, Problem], Array]] = {
    "identity": common_factor(0),
    "diagonal": diagonal,
    "all-of-float32": diagonal_of_all_of_float32,
    "common-0.5": common_factor(0.5),
    "common-0.9": common_factor(0.9),
    "all-ones": common_factor(1),
    "huge": common_factor(0.5, 1e38),
    "tiny": common_factor(0.5, 1e-43),
    "rank-1": tokens(1),
    "512-tokens": tokens(512),
    "5-tokens": tokens(5),
    "integers": integer_forms,
    "zero-blocks": zero_blocks,
    "dead-inputs": dead_inputs,
    "uneven-inputs": uneven_inputs,
    "stacked": stacked,
}

_BY_NAME = {case.name: case for case in CASES}
#: Every weight with one importance, and with one Hessian where its blocks are of 16.
_IMPORTANCE_OF = {"experts": "per-matrix", "experts-axis-1": "per-matrix", "two-batch-axes": "per-matrix"}
_HESSIAN_OF = {"experts": "stacked", "experts-axis-1": "stacked", "two-batch-axes": "stacked"}
_MORE_IMPORTANCES = {
    "normal": [name for name in IMPORTANCES if name != "lognormal-2"],
    "common-levels": ["ones", "one-hot", "zeros", "powers-of-two", "twelve-decades", "all-of-float32"],
    "integers-power-of-two-amax": ["ones", "powers-of-two", "lognormal-3", "all-of-float32"],
    "blocks-over-decades": ["lognormal-3", "twelve-decades"],
    "one-large-element": ["lognormal-3", "twelve-decades"],
    "sparse": ["zeros", "one-hot"],
    "axis-0": ["full", "scalar"],
    "middle-axis": ["full"],
    "block-3": ["full"],
    "experts": ["full", "lognormal-1"],
}
_MORE_HESSIANS = {
    "normal": [name for name in HESSIANS if name not in ("common-0.5", "stacked")],
    "common-levels": ["identity", "all-ones", "integers", "512-tokens", "rank-1"],
    "integers-power-of-two-amax": ["identity", "all-ones", "integers", "rank-1"],
    "zero-error-optimum": ["integers", "rank-1"],
    "near-midpoints": ["rank-1", "common-0.9"],
    "blocks-over-decades": ["rank-1", "512-tokens"],
    "one-large-element": ["common-0.9", "5-tokens"],
    "squares-overflow": ["diagonal", "rank-1"],
    "slope-overflow": ["diagonal", "rank-1"],
    "zero-blocks": ["rank-1", "zero-blocks"],
    "axis-0": ["dead-inputs", "5-tokens"],
    "experts": ["512-tokens", "zero-blocks"],
}


def _with(argument: str, case: str, name: str) -> ObjectiveCase:
    make = (IMPORTANCES if argument == "importance" else HESSIANS)[name]
    return ObjectiveCase(_BY_NAME[case], f"{argument}-{name}", make, argument)


OBJECTIVE_CASES = [
    *(_with("importance", case, _IMPORTANCE_OF.get(case, "lognormal-2")) for case in _BY_NAME),
    *(_with("importance", case, name) for case, names in _MORE_IMPORTANCES.items() for name in names),
    *(
        _with("hessian", case.name, _HESSIAN_OF.get(case.name, "common-0.5"))
        for case in CASES
        if case.options.get("block_size", 16) == 16
    ),
    *(_with("hessian", case, name) for case, names in _MORE_HESSIANS.items() for name in names),
]
