"""What the tests of the JAX package share."""

import os
import subprocess
import sys

import numpy as np
import pytest

SHAPE = (16, 128)
#: For tests of what is around the search, and not of it: XLA takes half the time to compile it.
SMALL = {"block_size": 4}


needs_host = pytest.mark.usefixtures("on_host")


def gaussian(shape=SHAPE, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def same(actual, expected):
    """Equal shape, dtype and bits."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = f"u{actual.itemsize}"
    np.testing.assert_array_equal(actual.view(bits), expected.view(bits))


def same_sweep(actual, expected):
    for name in expected._fields:
        same(getattr(actual, name), getattr(expected, name))


def same_quantized(actual, expected):
    for name in ("packed", "scale", "global_scale"):
        same(getattr(actual, name), getattr(expected, name))
    assert (actual.axis, actual.block_size) == (expected.axis, expected.block_size)


def run_python(code, **environment):
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
