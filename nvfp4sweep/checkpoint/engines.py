"""What searches a matrix of a checkpoint."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import nvfp4sweep

Array = npt.NDArray[Any]


class Packed(NamedTuple):
    """A matrix in NVFP4, on the host.

    Attributes:
        packed: uint8 [N, K / 2].
        scale: float8_e4m3fn [N, K / 16], or its bytes.
        global_scale: the multiplier, float32 [].
    """

    packed: Array
    scale: Array
    global_scale: Array


#: (finite matrix [N, K], global amax, importance [K] or None, min_code) -> Packed
Engine = Callable[[Array, np.float32, Array | None, int], Packed]


def numpy_engine(matrix: Array, amax: np.float32, importance: Array | None, min_code: int) -> Packed:
    found = nvfp4sweep.quantize(matrix, global_amax=amax, importance=importance, min_code=min_code)
    return Packed(found.packed, found.scale, np.asarray(found.global_scale))
