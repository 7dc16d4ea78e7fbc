"""What all GPUs of a machine do at once for a checkpoint whose weights are in memory: no disk.

    python -m benchmarks.checkpoint_gpus [--layers N] [--ledger FILE]           one process, all visible GPUs
    torchrun --nproc-per-node N -m benchmarks.checkpoint_gpus ...               a process for each of N GPUs

The weights have the shapes of benchmarks.checkpoint's; each GPU has its part of them, by bytes. Times are for
all of them, from when all GPUs begin to the last one's end, the median of some. Before that each GPU's codes
of a layer are compared with the oracle's.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch

import nvfp4sweep
import nvfp4sweep_torch
from benchmarks import gate, ledger
from benchmarks.checkpoint_model import LLAMA_8B, Shape, matrices, n_bytes
from nvfp4sweep.checkpoint.engines import Array
from nvfp4sweep.checkpoint.ranks import Ranks, part, share, shares
from nvfp4sweep.cli_checkpoint import empty_for, torch_engine
from nvfp4sweep.cli_common import resolve_devices, to_torch
from nvfp4sweep.cli_ranks import device_of_rank, ranks_of_environment

_COMPARED_ROWS = 8  # of each matrix of a layer
_REPEATS = 5
_SOON = 0.02  # seconds, in which all ranks learn when they begin
_DRAWN = np.random.default_rng(0).standard_normal(2**24, np.float32).astype(ml_dtypes.bfloat16)


class _Step(NamedTuple):
    do: Callable[["_Gpu"], Any]
    rounds: int  # over all weights, one after another: GPUs' ends differ by less of a longer time


class _Gpu:
    """One device and its part of the weights, on the host and there."""

    def __init__(self, device: str, shapes: Sequence[Shape]) -> None:
        self._device, self._engine = device, torch_engine(device)
        self._on_host = [_draw(shape, device) for shape in shapes]
        self._there = [to_torch(weight, device) for weight in self._on_host]
        self._amaxes_there = [nvfp4sweep_torch.global_amax(weight) for weight in self._there]
        self._amaxes = [np.float32(amax.item()) for amax in self._amaxes_there]
        self.compute()
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.graph(self._graph, stream=stream):  # by itself it takes one of the first GPU
            self.compute()

    def compare(self, count: int) -> int:
        """The number of blocks of the first matrices that were compared with the oracle."""
        blocks = 0
        for weight, amax in zip(self._on_host[:count], self._amaxes, strict=False):
            rows = np.linspace(0, len(weight) - 1, _COMPARED_ROWS).astype(int)
            found = self._engine(weight, amax, None, 1).scale[rows]
            expected = nvfp4sweep.sweep(weight[rows], global_amax=amax, implementation="oracle").code
            blocks += gate.require_equal(self._device, found, expected)
        return blocks

    def compute(self) -> None:
        """Search and pack, from the device's memory to its memory, as the engine asks for it."""
        for weight, amax in zip(self._there, self._amaxes_there, strict=True):
            nvfp4sweep_torch.quantize(weight, global_amax=amax, check_finite=False)

    def replay(self) -> None:
        """The same, launched at once."""
        self._graph.replay()

    def copy(self) -> None:
        """The weights to the device, and nothing else."""
        for weight in self._on_host:
            to_torch(weight, self._device, non_blocking=True)

    def quantize(self) -> None:
        """From the host's memory to the host's memory."""
        for weight, amax in zip(self._on_host, self._amaxes, strict=True):
            self._engine(weight, amax, None, 1)

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)


_STEPS = {
    "compute": _Step(_Gpu.compute, 20),
    "graph": _Step(_Gpu.replay, 20),
    "copies": _Step(_Gpu.copy, 3),
    "host_to_host": _Step(_Gpu.quantize, 3),
}


def _draw(shape: Shape, device: str) -> Array:
    """bfloat16, in memory that the device copies from by itself."""
    weight = empty_for(device)(shape, _DRAWN.dtype)
    weight[:] = np.resize(_DRAWN, shape)
    return weight


def _measure(layers: int, ranks: Ranks) -> dict[str, Any]:
    layer = matrices(LLAMA_8B)
    devices = device_of_rank(resolve_devices("cuda"), ranks)
    parts = shares(share(layer * layers, n_bytes, ranks), n_bytes, len(devices))
    gpus = [_Gpu(device, shapes) for device, shapes in zip(devices, parts, strict=True)]
    compared = sum(gpu.compare(len(layer)) for gpu in gpus)
    steps = {name: _times(step, gpus, ranks) for name, step in _STEPS.items()}
    return {
        **ledger.environment(torch.cuda.get_device_name()),
        "benchmark": "checkpoint_gpus",
        "processes": ranks.size,
        "devices": ranks.size * len(devices),
        "host": ledger.processor(),
        "layers": layers,
        "weight_bytes": layers * sum(map(n_bytes, layer)),
        "blocks_compared": sum(ranks.gather(compared)),
        **steps,
    }


def _times(step: _Step, gpus: Sequence[_Gpu], ranks: Ranks) -> dict[str, float]:
    """Seconds of a round, until all of it is launched and until all of it is done."""

    def go(gpu: _Gpu) -> float:
        for _ in range(step.rounds):
            step.do(gpu)
        launched = time.perf_counter()
        gpu.wait()
        return launched

    rounds: list[tuple[float, float]] = []
    with ThreadPoolExecutor(len(gpus)) as threads:
        for _ in range(_REPEATS + 1):
            start = max(ranks.gather(time.perf_counter() + _SOON))  # one clock for all processes
            while time.perf_counter() < start:
                pass
            launched = max(threads.map(go, gpus))
            of_ranks = ranks.gather((launched, time.perf_counter()))
            last_launched, last_ended = map(max, zip(*of_ranks, strict=True))
            rounds.append(((last_launched - start) / step.rounds, (last_ended - start) / step.rounds))
    launched, ended = map(statistics.median, zip(*rounds[1:], strict=True))  # the first finds memory
    return {"launched_seconds": round(launched, 5), "seconds": round(ended, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_gpus")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ledger", type=Path, default=ledger.PATH)
    arguments = parser.parse_args()
    ranks = ranks_of_environment()
    entry = _measure(arguments.layers, ranks)
    if ranks.rank == 0:
        ledger.append(entry, arguments.ledger)
    part(ranks)


if __name__ == "__main__":
    main()
