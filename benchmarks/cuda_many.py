"""CUDA: thousands of weights in one call, beside the same weights as one tensor and a loop of single calls.

    python -m benchmarks.cuda_many [--ledger FILE] [--tensors N]

The results of some weights are compared with the CPU engine's first, and those of all that also lie in one
tensor with that tensor's.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import gate, ledger
from nvfp4sweep_torch import calibrate, calibrate_many

Weights = list[torch.Tensor]

_SHAPE = (1536, 2048)
_DTYPE = torch.bfloat16
_TENSORS = 10_000
_LISTED_SHARE = 0.6  # of the free memory, for the separate weights and their results
_STACKED_SHARE = 0.2  # for those that also lie in one tensor, and their results
_LOOPED = 200
_COMPARED = 8
_REPEATS = 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_many")
    parser.add_argument("--ledger", type=Path, default=ledger.PATH)
    parser.add_argument("--tensors", type=int, default=_TENSORS, help="how many weights, if they fit")
    arguments = parser.parse_args()
    if arguments.tensors < 1:
        parser.error(f"--tensors {arguments.tensors} must be at least 1")
    torch.manual_seed(0)
    free, _ = torch.cuda.mem_get_info()
    listed = min(arguments.tensors, _fits(_LISTED_SHARE * free))
    stacked = min(listed, _fits(_STACKED_SHARE * free))
    weights = [torch.randn(_SHAPE, dtype=_DTYPE, device="cuda") for _ in range(listed)]
    one = torch.stack(weights[:stacked])
    entry = {
        **ledger.environment(torch.cuda.get_device_name()),
        "benchmark": "cuda_many",
        "host": ledger.processor(),
        "shape": list(_SHAPE),
        "dtype": str(_DTYPE).removeprefix("torch."),
        "blocks_equal_to_cpu": _compare_with_cpu(weights),
        "blocks_equal_to_stacked": _compare_with_stacked(weights, one),
        "peak_extra_bytes": _peak_extra_bytes(weights),
        **_rates(weights, one),
    }
    ledger.append(entry, arguments.ledger)


def _fits(memory: float) -> int:
    elements = _SHAPE[0] * _SHAPE[1]
    weight, result = elements * _DTYPE.itemsize, elements // 16 * torch.float32.itemsize
    return max(1, int(memory // (weight + result)))


def _compare_with_cpu(weights: Weights) -> int:
    """The number of blocks compared, of weights spread over the list."""
    start = time.perf_counter()
    found = calibrate_many(weights)
    blocks = 0
    for i in np.unique(np.linspace(0, len(weights) - 1, _COMPARED).round().astype(int)):
        expected = calibrate(weights[i].cpu(), implementation="cpu")
        blocks += gate.require_equal(f"weight {i}", found[i].cpu().numpy(), expected.numpy())
    print(f"compared with the CPU engine: {time.perf_counter() - start:.0f} s", flush=True)
    return blocks


def _compare_with_stacked(weights: Weights, one: torch.Tensor) -> int:
    """The number of blocks compared, all of those in one tensor, copied and as its parts."""
    expected = calibrate(one, batch_dims=1)
    for name, same in (("separate", weights[: len(one)]), ("parts of one tensor", list(one.unbind()))):
        for i, (got, amax) in enumerate(zip(calibrate_many(same), expected, strict=True)):
            if not torch.equal(got, amax):
                raise SystemExit(f"{name}: weight {i} differs from the same in one tensor: not timed")
    return expected.numel()


def _peak_extra_bytes(weights: Weights) -> int:
    """The most memory that a call held beyond its weights and its results."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = calibrate_many(weights)
    return torch.cuda.max_memory_allocated() - before - sum(amax.nbytes for amax in found)


def _rates(weights: Weights, one: torch.Tensor) -> dict[str, Any]:
    """Times until the results are ready and elements a second, all with the check that they are finite."""
    parts, looped = list(one.unbind()), weights[:_LOOPED]
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "many": (len(weights), partial(calibrate_many, weights)),
        "many_parts_of_one": (len(parts), partial(calibrate_many, parts)),
        "stacked": (len(one), partial(calibrate, one, batch_dims=1)),
        "loop": (len(looped), lambda: [calibrate(weight) for weight in looped]),
    }
    times = ledger.interleaved(
        {name: partial(_until_ready, call) for name, (_, call) in calls.items()},
        _REPEATS,
        before=torch.cuda.synchronize,
    )
    result: dict[str, Any] = {}
    for name, (tensors, _) in calls.items():
        rate = tensors * _SHAPE[0] * _SHAPE[1] / (times[name]["p50_ms"] / 1e3)
        result[name] = {"tensors": tensors, **times[name], "elements_per_second": round(rate)}
    return result


def _until_ready(call: Callable[[], Any]) -> None:
    found = call()
    torch.cuda.synchronize()
    del found  # what it takes to let go of many results is part of a call


if __name__ == "__main__":
    main()
