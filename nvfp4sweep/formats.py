"""The number formats of NVFP4, as data.

An NVFP4 weight is stored as E2M1 codes (4 bits) in blocks of 16, one FP8 E4M3 scale a block and one
float32 scale a tensor. E2M1 and E4M3 are the formats of the OCP Microscaling specification v1.0;
E4M3 is the "fn" variant: no infinities, 0x7f and 0xff are NaN.

Everything that depends on how a number is stored is written here once. NumPy only.
"""

import numpy as np
import numpy.typing as npt

BLOCK_SIZE = 16

#: The magnitudes of E2M1, indexed by the low three bits of the code. The fourth bit is the sign.
E2M1_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1_MAX = 6.0
#: Halfway between neighbouring magnitudes: |w| / scale at these points is equally far from both.
E2M1_MIDPOINTS = (E2M1_VALUES[:-1] + E2M1_VALUES[1:]) / 2
E2M1_SIGN_BIT = 8

#: The finite positive E4M3 values have the codes 1 .. 126; code 0 is zero and 127 is NaN.
MIN_CODE = 1
MAX_CODE = 126
CODES = np.arange(MIN_CODE, MAX_CODE + 1)
#: A normal E4M3 value's code, plus this, is the top of the bits of the same float32: bits >> 20.
E4M3_TO_FLOAT32 = 120 << 3


def _e4m3_value(code: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    exponent, mantissa = code >> 3, code & 7
    value: npt.NDArray[np.float64] = np.where(
        exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10)
    )
    return value


#: float64 [127], indexed by the E4M3 code. Entry 0 is 0 and never a candidate.
E4M3_VALUES = _e4m3_value(np.arange(MAX_CODE + 1))
E4M3_MAX = 448.0

#: The float32 scale of a tensor is its amax divided by this: the largest magnitude NVFP4 holds.
NVFP4_MAX = E2M1_MAX * E4M3_MAX

_RATIOS = E4M3_VALUES.astype(np.float32) / np.float32(E4M3_MAX)


def scale_candidates() -> npt.NDArray[np.float32]:
    """The 126 candidate ratios of a block's amax to the global amax.

    Returns:
        float32 [126]: the finite positive E4M3 values, ascending, each divided by 448 in float32.
        Entry k belongs to the E4M3 code k + 1.
    """
    return _RATIOS[MIN_CODE:].copy()


def amax_by_code(global_amax: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The block amax that each code stands for: float32(candidate * global_amax), [..., 127].

    Indexed by the E4M3 code; entry 0 is 0.
    """
    return _RATIOS * np.asarray(global_amax, dtype=np.float32)[..., None]


def scale_by_code(global_amax: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The scale of a block's E2M1 codes under each E4M3 code: float32(amax / 6), [..., 127]."""
    return amax_by_code(global_amax) / np.float32(E2M1_MAX)
