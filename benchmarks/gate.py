"""Nothing is timed before it is right: the oracle's codes for every block of the weight to be timed."""

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from nvfp4sweep import oracle

SHAPE = (8192, 4096)


def gaussian(dtype: npt.DTypeLike = np.float32, shape: tuple[int, int] = SHAPE) -> npt.NDArray[Any]:
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)


def oracle_codes(
    weight: npt.NDArray[Any],
    global_amax: np.float32,
    importance: npt.NDArray[np.float32] | None = None,
    hessian: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.uint8]:
    """The oracle's codes for blocks of 16 along the last axis, on all cores: uint8 [n_blocks].

    importance has one value an input, hessian one matrix a block of inputs.
    """
    rows = weight.astype(np.float32).reshape(-1, weight.shape[-1])
    parts = np.array_split(rows, max(1, min(len(rows), rows.size // (16 * 8192))))
    n = len(parts)
    found = _processes().map(_codes, parts, [global_amax] * n, [importance] * n, [hessian] * n)
    return np.concatenate(list(found))


@functools.cache
def _processes() -> ProcessPoolExecutor:
    """One a core, started once: each imports the program again."""
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"))


def _codes(
    rows: npt.NDArray[np.float32],
    global_amax: np.float32,
    importance: npt.NDArray[np.float32] | None,
    hessian: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.uint8]:
    code = np.empty(rows.size // 16, np.uint8)
    matrix = rows[:, :, None]
    if importance is not None:
        importance = np.broadcast_to(importance[:, None], matrix.shape)
    oracle.sweep_matrix(matrix, global_amax, 16, 1, code=code, importance=importance, hessian=hessian)
    return code


def require_equal(name: str, got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> int:
    """The number of values compared, one a block where they are codes; SystemExit if any differs."""
    mismatches = int((got.reshape(-1) != expected.reshape(-1)).sum())
    if mismatches:
        raise SystemExit(f"{name}: {mismatches} of {expected.size} differ from the oracle's: not timed")
    return expected.size
