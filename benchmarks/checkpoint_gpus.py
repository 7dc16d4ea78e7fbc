"""What all GPUs of a run of benchmarks.checkpoint do at once, on weights that are in memory: no disk."""

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

import nvfp4sweep
import nvfp4sweep_torch
from nvfp4sweep.checkpoint.engines import Array, Engine
from nvfp4sweep.checkpoint.ranks import Ranks, share, shares
from nvfp4sweep.checkpoint.reader import Empty
from nvfp4sweep.checkpoint.selection import Selection
from nvfp4sweep.cli_common import to_torch

_REPEATS = 5
_ROUNDS = 5  # over all weights, one after another: the GPUs' ends differ by less of a longer time
_TO_BEGIN = 0.02  # seconds in which all ranks learn when


class _Gpu:
    """One device and its part of the weights, on the host and there."""

    def __init__(self, device: str, engine: Engine, weights: list[Array]) -> None:
        self._device, self._engine, self._on_host = device, engine, weights
        self._amaxes = [np.float32(nvfp4sweep.global_amax(weight)) for weight in weights]
        self._there = [to_torch(weight, device) for weight in weights]
        self._amaxes_there = [torch.full((), float(amax), device=device) for amax in self._amaxes]

    def compute(self) -> None:
        for weight, amax in zip(self._there, self._amaxes_there, strict=True):
            nvfp4sweep_torch.quantize(weight, global_amax=amax, check_finite=False)  # as the engine does

    def copy(self) -> None:
        for weight in self._on_host:
            to_torch(weight, self._device, non_blocking=True)

    def engine(self) -> None:
        for weight, amax in zip(self._on_host, self._amaxes, strict=True):
            self._engine(weight, amax, None, 1)

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)


def gpus_at_once(
    selection: Selection, engines: Mapping[str, Engine], empty: Empty, ranks: Ranks
) -> dict[str, float]:
    """Seconds for all weights, of which each GPU of each rank has its part by bytes; the median of some.

    Args:
        engines: of this rank, by device.

    Returns:
        "compute_seconds": to search and pack, from and to the GPUs' memory. "link_seconds": to copy to the
        GPUs what they search. "memory_to_memory_seconds": both, and the results back, by the engines.
    """
    checkpoint = selection.checkpoint
    mine = share(selection.plan.tensors, checkpoint.n_bytes, ranks)
    parts = shares(mine, checkpoint.n_bytes, len(engines))
    gpus = [
        _Gpu(device, engine, [checkpoint.read(tensor, empty) for tensor in part])
        for (device, engine), part in zip(engines.items(), parts, strict=True)
    ]
    steps = {"compute": _Gpu.compute, "link": _Gpu.copy, "memory_to_memory": _Gpu.engine}
    return {f"{name}_seconds": _median(step, gpus, ranks) for name, step in steps.items()}


def _median(step: Callable[[_Gpu], Any], gpus: list[_Gpu], ranks: Ranks) -> float:
    """Seconds of a round, from when all begin to the last one's end."""

    def go(gpu: _Gpu) -> None:
        for _ in range(_ROUNDS):
            step(gpu)
        gpu.wait()

    times: list[float] = []
    with ThreadPoolExecutor(len(gpus)) as threads:
        for _ in range(_REPEATS + 1):
            start = max(ranks.gather(time.perf_counter() + _TO_BEGIN))  # one clock for all processes
            while time.perf_counter() < start:
                pass
            list(threads.map(go, gpus))
            times.append((max(ranks.gather(time.perf_counter())) - start) / _ROUNDS)
    return statistics.median(times[1:])  # the first finds memory for the results
