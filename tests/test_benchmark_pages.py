"""Pages: what records of objectives, of JAX, of checkpoints and of all GPUs at once give."""

from typing import Any

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks were not copied")
pytest.importorskip("simpy")

from benchmarks import report, report_checkpoint_gpus

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


def test_checkpoint() -> None:
    row = {"seconds": 4.0, "engine_seconds": 1.0, "read_seconds": 3.0, "report_seconds": 2.0}
    entry = {
        **HEAD,
        "layers": 2,
        "input_bytes": 8_000_000_000,
        "output_bytes": 3_000_000_000,
        "weight_bytes": 6_000_000_000,
        "blocks_compared": 12345,
        "parts_seconds": dict.fromkeys(
            ("read", "read_cached", "amax", "quantize", "report", "write", "sync", "copy"), 2.0
        ),
        "runs": [
            {**row, "processes": 1, "devices": 1, "write_seconds": 1.5},
            {**row, "processes": 1, "devices": 4, "write_seconds": 1.5, "engine_seconds": 0.25},
            {**row, "processes": 4, "devices": 4, "write_seconds": 0.5, "seconds": 2.0},
        ],
    }
    text = report.page({"checkpoint_cuda": entry})
    assert "| 1 x 1 | 4.0 | 2.00 | 1.00 | 1.00 | 3.0 | 2.0 | 1.5 |" in text
    assert "| 1 x 4 | 4.0 | 2.00 | 0.25 | 4.00 | 3.0 | 2.0 | 1.5 |" in text
    assert "| 4 x 1 | 2.0 | 4.00 | 1.00 | 1.00 | 3.0 | 2.0 | 0.5 |" in text
    assert "| the weights read | 2.00 | 3.00 |" in text
    assert "| the result written to the page cache | 2.00 | 1.50 |" in text
    assert "| fsync of the result | 2.00 | 1.50 |" in text
    assert "| the input's files copied | 2.00 | 4.00 |" in text
    assert "12,345 blocks" in text
    assert "Peak memory" not in text
    without = {name: value for name, value in entry.items() if name != "runs"}  # an older line
    assert "Checkpoints" not in report.page({"checkpoint_cuda": without})


def test_all_gpus_at_once() -> None:
    def row(processes: int, devices: int, **seconds: float) -> dict[str, Any]:
        steps = {name: {"launched_seconds": 0.001, "seconds": value} for name, value in seconds.items()}
        return {**HEAD, **steps, "processes": processes, "devices": devices, "weight_bytes": 8_000_000_000}

    text = report_checkpoint_gpus.section(
        [
            row(2, 2, graph=0.010, compute=0.016, copies=0.08, host_to_host=0.1),
            row(1, 2, graph=0.010, compute=0.040, copies=0.08, host_to_host=0.1),
            row(1, 1, graph=0.020, compute=0.024, copies=0.16, host_to_host=0.2),
        ]
    )
    one, both, two = (line for line in text.splitlines() if line.startswith(("| 1 x", "| 2 x")))
    assert one == "| 1 x 1 | 20.0, 400, 1.00 | 24.0 (1.0), 333, 1.00 | 160.0, 50, 1.00 | 200.0, 40, 1.00 |"
    assert both == "| 1 x 2 | 10.0, 800, 2.00 | 40.0 (1.0), 200, 0.60 | 80.0, 100, 2.00 | 100.0, 80, 2.00 |"
    assert two.startswith("| 2 x 1 | 10.0, 800, 2.00 | 16.0 (1.0), 500, 1.50 |")
    assert "2 GPUs have 2.00 times the compute of one, and the host feeds them 2.00 times as fast" in text
