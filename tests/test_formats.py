"""The formats against ml_dtypes, exhaustively, and the packed bytes against an independent rounding."""

import ml_dtypes
import numpy as np
import pytest

import nvfp4sweep
from nvfp4sweep import formats, packing


def test_e4m3_values_are_those_of_ml_dtypes() -> None:
    codes = np.arange(127, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(formats.E4M3_VALUES, expected)


def test_e2m1_values_are_those_of_ml_dtypes() -> None:
    codes = np.arange(8, dtype=np.uint8)
    np.testing.assert_array_equal(formats.E2M1_VALUES, codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64))


def test_scale_candidates() -> None:
    candidates = nvfp4sweep.scale_candidates()
    assert candidates.shape == (126,)
    assert candidates.dtype == np.float32
    assert candidates[-1] == 1
    assert (np.diff(candidates) > 0).all()
    candidates[0] = 5  # a copy: the constant must not change
    assert nvfp4sweep.scale_candidates()[0] == np.float32(2**-9) / np.float32(448)


@pytest.mark.parametrize("amax", [1.0, 5.25, 3.4e38, 1e-30, 1e-42])
def test_amax_and_scale_are_rounded_as_published(amax: float) -> None:
    g = np.float32(amax)
    for code in range(1, 127):
        candidate = np.float32(np.float32(formats.E4M3_VALUES[code]) / np.float32(448))
        assert formats.amax_by_code(g)[code] == candidate * g
        assert formats.scale_by_code(g)[code] == np.float32(candidate * g) / np.float32(6)


def test_encode_rounds_to_nearest_even_as_ml_dtypes() -> None:
    """A fine grid with every midpoint, both signs, at scale 1 and at a scale that is no power of two."""
    w = np.arange(-7 * 64, 7 * 64 + 1) / 64
    expected = np.clip(w, -6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    for scale in (np.float32(1), np.float32(1.375)):
        np.testing.assert_array_equal(packing.encode(w * scale, scale), expected)


def test_pack_puts_the_even_index_in_the_low_nibble() -> None:
    codes = np.arange(8, dtype=np.uint8).reshape(2, 4)
    np.testing.assert_array_equal(packing.pack(codes, 1), [[0x10, 0x32], [0x54, 0x76]])
    np.testing.assert_array_equal(packing.pack(codes, 0), [[0x40, 0x51, 0x62, 0x73]])


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dequantize(axis: int, dtype: type) -> None:
    weight = np.random.default_rng(1).standard_normal((32, 48)).astype(np.float32)
    q = nvfp4sweep.quantize(weight, axis=axis)
    found = nvfp4sweep.sweep(weight, axis=axis)
    assert q.scale.dtype == ml_dtypes.float8_e4m3fn
    assert q.global_scale == found.global_amax / np.float32(2688)

    blocks = np.moveaxis(weight, axis, -1).reshape(-1, 16).astype(np.float64)
    scale = q.scale.astype(np.float32) * q.global_scale
    scale = np.moveaxis(scale, axis, -1).reshape(-1, 1)
    exact = np.moveaxis(found.amax / np.float32(6), axis, -1).reshape(-1, 1).astype(np.float64)
    grid = np.concatenate([formats.E2M1_VALUES, -formats.E2M1_VALUES])
    nearest = grid[np.abs(blocks[..., None] - grid * exact[..., None]).argmin(-1)]
    expected = (nearest.astype(np.float32) * scale).astype(dtype)
    got = np.moveaxis(q.dequantize(dtype), axis, -1).reshape(-1, 16)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected)


def test_dequantized_error_is_the_reported_error() -> None:
    """Runtimes round the scale once more, so the two agree to float32, not to the bit."""
    weight = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    error = ((nvfp4sweep.quantize(weight).dequantize().astype(np.float64) - weight) ** 2).sum()
    reported = nvfp4sweep.sweep(weight).error.sum(dtype=np.float64)
    assert abs(error / reported - 1) < 1e-5
