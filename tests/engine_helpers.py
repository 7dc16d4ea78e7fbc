"""What tests of engines share: bitwise comparison, and blocks that are hard for any of them."""

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nvfp4sweep import formats


def assert_same(got: Any, expected: Any, what: str) -> None:
    """Equal bit for bit, dtype and shape included: a NaN fails unless it is expected."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), what
    bits = np.dtype(f"u{got.itemsize}")
    different = got.view(bits) != expected.view(bits)
    assert not different.any(), f"{what}: {different.sum()} of {different.size} differ"


_SCALES = formats.scale_by_code(np.float32(1)).astype(np.float64)


@st.composite
def adversarial_blocks(draw: st.DrawFn, count: int = 2) -> tuple[Any, float]:
    """Blocks on and next to the grid of some scale of a global amax, where scales tie or nearly do."""
    amax = draw(st.sampled_from([1.0, 3.0, 5.25, 4.8125, 7.0, 2688.0, 1e-3, 3.7e4]))
    codes = draw(arrays.arrays(np.uint8, (count, 1), elements=st.integers(9, 126)))
    scale = np.float64(amax) * _SCALES[codes]
    points = st.sampled_from([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7.9375])
    w = draw(arrays.arrays(np.float64, (count, 16), elements=points)) * scale
    nudges = draw(arrays.arrays(np.int8, (count, 16), elements=st.sampled_from([0, 0, 0, 1, -1])))
    w32 = w.astype(np.float32)
    towards = np.where(nudges > 0, np.float32(np.inf), np.float32(0))
    return np.where(nudges == 0, w32, np.nextafter(w32, towards)), amax
