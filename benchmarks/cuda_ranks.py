"""Ranks: one bfloat16 weight, sharded by rows over the GPUs of a machine, calibrated with one all-reduce.

    torchrun --nproc-per-node N -m benchmarks.cuda_ranks [--ledger FILE]

The weight is the same for every N, and so must be the checksum of its codes, which is recorded. Before
anything is timed each rank compares rows spread over its shard with the oracle's. With --device cpu and a
small --rows and --columns the script can be tried without a GPU; the record is then named "cpu_ranks".
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import cuda_gate, ledger
from nvfp4sweep_torch import calibrate, global_amax, sweep

_ROWS, _COLUMNS = 65_536, 16_384
_DTYPE = torch.bfloat16
_DRAWN = 1024  # rows at a time
_REPEATS = 100
_BACKEND = {"cuda": "nccl", "cpu": "gloo"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="torchrun --nproc-per-node N -m benchmarks.cuda_ranks")
    parser.add_argument("--ledger", type=Path, default=ledger.PATH)
    parser.add_argument("--rows", type=int, default=_ROWS)
    parser.add_argument("--columns", type=int, default=_COLUMNS)
    parser.add_argument("--device", choices=_BACKEND, default="cuda")
    arguments = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("this is not a rank: start it with torchrun")
    device = torch.device("cpu")
    if arguments.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(_BACKEND[device.type], device_id=device if device.type == "cuda" else None)
    try:
        entry = _measure(device, arguments.rows, arguments.columns)
        if dist.get_rank() == 0:
            ledger.append(entry, arguments.ledger)
    finally:
        dist.destroy_process_group()


def _measure(device: torch.device, rows: int, columns: int) -> dict[str, Any]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    first, last = rows * rank // ranks, rows * (rank + 1) // ranks
    local = _rows(first, last, rows, columns, device)
    start = time.perf_counter()
    amax = _largest(local)
    compared = _compare(local, amax)
    checksum = _checksum(local, amax, first)
    if rank == 0:
        print(f"compared: {time.perf_counter() - start:.0f} s", flush=True)
    on_cuda = device.type == "cuda"
    return {
        **ledger.environment(torch.cuda.get_device_name() if on_cuda else ledger.processor()),
        "benchmark": f"{device.type}_ranks",
        "host": ledger.processor(),
        "ranks": ranks,
        "shape": [rows, columns],
        "dtype": str(_DTYPE).removeprefix("torch."),
        "blocks_compared": compared,
        "checksum": checksum,
        "wall": _slowest(_calls(local, amax), torch.cuda.synchronize if on_cuda else lambda: None),
    }


def _rows(first: int, last: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """These rows of the weight: every rank draws all of them, a few at a time, and keeps its own."""
    generator = torch.Generator(device).manual_seed(0)
    local = torch.empty(last - first, columns, dtype=_DTYPE, device=device)
    for start in range(0, rows, _DRAWN):
        drawn = torch.randn(_DRAWN, columns, dtype=_DTYPE, device=device, generator=generator)
        begin, end = max(start, first), min(start + _DRAWN, last)
        if begin < end:
            local[begin - first : end - first] = drawn[begin - start : end - start]
    return local


def _largest(local: torch.Tensor) -> torch.Tensor:
    """The maximum of all ranks' largest |w|, from each of them by its own."""
    largest = torch.linalg.vector_norm(local, torch.inf).float()
    gathered = [torch.empty_like(largest) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, largest)
    return torch.stack(gathered).max()


def _compare(local: torch.Tensor, amax: torch.Tensor) -> int:
    """The blocks of all ranks that were compared with the oracle's; SystemExit if anything differs."""
    rank, group = dist.get_rank(), dist.group.WORLD
    found = sweep(local, process_group=group)
    for name, got in (
        ("global_amax", global_amax(local, process_group=group)),
        ("sweep's global_amax", found.global_amax),
    ):
        if got != amax:
            raise SystemExit(
                f"rank {rank}: {name} is {got.item()}, the ranks' largest {amax.item()}: not timed"
            )
    blocks = cuda_gate.sample(f"rank {rank}", local, amax)
    given = sweep(local, global_amax=amax, check_finite=False)
    for name, got, expected in (
        ("sweep's amax", found.amax, given.amax),
        ("sweep's code", found.code, given.code),
        ("sweep's error", found.error, given.error),
        ("calibrate", calibrate(local, process_group=group), given.amax),
        ("unchecked calibrate", calibrate(local, check_finite=False, process_group=group), given.amax),
    ):
        if not torch.equal(got, expected):
            raise SystemExit(f"rank {rank}: {name} differs from that with the global amax given: not timed")
    return _sum(blocks, local.device)


def _checksum(local: torch.Tensor, amax: torch.Tensor, first: int) -> str:
    """Of all codes of the weight, each times a number that depends on where it is."""
    total = 0
    for start, rows in zip(range(0, len(local), _DRAWN), local.split(_DRAWN), strict=True):  # type: ignore[no-untyped-call]
        code = sweep(rows, global_amax=amax, check_finite=False).code.long()
        index = torch.arange(code.numel(), device=code.device).view_as(code) + (first + start) * code.shape[1]
        total += int((code * (index * 2_654_435_761 % 1_000_003)).sum())
    return f"{_sum(total, local.device):x}"


def _sum(value: int, device: torch.device) -> int:
    """Over all ranks."""
    total = torch.tensor(value, device=device)
    dist.all_reduce(total)
    return int(total)


def _calls(local: torch.Tensor, amax: torch.Tensor) -> dict[str, Callable[[], Any]]:
    group = dist.group.WORLD
    one = torch.zeros((), device=local.device)
    return {
        "calibrate": partial(calibrate, local, process_group=group),
        "calibrate_unchecked": partial(calibrate, local, check_finite=False, process_group=group),
        "sweep": partial(calibrate, local, global_amax=amax, check_finite=False),
        "global_amax": partial(global_amax, local, process_group=group),
        "all_reduce": partial(dist.all_reduce, one, op=dist.ReduceOp.MAX, group=group),
    }


def _slowest(calls: dict[str, Callable[[], Any]], ready: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Wall times of the slowest rank, from a barrier to the result, the calls by turns."""
    seconds = torch.empty(_REPEATS, len(calls), dtype=torch.float64)
    for repeat in range(-1, _REPEATS):  # the first is not counted
        for i, call in enumerate(calls.values()):
            ready()
            dist.barrier()
            ready()
            start = time.perf_counter()
            call()
            ready()
            seconds[repeat, i] = time.perf_counter() - start
    if dist.get_backend() == "nccl":
        seconds = seconds.cuda()
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return {name: ledger.percentiles(seconds[:, i].tolist()) for i, name in enumerate(calls)}


if __name__ == "__main__":
    main()
