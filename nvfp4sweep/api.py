"""The public functions for NumPy arrays: they check, choose an engine and hand over one matrix at a time."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nvfp4sweep import formats, objectives, oracle, packing, problem
from nvfp4sweep.packing import QuantizedTensor
from nvfp4sweep.problem import Problem

_SERVED = ("oracle", "cpu")
_NUMPY_ARRAY = "a NumPy array"


class Sweep(NamedTuple):
    """What a sweep finds for every block, in the weight's shape with `axis` divided by block_size.

    Attributes:
        amax: float32; the block scale times 6: what calibrate returns.
        code: uint8; the byte of the E4M3 scale, 1 .. 126.
        error: float32; what was minimised, at that scale; inf beyond float32's range.
        global_amax: float32; the amax that the scales refer to, of the batch axes' shape.
    """

    amax: Any
    code: Any
    error: Any
    global_amax: Any


def calibrate(
    weight: npt.NDArray[Any],
    *,
    global_amax: npt.ArrayLike | None = None,
    axis: int = -1,
    block_size: int = formats.BLOCK_SIZE,
    batch_dims: int = 0,
    importance: npt.ArrayLike | None = None,
    hessian: npt.ArrayLike | None = None,
    min_code: int = formats.MIN_CODE,
    check_finite: bool = True,
    implementation: str | None = None,
) -> npt.NDArray[np.float32]:
    """The amax of every block whose NVFP4 scale gives the least squared error, exactly.

    For each block the answer is the lowest E4M3 code k >= min_code that minimises, in real
    arithmetic, sum_i h_i min_q (|w_i| - q s[k])^2 over the E2M1 points q, where amax[k] =
    float32(candidate[k] * global_amax), s[k] = float32(amax[k] / 6), and h_i = 1 without an importance.

    Args:
        weight: float32, float16 or bfloat16 (ml_dtypes) array; float64 is rounded to float32 first.
            It is neither changed nor copied whole, unless its axes cannot be merged by a view.
        global_amax: the amax that all scales refer to: a scalar, or an array that broadcasts over
            the leading `batch_dims` axes. None takes the weight's own, one for each matrix.
            Weights that are fused at inference must share theirs: see `nvfp4sweep.global_amax`.
        axis: the axis along which blocks run: the input axis of a linear layer. -1 for [out, in],
            0 for [in, out].
        block_size: elements in a block; it must divide the axis. 16 is NVFP4.
        batch_dims: leading axes that stack matrices, each with a global amax of its own
            (1 for experts [E, N, K]).
        importance: weights h >= 0 of the squared residuals, of any real dtype (taken as float32), in a
            shape that broadcasts to the weight's: one an input, [K], is that of a linear layer's
            activations, the mean of x^2. Where all of a block's are 0 they count as ones.
        hessian: minimise r^T H r instead, r the signed residuals of a block of 16: symmetric positive
            semidefinite matrices [K / 16, 16, 16] along `axis`, shared by all that lies along the other
            axes, or [E, K / 16, 16, 16] for stacked matrices. Taken as float32; the mean of a matrix and
            its transpose counts. Blocks whose Hessian is all zeros minimise the plain squared error.
        min_code: the lowest E4M3 code that may be chosen, 1 .. 126. 8 avoids subnormal scales,
            which some kernels flush to zero.
        check_finite: raise if an element is NaN or infinite, or an importance or a hessian is not what
            it must be. Without the check such values give meaningless results.
        implementation: "cpu" (default) or "oracle", the definition, which is far slower. The
            environment variable NVFP4SWEEP_IMPLEMENTATION overrides None.

    Returns:
        float32, the weight's shape with `axis` divided by `block_size`. All-zero blocks take the
        lowest code; where the global amax is 0 every block amax is 0.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: NaN or infinity in the weight, naming the first index; a negative or non-finite
            global_amax or one of the wrong shape; an importance that is negative, not finite or of the
            wrong shape; a hessian that is not finite, not symmetric or not positive semidefinite (beyond
            rounding), of the wrong shape, with another block_size than 16, or beside an importance; an axis
            that block_size does not divide; anything out of range; an implementation that is unknown or
            cannot serve NumPy arrays.

    Warns:
        ZeroHessianWarning: blocks of the hessian are all zeros, as for an expert that was never routed.

    Source:
        The search over all E4M3 scales is that of NVIDIA ModelOpt's pull request 1387; why a few
        candidates suffice is proven in nvfp4sweep/window.py.
    """
    task = _prepare(
        weight, global_amax, axis, block_size, batch_dims, importance, hessian, min_code, check_finite,
        implementation,
    )  # fmt: skip
    amax = np.empty(task.problem.block_shape, np.float32)
    task.run(amax=amax)
    return amax


def sweep(
    weight: npt.NDArray[Any],
    *,
    global_amax: npt.ArrayLike | None = None,
    axis: int = -1,
    block_size: int = formats.BLOCK_SIZE,
    batch_dims: int = 0,
    importance: npt.ArrayLike | None = None,
    hessian: npt.ArrayLike | None = None,
    min_code: int = formats.MIN_CODE,
    check_finite: bool = True,
    implementation: str | None = None,
) -> Sweep:
    """As `calibrate`, and also each block's E4M3 code, its error and the global amax.

    Returns:
        Sweep(amax, code, error, global_amax).
    """
    task = _prepare(
        weight, global_amax, axis, block_size, batch_dims, importance, hessian, min_code, check_finite,
        implementation,
    )  # fmt: skip
    shape = task.problem.block_shape
    result = Sweep(
        np.empty(shape, np.float32),
        np.empty(shape, np.uint8),
        np.empty(shape, np.float32),
        task.global_amax.reshape(task.problem.batch_shape),
    )
    task.run(amax=result.amax, code=result.code, error=result.error)
    return result


def quantize(
    weight: npt.NDArray[Any],
    *,
    global_amax: npt.ArrayLike | None = None,
    axis: int = -1,
    block_size: int = formats.BLOCK_SIZE,
    batch_dims: int = 0,
    importance: npt.ArrayLike | None = None,
    hessian: npt.ArrayLike | None = None,
    min_code: int = formats.MIN_CODE,
    check_finite: bool = True,
    implementation: str | None = None,
) -> QuantizedTensor:
    """The weight in NVFP4 under the scales that `calibrate` finds; the same arguments and errors.

    Returns:
        QuantizedTensor(packed, scale, global_scale), with .dequantize(dtype). `block_size` must be
        even, so that the two codes of a byte share a block.
    """
    task = _prepare(
        weight, global_amax, axis, block_size, batch_dims, importance, hessian, min_code, check_finite,
        implementation,
    )  # fmt: skip
    problem.check_packable(task.problem)
    code = np.empty(task.problem.block_shape, np.uint8)
    packed = np.empty(task.problem.packed_shape, np.uint8)
    task.run(code=code)
    task.pack(code, packed)
    return QuantizedTensor(
        packed,
        packing.scale_bytes(code),
        packing.global_scale(task.global_amax.reshape(task.problem.batch_shape)),
        task.problem.axis,
        task.problem.block_size,
    )


def global_amax(*weights: npt.NDArray[Any], batch_dims: int = 0) -> npt.NDArray[np.float32]:
    """The amax that weights fused at inference share: the largest |w| over all of them.

    Args:
        weights: arrays as `calibrate` takes them, with the same leading `batch_dims` axes.
        batch_dims: leading axes that stack matrices, each with an amax of its own.

    Returns:
        float32 of the batch axes' shape: [] for batch_dims=0.

    Raises:
        TypeError, ValueError: as `calibrate`; ValueError also for no weights or unequal batch axes.
    """
    if not weights:
        raise ValueError("weights is empty: global_amax needs at least one array")
    from nvfp4sweep import cpu

    amaxes = []
    for weight in weights:
        array = _as_weight(weight)
        asked = problem.make_problem(array.shape, block_size=1, batch_dims=batch_dims)
        view = array.reshape(asked.view_shape)
        amax = np.array([cpu.absolute_maximum(matrix) for matrix in view], np.float32)
        if not np.isfinite(amax).all():
            raise _nonfinite(array)
        amaxes.append(amax.reshape(asked.batch_shape))
    problem.check_same_batch([amax.shape for amax in amaxes], batch_dims)
    return np.asarray(np.max(np.stack(amaxes), axis=0))


class _Task(NamedTuple):
    """A checked problem with its weight as [matrices, outer, length, inner] and its engine."""

    problem: Problem
    weight: npt.NDArray[Any]
    view: npt.NDArray[Any]
    global_amax: npt.NDArray[np.float32]
    importance: npt.NDArray[np.float32] | None  # [matrices, outer, length, inner]
    hessian: npt.NDArray[np.float32] | None  # [matrices, blocks, 16, 16]
    check_finite: bool
    engine: Any

    def run(
        self,
        amax: npt.NDArray[np.float32] | None = None,
        code: npt.NDArray[np.uint8] | None = None,
        error: npt.NDArray[np.float32] | None = None,
    ) -> None:
        outputs = [None if o is None else self._by_matrix(o) for o in (amax, code, error)]
        for i, matrix in enumerate(self.view):
            largest = self.engine.sweep_matrix(
                matrix,
                self.global_amax[i],
                self.problem.block_size,
                self.problem.min_code,
                *(None if o is None else o[i] for o in outputs),
                importance=None if self.importance is None else self.importance[i],
                hessian=None if self.hessian is None else self.hessian[i],
            )
            if self.check_finite and not np.isfinite(largest):
                raise _nonfinite(self.weight)

    def _by_matrix(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        matrices = len(self.view)
        return array.reshape(matrices, array.size // max(1, matrices))

    def pack(self, code: npt.NDArray[np.uint8], packed: npt.NDArray[np.uint8]) -> None:
        codes, outputs = self._by_matrix(code), self._by_matrix(packed)
        for i, matrix in enumerate(self.view):
            self.engine.pack_matrix(
                matrix, self.global_amax[i], self.problem.block_size, codes[i], outputs[i]
            )


def _prepare(
    weight: Any,
    given_amax: npt.ArrayLike | None,
    axis: int,
    block_size: int,
    batch_dims: int,
    importance: npt.ArrayLike | None,
    hessian: npt.ArrayLike | None,
    min_code: int,
    check_finite: bool,
    implementation: str | None,
) -> _Task:
    array = _as_weight(weight)
    asked = problem.make_problem(
        array.shape, axis=axis, block_size=block_size, batch_dims=batch_dims, min_code=min_code,
        importance=importance, hessian=hessian,
    )  # fmt: skip
    name = problem.choose_engine(implementation, default="cpu", served=_SERVED, where=_NUMPY_ARRAY)
    engine: Any = oracle
    if name == "cpu":
        from nvfp4sweep import cpu

        engine = cpu
    view = array.reshape(asked.view_shape)
    if given_amax is not None:
        amax = problem.global_amax_per_matrix(given_amax, asked)
    else:
        amax = np.array([engine.absolute_maximum(matrix) for matrix in view], np.float32)
        if check_finite and not np.isfinite(amax).all():
            raise _nonfinite(array)
    weights = (
        None if importance is None else objectives.importance_view(importance, asked, check=check_finite)
    )
    blocks = None if hessian is None else objectives.hessian_per_matrix(hessian, asked, check=check_finite)
    return _Task(asked, array, view, amax, weights, blocks, check_finite, engine)


def _as_weight(weight: Any) -> npt.NDArray[Any]:
    if not isinstance(weight, np.ndarray):
        raise problem.foreign_array_error("weight", weight, _NUMPY_ARRAY)
    problem.check_dtype("weight", weight.dtype.name)
    if not weight.dtype.isnative:
        raise TypeError(
            f"weight has dtype {weight.dtype.str}, which is not in this machine's byte order: "
            f"convert it with weight.astype(weight.dtype.newbyteorder('='))"
        )
    if weight.dtype == np.float64:
        with np.errstate(over="ignore"):
            return weight.astype(np.float32)
    return np.asarray(weight)


def _nonfinite(weight: npt.NDArray[Any]) -> ValueError:
    index = [int(i) for i in np.unravel_index(np.argmin(np.isfinite(weight)), weight.shape)]
    return problem.nonfinite_error("weight", index, weight[tuple(index)])
