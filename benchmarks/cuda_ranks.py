"""Ranks: one bfloat16 weight, sharded by rows over the GPUs of a machine, and a layer of experts.

    torchrun --nproc-per-node N -m benchmarks.cuda_ranks [--ledger FILE]

The weight is calibrated with one all-reduce, the experts without: each has its own amax. Both are the same
for every N, and so must be the checksums of their codes, which are recorded. Before anything is timed each
rank compares rows spread over its shard with the oracle's, and the forms that the experts may have with each
other. Times are those of a call by itself, from a barrier to its result, and of a call among several in a
row, as the layers of a model follow each other. With --device cpu and small --rows, --columns and --experts
the script can be tried without a GPU; the record is then named "cpu_ranks".
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks import cuda_gate, ledger
from nvfp4sweep_torch import calibrate, calibrate_many, global_amax, sweep

_ROWS, _COLUMNS = 65_536, 16_384
_EXPERTS, _EXPERT = 128, (1536, 2048)
_DTYPE = torch.bfloat16
_DRAWN = 1024  # rows at a time
_REPEATS = 100
_IN_A_ROW, _ROW_REPEATS = 10, 30
_BACKEND = {"cuda": "nccl", "cpu": "gloo"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="torchrun --nproc-per-node N -m benchmarks.cuda_ranks")
    parser.add_argument("--ledger", type=Path, default=ledger.PATH)
    parser.add_argument("--rows", type=int, default=_ROWS)
    parser.add_argument("--columns", type=int, default=_COLUMNS)
    parser.add_argument("--experts", type=int, default=_EXPERTS)
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
        entry |= _measure_experts(device, arguments.experts)
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
        "wall": _slowest(_calls(local, amax), device),
        "wall_in_a_row": _slowest(_calls(local, amax), device, _ROW_REPEATS, _IN_A_ROW),
    }


def _measure_experts(device: torch.device, experts: int) -> dict[str, Any]:
    """Of a layer's experts, a whole number a rank: as one stack, as separate tensors, and as a DTensor."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = range(experts * rank // ranks, experts * (rank + 1) // ranks)
    rows, columns = _EXPERT
    first, last = own.start * rows, own.stop * rows
    stack = _rows(first, last, experts * rows, columns, device).view(len(own), rows, columns)
    separate = [expert.clone() for expert in stack]
    sharded = DTensor.from_local(stack, init_device_mesh(device.type, (ranks,)), [Shard(0)])
    calls: dict[str, Callable[[], Any]] = {
        "stacked": partial(calibrate, stack, batch_dims=1),
        "separate": partial(calibrate_many, separate),
        "sharded": partial(calibrate, sharded, batch_dims=1),
    }
    expected = calls["stacked"]()
    if not all(map(torch.equal, calls["separate"](), expected)):
        raise SystemExit(f"rank {rank}: separate experts differ from stacked ones: not timed")
    if not torch.equal(calls["sharded"]().to_local(), expected):
        raise SystemExit(f"rank {rank}: sharded experts differ from stacked ones: not timed")
    code = sweep(stack, batch_dims=1).code
    return {
        "experts": experts,
        "expert_shape": list(_EXPERT),
        "experts_checksum": f"{_sum(_weighed(code, first * columns // 16), device):x}",
        "experts_wall_in_a_row": _slowest(calls, device, _ROW_REPEATS, _IN_A_ROW),
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
        code = sweep(rows, global_amax=amax, check_finite=False).code
        total += _weighed(code, (first + start) * code.shape[1])
    return f"{_sum(total, local.device):x}"


def _weighed(code: torch.Tensor, first: int) -> int:
    """The sum of these codes, each times a number for its block, of which these are first, first + 1, ..."""
    index = torch.arange(first, first + code.numel(), device=code.device)
    return int((code.flatten() * (index * 2_654_435_761 % 1_000_003)).sum())


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


def _slowest(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int = _REPEATS, in_a_row: int = 1
) -> dict[str, dict[str, float]]:
    """Wall times of the slowest rank, a call, from a barrier to the last result; the calls by turns."""
    ready: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = torch.empty(repeats, len(calls), dtype=torch.float64)
    for repeat in range(-1, repeats):  # the first is not counted
        for i, call in enumerate(calls.values()):
            ready()
            dist.barrier()
            ready()
            start = time.perf_counter()
            for _ in range(in_a_row):
                call()
            ready()
            seconds[repeat, i] = (time.perf_counter() - start) / in_a_row
    seconds = seconds.to(device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return {name: ledger.percentiles(seconds[:, i].tolist()) for i, name in enumerate(calls)}


if __name__ == "__main__":
    main()
