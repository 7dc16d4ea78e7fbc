"""CUDA: this library and NVIDIA ModelOpt, on the device and end to end, after a check against the oracle.

    python -m benchmarks.cuda [--ledger FILE] [--no-peer] [--only SECTION ...]

A section that fails its check stops the run, and nothing is recorded. With --only nothing is recorded
either: a line of the ledger is one whole run. Without ModelOpt its rows are left out.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import cuda_gate, cuda_peers, gate, ledger
from benchmarks.cuda_timing import (
    Call,
    device_times,
    empty_launch,
    floor,
    host_times,
    peak_extra_bytes,
    rotated,
    until_ready,
    wall_times,
)
from nvfp4sweep import triton_launch
from nvfp4sweep.problem import make_problem
from nvfp4sweep_torch import calibrate, global_amax, quantize, sweep

Peers = dict[str, cuda_peers.Peer]

_DTYPES = (torch.bfloat16, torch.float32, torch.float16)
_COPIES = 4  # together several times the second-level cache
_SLOW = ("modelopt_reference",)  # 0.2 s a call
_SLOW_REPEATS = 5

_SMALL_SHAPE = (1, 1024)
_EXPERTS_SHAPE = (128, 1536, 2048)

_LOG2_SIZES = range(10, 29)
_LONGEST_ROW = 4096
_POOL = 2**29  # elements, from which weights of all sizes are cut
_MOST_WEIGHTS = 512  # of one size: more than it is called
_END_BLOCKS = 4096  # compared at either end


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda")
    parser.add_argument("--ledger", type=Path, default=ledger.PATH)
    parser.add_argument("--no-peer", action="store_true", help="leave ModelOpt out")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    entry: dict[str, Any] = {
        **ledger.environment(torch.cuda.get_device_name()),
        "benchmark": "cuda",
        "host": ledger.processor(),
        "cuda": _cuda(),
        "shape": list(gate.SHAPE),
    }
    peers = {} if arguments.no_peer else cuda_peers.load()
    for name in arguments.only or SECTIONS:
        start = time.perf_counter()
        entry |= SECTIONS[name](peers)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    if arguments.only:
        print(json.dumps(entry, indent=2))
    else:
        ledger.append(entry, arguments.ledger)


def _cuda() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "driver": _driver_version(),
        "runtime": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
    }


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


# --- one weight: everything that the library does with it, in three dtypes ----------------------------


def _weight(peers: Peers) -> dict[str, Any]:
    return {str(dtype).removeprefix("torch."): _one_dtype(dtype, peers) for dtype in _DTYPES}


def _one_dtype(dtype: torch.dtype, peers: Peers) -> dict[str, Any]:
    host = torch.from_numpy(gate.gaussian()).to(dtype)
    weights = [host.to("cuda", copy=True) for _ in range(_COPIES)]
    w, amax = weights[0], _amax(weights[0])
    codes = cuda_gate.every_block(w, amax)
    cuda_gate.sample(f"{dtype}", w, amax)
    cuda_gate.sample(f"{dtype}, axis 0", w, amax, dim=1, axis=0)
    cuda_gate.sample(f"{dtype}, blocks of 32", w, amax, block_size=32)

    others: dict[str, Call] = {name: partial(peer, global_amax=amax) for name, peer in peers.items()}
    slow = {name: others.pop(name) for name in _SLOW if name in others}
    result: dict[str, Any] = {
        "blocks_equal_to_oracle": codes.size,
        "blocks_that_differ": {
            name: int((cuda_peers.codes(call(w), amax) != codes).sum()) for name, call in others.items()
        },
        "device": device_times(rotated({**_kernels(amax, codes.size), **others}, weights)),
        "wall": wall_times(rotated(_whole_calls(), weights)),
        "peak_extra_bytes": {
            "sweep": peak_extra_bytes(_alone(amax), w),
            "calibrate": peak_extra_bytes(calibrate, w),
        },
    }
    result["device"] |= device_times(rotated(slow, weights), _SLOW_REPEATS)
    return result


def _kernels(amax: torch.Tensor, n_blocks: int) -> dict[str, Call]:
    """None of these waits for the device, but `calibrate`: for its check, with the sweep queued behind."""
    alone = _alone(amax)
    return {
        "calibrate_checked": calibrate,
        "sweep": alone,
        "sweep_axis_0": partial(alone, axis=0),
        "sweep_block_size_32": partial(alone, block_size=32),
        "sweep_with_codes_and_errors": partial(sweep, global_amax=amax, check_finite=False),
        "quantize_given_amax": partial(quantize, global_amax=amax, check_finite=False),
        "quantize_in_full": partial(quantize, check_finite=False),
        "calibrate_in_full": partial(calibrate, check_finite=False),
        "global_amax": _checked_amax,
        "floor": floor(n_blocks),
    }


def _checked_amax(w: torch.Tensor) -> None:
    """All that global_amax does on the device: what it checks is left there, for the host to look at."""
    asked = make_problem(w.shape)
    triton_launch.run(
        w.reshape(asked.view_shape),
        asked,
        ("global_amax",),
        lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype), device=w.device),
        checked=torch.empty(1, triton_launch.CHECKED, device=w.device),
    )


def _whole_calls() -> dict[str, Call]:
    calls: dict[str, Call] = {
        "calibrate": calibrate,
        "sweep": sweep,
        "quantize": quantize,
        "global_amax": global_amax,
        "vector_norm": lambda w: torch.linalg.vector_norm(w, torch.inf),
        "empty_launch": empty_launch(),
    }
    return {name: until_ready(call) for name, call in calls.items()}


def _amax(w: torch.Tensor) -> torch.Tensor:
    largest: torch.Tensor = torch.linalg.vector_norm(w, torch.inf)
    return largest.float()


def _alone(amax: torch.Tensor) -> Any:
    """The sweep alone: nothing but the search."""
    return partial(calibrate, global_amax=amax, check_finite=False)


# --- other weights, in bfloat16 -----------------------------------------------------------------------


def _small(_: Peers) -> dict[str, Any]:
    w = _gaussian(_SMALL_SHAPE)
    alone = _alone(_amax(w))
    blocks = cuda_gate.sample("small", w, _amax(w))
    calls: dict[str, Call] = {
        "calibrate_unchecked": partial(calibrate, check_finite=False),
        "sweep": alone,
        "empty_launch": empty_launch(),
    }
    waiting = {name: until_ready(call) for name, call in {"calibrate": calibrate, **calls}.items()}
    return {
        "small": {
            "shape": _SMALL_SHAPE,
            "blocks_compared": blocks,
            "host": host_times(rotated(calls, [w])),
            "wall": wall_times(rotated(waiting, [w])),
        }
    }


_FIRST_CALL = """
import time, torch, nvfp4sweep_torch
weight = torch.ones(1, 1024, dtype=torch.bfloat16, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
nvfp4sweep_torch.calibrate(weight)
print(time.perf_counter() - start)
"""


def _first_call(_: Peers) -> dict[str, Any]:
    """Seconds of a process's first call: where nothing is compiled yet, and from Triton's cache on disk."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", _FIRST_CALL]
        cold, cached = (
            float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
            for _ in range(2)
        )
    return {"first_call": {"cold_s": round(cold, 2), "cached_s": round(cached, 3)}}


def _experts(_: Peers) -> dict[str, Any]:
    stacked = _gaussian(_EXPERTS_SHAPE)
    matrix = stacked.flatten(0, 1)
    amaxes, amax = stacked.abs().amax(dim=(1, 2)).float(), _amax(matrix)
    blocks = cuda_gate.sample("experts", stacked, amaxes, dim=1, batch_dims=1)
    cuda_gate.sample("experts as one matrix", matrix, amax)
    # One copy: a call reads sixteen times the second-level cache before the next begins at the front.
    times = device_times(
        {
            "stacked": partial(_alone(amaxes), stacked, batch_dims=1),
            "one_matrix": partial(_alone(amax), matrix),
        }
    )
    return {"experts": {"shape": _EXPERTS_SHAPE, "blocks_compared": blocks, **times}}


def _hard(_: Peers) -> dict[str, Any]:
    gaussian = _gaussian(gate.SHAPE)
    weights = {
        "gaussian": gaussian,
        "sparse": gaussian * (torch.rand(gate.SHAPE, device="cuda") < 0.1),
        "uniform": (torch.rand(gate.SHAPE, device="cuda") * 2 - 1).bfloat16(),
        "zero": torch.zeros_like(gaussian),
    }
    blocks = [cuda_gate.sample(name, w, _amax(w)) for name, w in weights.items()]
    # One copy of each: the other three are read before it comes again.
    times = device_times({name: partial(_alone(_amax(w)), w) for name, w in weights.items()})
    return {"hard": {"blocks_compared": min(blocks), **times}}


def _sizes(_: Peers) -> dict[str, Any]:
    pool = _gaussian((_POOL,))
    amax = _amax(pool)
    return {"sizes": [_one_size(pool, 2**log2, amax) for log2 in _LOG2_SIZES]}


def _one_size(pool: torch.Tensor, elements: int, amax: torch.Tensor) -> dict[str, Any]:
    row = min(elements, _LONGEST_ROW)
    weights = _cut(pool, elements, row)
    n_rows = elements // row
    end = _END_BLOCKS * 16 // row
    index = torch.arange(n_rows, device=pool.device)
    index = index[(index < end) | (index >= n_rows - end)]
    blocks = cuda_gate.slices(f"{elements} elements", weights[0], amax, index)
    calls = rotated(
        {"sweep": _alone(amax), "floor": floor(elements // 16), "calibrate": until_ready(calibrate)}, weights
    )
    wall = {"calibrate_wall": calls.pop("calibrate")}
    return {"elements": elements, "blocks_compared": blocks, **device_times(calls), **wall_times(wall)}


def _cut(pool: torch.Tensor, elements: int, row: int) -> list[torch.Tensor]:
    """Weights [-1, row] spread over the pool: the cache holds too little of it to meet one again."""
    weights = pool.view(-1, elements // row, row)
    number = min(len(weights), _MOST_WEIGHTS)
    return list(weights[:: len(weights) // number])


def _gaussian(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


SECTIONS: dict[str, Callable[[Peers], dict[str, Any]]] = {
    "weight": _weight,
    "small": _small,
    "first_call": _first_call,
    "experts": _experts,
    "hard": _hard,
    "sizes": _sizes,
}

if __name__ == "__main__":
    main()
