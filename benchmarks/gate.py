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


def oracle_codes(weight: npt.NDArray[Any], global_amax: np.float32) -> npt.NDArray[np.uint8]:
    """The oracle's codes for blocks of 16 along the last axis, on all cores: uint8 [n_blocks]."""
    blocks = weight.astype(np.float32).reshape(-1, 16)
    parts = np.array_split(blocks, max(1, len(blocks) // 8192))
    return np.concatenate(list(_processes().map(_codes, parts, [global_amax] * len(parts))))


@functools.cache
def _processes() -> ProcessPoolExecutor:
    """One a core, started once: each imports the program again."""
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"))


def _codes(blocks: npt.NDArray[np.float32], global_amax: np.float32) -> npt.NDArray[np.uint8]:
    return oracle.search(blocks, global_amax, 1)[0]


def require_equal(name: str, got: npt.NDArray[Any], expected: npt.NDArray[Any]) -> int:
    """The number of values compared, one a block where they are codes; SystemExit if any differs."""
    mismatches = int((got.reshape(-1) != expected.reshape(-1)).sum())
    if mismatches:
        raise SystemExit(f"{name}: {mismatches} of {expected.size} differ from the oracle's: not timed")
    return expected.size
