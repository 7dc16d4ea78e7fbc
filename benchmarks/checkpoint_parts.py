"""The steps of benchmarks.checkpoint by themselves, and what it measures them with."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import nvfp4sweep
from benchmarks.checkpoint_process import warm_engine
from nvfp4sweep.checkpoint.baselines import scale_errors
from nvfp4sweep.checkpoint.selection import Selection
from nvfp4sweep.cli_checkpoint import empty_for

_NOISE = memoryview(np.random.default_rng(0).bytes(1 << 24))


class _Clock:
    """Seconds by name: `add` counts those since the last `start` or `add`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        self._last = time.perf_counter()

    def add(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self.start()


@contextmanager
def step(name: str) -> Iterator[None]:
    """Tells how long it took."""
    start = time.perf_counter()
    yield
    print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def parts(selection: Selection, out: Path, device: str) -> dict[str, float]:
    """Seconds of each step by itself, one tensor or file after another: what a run does at the same time.

    Args:
        selection: what is quantized.
        out: the result, in a folder where there is room for a copy of the source.
        device: where the searches run.
    """
    clock, checkpoint, weights = _Clock(), selection.checkpoint, selection.plan.tensors
    forget(selection.source)
    with step("copy"):
        clock.start()
        _copy(selection.source, out.with_name("copy"))
        clock.add("copy")
    shutil.rmtree(out.with_name("copy"))
    engine, empty = warm_engine(device, weights), empty_for(device)
    forget(selection.source)
    with step("read"):
        clock.start()
        for tensor in weights:
            checkpoint.read(tensor, empty)
        clock.add("read")
    with step("read again, amax, quantize, report"):
        for tensor in weights:
            clock.start()
            weight = checkpoint.read(tensor, empty)
            clock.add("read_cached")
            amax = np.float32(nvfp4sweep.global_amax(weight))
            clock.add("amax")
            code = engine(weight, amax, None, 1).scale.view(np.uint8)
            clock.add("quantize")
            scale_errors(weight, code, np.asarray(amax))
            clock.add("report")
    sizes = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    written = out.with_name("written")
    with step("write"):
        _write_all(written, sizes, clock)
    forget(selection.source)
    with step("read while it writes"), ThreadPoolExecutor(1) as writer:
        clock.start()
        writing = writer.submit(_write_all, written, sizes, _Clock())
        for tensor in weights:
            checkpoint.read(tensor, empty)
        writing.result()
        clock.add("read_while_writing")
    written.unlink()
    return {name: round(seconds, 3) for name, seconds in clock.seconds.items()}


def _write_all(path: Path, sizes: Sequence[int], clock: _Clock) -> None:
    """Files of these sizes, one in place of the other."""
    clock.start()
    for size in sizes:
        with path.open("wb") as stream:
            for start in range(0, size, len(_NOISE)):
                stream.write(_NOISE[: size - start])
            stream.flush()
            clock.add("write")
            os.fsync(stream.fileno())
            clock.add("sync")


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # as quantize does
        os.close(descriptor)
