"""How CUDA calls are timed: on the device, and on the clock from an idle device until the result is ready."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks import ledger

Call = Callable[[torch.Tensor], Any]
Ready = Callable[[], Any]
Times = dict[str, dict[str, float]]

_REPEATS = 60
_WALL_REPEATS = 200
_HOST_REPEATS = 30
_HOST_BATCH = 100
_DELAY_CYCLES = 4_000_000  # about 2 ms: longer than any call takes to launch
_FLOOR_TILE = 128


@triton.jit
def _read_and_write_one(x, out, N: tl.constexpr, T: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * T
    w = tl.load(x + start * N + tl.arange(0, T)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out + start + tl.arange(0, T), tl.max(tl.abs(w.to(tl.float32)), axis=1))


@triton.jit
def _write_one(out):  # type: ignore[no-untyped-def]
    tl.store(out, 1.0)


def floor(n_blocks: int) -> Call:
    """Read every element of a block of 16, write one float: n_blocks is a power of two."""
    out = torch.empty(n_blocks, device="cuda")
    tile = min(_FLOOR_TILE, n_blocks)
    return lambda w: _read_and_write_one[(n_blocks // tile,)](w, out, N=16, T=tile)


def empty_launch() -> Call:
    """The least that a Triton kernel can do."""
    out = torch.empty(1, device="cuda")
    return lambda w: _write_one[(1,)](out)


def until_ready(call: Call) -> Call:
    """The call, and the wait for what it launched."""

    def run(w: torch.Tensor) -> None:
        call(w)
        torch.cuda.synchronize()

    return run


def rotated(calls: dict[str, Call], weights: Iterable[torch.Tensor]) -> dict[str, Ready]:
    """The calls on the weights by turns, so that none finds its weight in the second-level cache."""
    turn = itertools.cycle(weights)
    return {name: partial(_on_next, call, turn) for name, call in calls.items()}


def _on_next(call: Call, turn: Iterator[torch.Tensor]) -> Any:
    return call(next(turn))


def device_times(calls: dict[str, Ready], repeats: int = _REPEATS) -> Times:
    """Times by events, the calls by turns; each is queued behind a delay, which hides its launches."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(_DELAY_CYCLES)  # type: ignore[no-untyped-call]
            begin.record()
            call()
            end.record()
            end.synchronize()
            seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: ledger.percentiles(times) for name, times in seconds.items()}


def wall_times(calls: dict[str, Ready]) -> Times:
    """Times by the clock, the calls by turns; each begins when the device is idle."""
    return ledger.interleaved(calls, _WALL_REPEATS, before=torch.cuda.synchronize)


def host_times(calls: dict[str, Ready]) -> Times:
    """Times by the clock of calls that do not wait for the device, by batches that its queue holds."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_HOST_REPEATS):
        for name, call in calls.items():
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(_HOST_BATCH):
                call()
            seconds[name].append((time.perf_counter() - begin) / _HOST_BATCH)
    return {name: ledger.percentiles(times) for name, times in seconds.items()}


def peak_extra_bytes(call: Callable[[torch.Tensor], torch.Tensor], w: torch.Tensor) -> int:
    """The most memory that a call held beyond its weight and its result."""
    call(w)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call(w)
    return torch.cuda.max_memory_allocated() - before - result.nbytes
