"""The cases that every engine must answer as the oracle does: one list, made from seeds.

`rows` scales a case: engines that run in an interpreter take few.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nvfp4sweep.problem import Problem, make_problem

Array = npt.NDArray[Any]
COLUMNS = 96
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).smallest_subnormal)


@dataclass(frozen=True)
class Case:
    """A weight and the arguments of the call."""

    name: str
    make: Callable[[np.random.Generator, int], Array]
    options: dict[str, Any] = field(default_factory=dict)

    def weight(self, rows: int) -> Array:
        return self.make(self.generator(), rows)

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(sum(self.name.encode()))

    def __str__(self) -> str:
        return self.name


def normal(rng: np.random.Generator, rows: int, columns: int = COLUMNS) -> Array:
    return rng.standard_normal((rows, columns)).astype(np.float32)


def scaled(factor: float) -> Callable[[np.random.Generator, int], Array]:
    return lambda rng, rows: (normal(rng, rows) * np.float32(factor)).astype(np.float32)


def from_levels(*levels: float) -> Callable[[np.random.Generator, int], Array]:
    """Signed draws from a few values: blocks that several scales represent equally well."""

    def make(rng: np.random.Generator, rows: int) -> Array:
        signs = rng.choice([-1.0, 1.0], size=(rows, COLUMNS))
        return (signs * rng.choice(levels, size=(rows, COLUMNS))).astype(np.float32)

    return make


def decades(rng: np.random.Generator, rows: int) -> Array:
    """Rows scaled over 12 decades."""
    exponents = np.linspace(-12, 0, rows)[:, None]
    return (normal(rng, rows) * 10.0**exponents).astype(np.float32)


def blocks_over_decades(rng: np.random.Generator, rows: int) -> Array:
    """Blocks from far below the smallest scale to the global amax: every E4M3 code is some block's."""
    factors = np.repeat(2.0 ** rng.uniform(-24, 0, (rows, COLUMNS // 16)), 16, axis=1)
    return (normal(rng, rows) * factors).astype(np.float32)


def sparse(rng: np.random.Generator, rows: int) -> Array:
    return normal(rng, rows) * (rng.random((rows, COLUMNS)) < 0.1)


def near_midpoints(rng: np.random.Generator, rows: int) -> Array:
    """Magnitudes one float32 step around E2M1 midpoints of an exact scale, with amax 6."""
    midpoints = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    w = rng.choice(midpoints, size=(rows, COLUMNS))
    w = np.nextafter(w, rng.choice(np.array([0.0, 9.0], np.float32), size=w.shape))
    w[:, ::16] = 6.0
    return w.astype(np.float32)


def with_zero_blocks(rng: np.random.Generator, rows: int) -> Array:
    w = normal(rng, rows).reshape(rows, -1, 16)
    w[rng.random(w.shape[:2]) < 0.5] = 0.0
    w[0, 0] = -0.0
    return w.reshape(rows, COLUMNS)


def one_large_element(rng: np.random.Generator, rows: int) -> Array:
    """One element a block dwarfs the rest: the clipping end of the window."""
    w = normal(rng, rows) * np.float32(0.05)
    w[:, ::16] = rng.uniform(0.3, 1.0, w[:, ::16].shape)
    return w.astype(np.float32)


def as_dtype(dtype: npt.DTypeLike) -> Callable[[np.random.Generator, int], Array]:
    return lambda rng, rows: normal(rng, rows).astype(dtype)


def float16_ends(rng: np.random.Generator, rows: int) -> Array:
    """float16's subnormals and its largest value."""
    w = (normal(rng, rows) * 2.0**-20).astype(np.float16)
    w[0, 0] = np.finfo(np.float16).max
    return w


CASES = [
    Case("normal", normal),
    Case("uniform", lambda rng, rows: rng.uniform(-1, 1, (rows, COLUMNS)).astype(np.float32)),
    Case("laplace", lambda rng, rows: rng.laplace(size=(rows, COLUMNS)).astype(np.float32)),
    Case("student-t", lambda rng, rows: rng.standard_t(4, (rows, COLUMNS)).astype(np.float32)),
    Case("rows-over-12-decades", decades),
    Case("blocks-over-decades", blocks_over_decades),
    Case("blocks-over-decades-min-code-8", blocks_over_decades, {"min_code": 8}),
    Case("float16", as_dtype(np.float16)),
    Case("float16-ends", float16_ends),
    Case("bfloat16", as_dtype(ml_dtypes.bfloat16)),
    Case("float64", as_dtype(np.float64)),
    Case("integers-power-of-two-amax", from_levels(0, 1, 2, 3, 4, 5, 6, 7), {"global_amax": 8.0}),
    Case("integers-amax-2688", from_levels(*range(0, 49)), {"global_amax": 2688.0}),
    Case("zero-error-optimum", from_levels(0, 0.5, 1, 1.5, 2, 3, 4, 6), {"global_amax": 2688.0}),
    Case("common-levels", from_levels(0, 1.5, 3, 6), {"global_amax": 5.25}),
    Case("common-levels-odd-amax", from_levels(0, 1.5, 3, 6), {"global_amax": 4.8125}),
    Case("near-midpoints", near_midpoints, {"global_amax": 2688.0}),
    Case("sparse", sparse),
    Case("sparse-bfloat16", lambda rng, rows: sparse(rng, rows).astype(ml_dtypes.bfloat16)),
    Case("one-large-element", one_large_element),
    Case("amax-below-half", normal, {"global_amax": 1.0}),
    Case("amax-far-below", normal, {"global_amax": 1e-6}),
    Case("amax-above", normal, {"global_amax": 100.0}),
    Case("amax-far-above", normal, {"global_amax": 1e5}),
    Case("amax-beyond-use", normal, {"global_amax": 1e9}),
    Case("amax-zero", normal, {"global_amax": 0.0}),
    Case("amax-subnormal", scaled(1e-37), {"global_amax": 1e-40}),
    Case("amax-largest", scaled(1e35), {"global_amax": FLOAT32_MAX}),
    Case("huge", scaled(6e37)),
    Case("tiny", scaled(1e-36)),
    Case("squares-overflow", scaled(2.0**63)),
    Case("squares-overflow-amax-above", scaled(2.0**63), {"global_amax": 2.0**68}),
    Case("squares-overflow-amax-below", scaled(2.0**63), {"global_amax": 2.0**61}),
    Case("squares-underflow", scaled(2.0**-62)),
    Case("squares-underflow-amax-below", scaled(2.0**-62), {"global_amax": 2.0**-66}),
    Case("slope-overflow-amax-below", scaled(2.0**-46), {"global_amax": 2.0**-51}),
    Case("slope-overflow", scaled(2.0**-54)),
    Case("subnormal", scaled(1e-41)),
    Case("smallest-subnormal", from_levels(0, FLOAT32_TINY, 3 * FLOAT32_TINY)),
    Case("zero-blocks", with_zero_blocks),
    Case("all-zero", lambda rng, rows: np.zeros((rows, COLUMNS), np.float32)),
    Case("one-block", lambda rng, rows: normal(rng, 1, 16)),
    Case("no-blocks", lambda rng, rows: np.zeros((0, 32), np.float32)),
    Case("no-columns", lambda rng, rows: np.zeros((3, 0), np.float32)),
    Case("one-dimension", lambda rng, rows: normal(rng, rows).reshape(-1)),
    Case("min-code-1", blocks_over_decades, {"min_code": 1}),
    Case("min-code-100", normal, {"min_code": 100}),
    Case("min-code-126", normal, {"min_code": 126}),
    Case("block-32", normal, {"block_size": 32}),
    Case("block-32-over-decades", blocks_over_decades, {"block_size": 32}),
    Case("block-8", normal, {"block_size": 8}),
    Case("block-3", normal, {"block_size": 3}),
    Case("block-1", lambda rng, rows: normal(rng, max(1, rows // 8)), {"block_size": 1}),
    Case("block-96", normal, {"block_size": 96}),
    Case("axis-0", lambda rng, rows: normal(rng, COLUMNS, rows + 3), {"axis": 0}),
    Case("axis-0-block-32", lambda rng, rows: normal(rng, COLUMNS, rows), {"axis": 0, "block_size": 32}),
    Case("axis-0-bfloat16", lambda rng, rows: as_dtype(ml_dtypes.bfloat16)(rng, rows).T, {"axis": 0}),
    Case("middle-axis", lambda rng, rows: normal(rng, rows).reshape(-1, 16, 3), {"axis": 1}),
    Case("transposed", lambda rng, rows: normal(rng, COLUMNS, 2 * rows).T),
    Case("strided", lambda rng, rows: normal(rng, 2 * rows, 2 * COLUMNS)[::2, 16:-16:2][:, :80]),
    Case("experts", lambda rng, rows: normal(rng, rows).reshape(2, -1, COLUMNS), {"batch_dims": 1}),
    Case(
        "experts-given-amax",
        lambda rng, rows: normal(rng, rows).reshape(2, -1, COLUMNS),
        {"batch_dims": 1, "global_amax": np.array([3.0, 0.7], np.float32)},
    ),
    Case(
        "experts-axis-1",
        lambda rng, rows: normal(rng, rows).reshape(2, -1, COLUMNS).swapaxes(1, 2),
        {"batch_dims": 1, "axis": 1},
    ),
    Case("two-batch-axes", lambda rng, rows: normal(rng, rows).reshape(2, 1, -1, COLUMNS), {"batch_dims": 2}),
]


# --- importances and Hessians ---------------------------------------------------------------------


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
