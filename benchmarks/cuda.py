"""CUDA: the sweep against NVIDIA ModelOpt's fused kernel, interleaved in one run.

    python -m benchmarks.cuda [--ledger FILE]

Buffers rotate through more memory than the second-level cache holds. ModelOpt is optional: without it
its rows are left out.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

import nvfp4sweep_torch
from benchmarks import gate, ledger
from nvfp4sweep import formats

_COPIES = 4
_REPEATS = 60
_DELAY_CYCLES = 4_000_000  # about 2 ms: longer than any call takes to launch

Call = Callable[[torch.Tensor], Any]


@triton.jit
def _read_and_write_one(x, out, N: tl.constexpr, T: tl.constexpr):  # type: ignore[no-untyped-def]
    """The floor: read every element of a block, write one float."""
    start = tl.program_id(0).to(tl.int64) * T
    w = tl.load(x + start * N + tl.arange(0, T)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out + start + tl.arange(0, T), tl.max(tl.abs(w.to(tl.float32)), axis=1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ledger", type=Path, default=ledger.PATH)
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name()
    entry: dict[str, Any] = {"benchmark": "cuda", "shape": list(gate.SHAPE)}
    for dtype in (torch.bfloat16, torch.float32):
        entry[str(dtype).removeprefix("torch.")] = _measure(dtype)
    driver = torch.cuda.get_device_properties(0)
    entry["cuda"] = {"runtime": torch.version.cuda, "multiprocessors": driver.multi_processor_count}
    ledger.append({**ledger.environment(device), **entry}, arguments.ledger)


def _measure(dtype: torch.dtype) -> dict[str, Any]:
    host = torch.from_numpy(gate.gaussian()).to(dtype)
    weights = [host.cuda().clone() for _ in range(_COPIES)]
    amax = weights[0].abs().max().float()
    expected = gate.oracle_codes(host.float().numpy(), np.float32(amax.item()))
    code = nvfp4sweep_torch.sweep(weights[0]).code.cpu().numpy()
    result: dict[str, Any] = {"blocks_equal_to_oracle": gate.require_equal(str(dtype), code, expected)}

    out = torch.empty(expected.size, device="cuda")

    def sweep(w: torch.Tensor) -> torch.Tensor:
        return nvfp4sweep_torch.calibrate(w, global_amax=amax, check_finite=False)

    on_device: dict[str, Call] = {
        "sweep": sweep,
        "sweep_axis_0": lambda w: nvfp4sweep_torch.calibrate(w, global_amax=amax, check_finite=False, axis=0),
        "sweep_with_codes_and_errors": lambda w: nvfp4sweep_torch.sweep(
            w, global_amax=amax, check_finite=False
        ),
        "quantize": lambda w: nvfp4sweep_torch.quantize(w, global_amax=amax, check_finite=False),
        "floor": lambda w: _read_and_write_one[(expected.size // 128,)](w, out, N=16, T=128),
    }
    peer = _modelopt_sweep()
    if peer is not None:
        on_device["modelopt_sweep"] = lambda w: peer(w, amax)
        their_code = _codes(peer(weights[0], amax), amax)
        result["modelopt_blocks_that_differ"] = int((their_code != expected).sum())
    result["device"] = _device_times(on_device, weights)
    if peer is not None:
        result["modelopt_over_sweep"] = round(
            result["device"]["modelopt_sweep"]["p50_ms"] / result["device"]["sweep"]["p50_ms"], 1
        )
    small = weights[0][:1, :1024].clone()
    waiting: dict[str, Callable[[], Any]] = {
        "calibrate": lambda: nvfp4sweep_torch.calibrate(weights[0]),
        "global_amax": lambda: nvfp4sweep_torch.global_amax(weights[0]),
        "sweep_64_blocks": lambda: sweep(small).cpu(),
    }
    result["wall"] = ledger.interleaved(waiting, _REPEATS)
    result["peak_extra_bytes"] = _peak_extra_bytes(sweep, weights[0])
    return result


def _codes(block_amax: torch.Tensor, global_amax: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The E4M3 codes that amaxes stand for, however their last bits were rounded."""
    ratio = block_amax.double().cpu().numpy() / global_amax.double().item() * 448
    between = (formats.E4M3_VALUES[1:] + formats.E4M3_VALUES[:-1]) / 2
    return np.searchsorted(between, ratio).astype(np.uint8)


def _modelopt_sweep() -> Any:
    try:
        from modelopt.torch.kernels.quantization.gemm import nvfp4_fp8_scale_sweep
    except ImportError:
        return None
    return nvfp4_fp8_scale_sweep


def _device_times(calls: dict[str, Call], weights: list[torch.Tensor]) -> dict[str, dict[str, float]]:
    """Device times by events; each call is queued behind a delay, so that launch overhead is hidden."""
    for call in calls.values():
        for w in weights:
            call(w)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(_REPEATS):
        w = weights[repeat % len(weights)]
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(_DELAY_CYCLES)  # type: ignore[no-untyped-call]
            begin.record()
            call(w)
            end.record()
            end.synchronize()
            seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: ledger.percentiles(times) for name, times in seconds.items()}


def _peak_extra_bytes(sweep: Callable[[torch.Tensor], torch.Tensor], w: torch.Tensor) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = sweep(w)
    return torch.cuda.max_memory_allocated() - before - result.nbytes


if __name__ == "__main__":
    main()
