"""What is special to the CPU engine: threads, memory, layouts and the compiled kernels on disk."""

import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import nvfp4sweep

pytest.importorskip("numba")
from nvfp4sweep import cpu_kernels, cpu_searches, cpu_tiles, lanes

LARGE = np.random.default_rng(0).standard_normal((2048, 2048)).astype(np.float32)


def test_large_weight_uses_threads_and_keeps_order() -> None:
    """Many tasks: the result must not depend on how the blocks were cut."""
    found = nvfp4sweep.sweep(LARGE)
    whole = nvfp4sweep.sweep(LARGE[:64], global_amax=found.global_amax, implementation="oracle")
    np.testing.assert_array_equal(found.code[:64], whole.code)
    parts = [nvfp4sweep.sweep(part, global_amax=found.global_amax) for part in np.split(LARGE, 16)]
    for field in ("amax", "code", "error"):
        np.testing.assert_array_equal(
            getattr(found, field), np.concatenate([getattr(p, field) for p in parts])
        )


def test_calls_from_several_threads() -> None:
    expected = nvfp4sweep.calibrate(LARGE)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: nvfp4sweep.calibrate(LARGE), range(8)):
            np.testing.assert_array_equal(result, expected)


def test_layouts_agree() -> None:
    """Strided, transposed, read-only and unaligned arrays, larger than one slab."""
    expected = nvfp4sweep.calibrate(LARGE)
    read_only = LARGE.copy()
    read_only.flags.writeable = False
    unaligned = np.frombuffer(b"\0" + LARGE.tobytes(), np.uint8)[1:].view(np.float32).reshape(LARGE.shape)
    assert not unaligned.flags.aligned
    padded = np.zeros((2048, 2100), np.float32)
    padded[:, 7 : 7 + 2048] = LARGE
    for same in (
        read_only,
        unaligned,
        padded[:, 7 : 7 + 2048],
        LARGE.T.copy().T,
        LARGE[::-1, ::-1][::-1, ::-1],
    ):
        np.testing.assert_array_equal(nvfp4sweep.calibrate(same), expected)
    np.testing.assert_array_equal(nvfp4sweep.calibrate(LARGE.T, axis=0), expected.T)


@pytest.mark.parametrize("view", ["contiguous", "strided", "transposed"])
def test_no_copy_of_the_weight(view: str) -> None:
    big = np.zeros((8192, 2048), np.float32)
    weight = {"contiguous": big, "strided": big[:, :1024], "transposed": big.T}[view]
    nvfp4sweep.calibrate(weight[:16, :16])
    tracemalloc.start()
    try:
        amax = nvfp4sweep.calibrate(weight)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    slabs = 3 * 4 * cpu_searches.ELEMENTS_A_SLAB * (1 + len(os.sched_getaffinity(0)))
    assert peak - amax.nbytes < min(slabs, weight.nbytes // 2)


def test_compiled_kernels_are_kept_on_disk(tmp_path: Path) -> None:
    program = (
        "from nvfp4sweep import cpu_kernels as k;"
        "print(*(sum(f.stats.cache_hits.values()) for f in (k.sweep_range, k.pack_range)))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    hits = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert hits == [["0", "0"], ["2", "2"]]


def test_the_name_on_disk_tells_all_sources() -> None:
    """Numba would keep kernels whose own file did not change though another did that they are made of."""
    digest = cpu_kernels.sweep_range.py_func.__qualname__.removeprefix("sweep_range_")
    assert digest == lanes._digest_of_sources() != ""


def test_blocks_larger_than_a_tile_is_wide() -> None:
    w = np.random.default_rng(1).standard_normal((2, 8 * cpu_tiles.LANES)).astype(np.float32)
    for block_size in (cpu_tiles.LANES, 2 * cpu_tiles.LANES, 8 * cpu_tiles.LANES):
        np.testing.assert_array_equal(
            nvfp4sweep.sweep(w, block_size=block_size).code,
            nvfp4sweep.sweep(w, block_size=block_size, implementation="oracle").code,
        )


def test_fused_multiply_add_rounds_once() -> None:
    import numba

    one = numba.njit(lambda a, b, c: lanes.fma(a, b, c))
    a = np.float32(1 + 2**-12)
    assert one(a, a, -(a * a)) == np.float32(2**-24)
