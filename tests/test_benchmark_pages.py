"""docs/benchmarks.md: the sections that records of objectives and of JAX give."""

from typing import Any

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks were not copied")

from benchmarks import report

HEAD = {
    "time": "today",
    "commit": "abc",
    "device": "a device",
    "host": "a processor",
    "versions": {"python": "3.11"},
    "shape": [2, 32],
}


def time(p50: float) -> dict[str, float]:
    return {"p20_ms": p50, "p50_ms": p50, "p80_ms": p50}


def test_cuda_objectives() -> None:
    names = [*(f"importance_sigma_{s}" for s in range(4)), "tokens_512", "tokens_8"]
    names += ["common_0.5", "common_0.9", "rank_1"]
    device = {"plain": time(0.08), **dict.fromkeys(names, time(1)), "modelopt_tokens_512": time(12)}
    column = {
        "device": device,
        "against_modelopt_tokens_512": {"differ": 7, "ours_worse": 0, "theirs_worse": 6},
    }
    text = report.page({"cuda_objectives": {**HEAD, "bfloat16": column}})
    assert "| the Hessian 1 1^T | 1 (1 .. 1), 12.5 |" in text
    assert "| bfloat16, a Hessian of 512 Gaussian tokens | 12 (12 .. 12) | 12 | 7 | 0 | 6 |" in text


@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_jax(place: str) -> None:
    times: dict[str, Any] = {"eager": time(0.11), "jit_xla": time(0.22)}
    if place == "cuda":
        times["torch"] = time(0.1)
    entry = {
        **HEAD,
        "benchmark": f"jax_{place}",
        "dtype": "bfloat16",
        "blocks_equal_to_oracle": 4,
        "in_a_row": 20,
    }
    small = {"shape": [1, 32], "in_a_row": 100, "times": {"eager": time(0.03)}}
    text = report.page({entry["benchmark"]: {**entry, "times": times, "small": small}})
    assert '| `jit`, `implementation="xla"`, global amax given | 0.22 (0.22 .. 0.22) |' in text
    assert "Weight 2x32, commit abc, today; python 3.11; a processor." in text
    assert "| jit, xla / eager | 2 |" in text
    assert ("| eager / PyTorch adapter, global amax given | 1.1 |" in text) == (place == "cuda")
    assert "| eager, global amax given, no check | 0.03 (0.03 .. 0.03) |" in text
