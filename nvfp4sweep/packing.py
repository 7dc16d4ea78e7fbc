"""From chosen scales to stored bytes, and back: the E2M1 codes of a weight, two a byte."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nvfp4sweep.formats import E2M1_MIDPOINTS, E2M1_SIGN_BIT, E2M1_VALUES, NVFP4_MAX


@dataclass(frozen=True)
class QuantizedTensor:
    """An NVFP4 tensor: value = E2M1 value * (block scale * global scale).

    Attributes:
        packed: uint8, the weight's shape with `axis` halved. The low nibble is the even index.
        scale: float8_e4m3fn, the weight's shape with `axis` divided by `block_size`.
        global_scale: float32, one for each matrix (shape of the batch axes): global amax / 2688.
        axis: the axis along which blocks run, >= 0.
        block_size: elements in a block.
    """

    packed: npt.NDArray[np.uint8]
    scale: npt.NDArray[Any]
    global_scale: npt.NDArray[np.float32]
    axis: int
    block_size: int

    def dequantize(self, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """The weight that a runtime computes with: products in float32, then rounded to `dtype`."""
        values = _SIGNED_VALUES[np.stack([self.packed & 15, self.packed >> 4], axis=self.axis + 1)]
        shape = list(self.packed.shape)
        shape[self.axis] *= 2
        values = values.reshape(shape)
        global_scale = self.global_scale.reshape(
            self.global_scale.shape + (1,) * (self.scale.ndim - self.global_scale.ndim)
        )
        scale = self.scale.astype(np.float32) * global_scale
        return (values * np.repeat(scale, self.block_size, axis=self.axis)).astype(dtype)


_SIGNED_VALUES = np.concatenate([E2M1_VALUES, -E2M1_VALUES]).astype(np.float32)


def scale_bytes(code: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """E4M3 codes as the float8_e4m3fn array they are, without a copy."""
    return code.view(ml_dtypes.float8_e4m3fn)


def global_scale(global_amax: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The float32 multiplier that a checkpoint stores: amax / 2688."""
    return np.asarray(global_amax / np.float32(NVFP4_MAX))


def encode(weight: npt.NDArray[Any], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """E2M1 codes 0 .. 15 of `weight` under `scale`, which broadcasts to it.

    The nearest point, ties to the even code; the sign bit is the weight's, on zeros too. A scale of
    zero gives zeros. Exact: a midpoint times a float32 scale is a float64.
    """
    magnitude = np.abs(weight.astype(np.float64))
    scale64 = scale.astype(np.float64)
    code = np.zeros(weight.shape, np.uint8)
    for step, midpoint in enumerate(E2M1_MIDPOINTS):
        edge = midpoint * scale64
        code += magnitude >= edge if step % 2 else magnitude > edge
    code *= scale64 > 0
    code |= np.signbit(weight) * np.uint8(E2M1_SIGN_BIT)
    return code


def pack(code: npt.NDArray[np.uint8], axis: int) -> npt.NDArray[np.uint8]:
    """Two codes a byte along `axis`: the even index in the low nibble."""
    even, odd = (np.moveaxis(code, axis, -1)[..., i::2] for i in (0, 1))
    packed: npt.NDArray[np.uint8] = np.moveaxis(even | odd << np.uint8(4), -1, axis)
    return packed
