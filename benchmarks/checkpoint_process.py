"""One process of a measured run of benchmarks.checkpoint, alone or under torchrun.

    python -m benchmarks.checkpoint_process SOURCE OUT RESULT --device cpu|cuda

The clock starts when the engines of all ranks are warm. Rank 0 writes RESULT, a JSON file of seconds.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

import nvfp4sweep
from nvfp4sweep.checkpoint import Settings, numpy_engine, quantize_checkpoint
from nvfp4sweep.checkpoint.baselines import scale_errors
from nvfp4sweep.checkpoint.engines import Array, Engine, Packed
from nvfp4sweep.checkpoint.reader import TensorInfo
from nvfp4sweep.checkpoint.selection import Selection
from nvfp4sweep.cli_checkpoint import empty_for, torch_engine
from nvfp4sweep.cli_common import resolve_devices
from nvfp4sweep.cli_ranks import device_of_rank, ranks_of_environment

_LIBRARY = "nvfp4sweep.checkpoint"
#: What is timed of the library. Writing includes the reading of tensors that are copied, and fsync.
_STAGES = {
    "read": ("reader.Checkpoint.read",),
    "report": ("quantizer.scale_errors",),
    "write": ("writer.ShardWriter.write", "writer._sync"),
}


class Watch:
    """The seconds in which at least one call of the functions that it watches went on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock, self._calls, self._start = threading.Lock(), 0, 0.0

    def over(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any) -> Any:
            with self._lock:
                if self._calls == 0:
                    self._start = time.perf_counter()
                self._calls += 1
            try:
                return function(*arguments)
            finally:
                with self._lock:
                    self._calls -= 1
                    if self._calls == 0:
                        self.seconds += time.perf_counter() - self._start

        return watched


class EngineWatch:
    """The calls of an engine, which come one at a time: bytes of the matrix, and seconds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls: list[tuple[int, float]] = []

    def __call__(self, matrix: Array, *arguments: Any) -> Packed:
        start = time.perf_counter()
        found = self._engine(matrix, *arguments)
        self._calls.append((matrix.nbytes, time.perf_counter() - start))
        return found

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self._calls)

    @property
    def rate(self) -> float:
        """Bytes a second, the median of its largest matrices; 0 if it had none."""
        largest = max((n_bytes for n_bytes, _ in self._calls), default=0)
        rates = [n_bytes / seconds for n_bytes, seconds in self._calls if n_bytes == largest]
        return statistics.median(rates) if rates else 0.0


def warm_engine(device: str, weights: Sequence[TensorInfo]) -> Engine:
    """Compiled, or loaded, for weights such as these, with all else that a run compiles."""
    engine = numpy_engine if device == "cpu" else torch_engine(device)
    drawn = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(ml_dtypes.bfloat16)
    amax = np.float32(nvfp4sweep.global_amax(drawn))
    for shape in {tensor.shape for tensor in weights}:
        engine(np.resize(drawn, shape), amax, None, 1)
    scale_errors(drawn, np.ones(drawn.size // 16, np.uint8), np.asarray(amax))
    return engine


def _measure(source: Path, out: Path, device: str) -> dict[str, float] | None:
    """On rank 0 the seconds of the slowest rank, and the longest that a rank was at each stage; of the
    engines the busiest's seconds, the sum of all, and the sum of their rates."""
    ranks = ranks_of_environment()
    devices = device_of_rank(resolve_devices(device), ranks)
    weights = Selection(source, Settings()).plan.tensors
    engines = [EngineWatch(warm_engine(name, weights)) for name in devices]
    stages = {stage: Watch() for stage in _STAGES}
    with ExitStack() as patches:
        for stage, names in _STAGES.items():
            for name in names:
                _patch(patches, f"{_LIBRARY}.{name}", stages[stage])
        ranks.gather(None)
        start = time.perf_counter()
        quantize_checkpoint(
            source,
            out,
            engines=engines,
            off_cpu=devices != ["cpu"],
            empty=empty_for(devices[0]),
            ranks=ranks,
        )
        seconds = time.perf_counter() - start
    mine = {"seconds": seconds, **{f"{stage}_seconds": watch.seconds for stage, watch in stages.items()}}
    all_ranks = ranks.gather((mine, [(engine.seconds, engine.rate) for engine in engines]))
    if ranks.rank > 0:
        return None
    seconds_of_each, rates = zip(*chain(*(of_engines for _, of_engines in all_ranks)), strict=True)
    found = {name: max(row[name] for row, _ in all_ranks) for name in mine}
    found |= {"engine_seconds": max(seconds_of_each), "all_engines_seconds": sum(seconds_of_each)}
    return {
        **{name: round(value, 3) for name, value in found.items()},
        "all_engines_bytes_per_second": round(sum(rates)),
    }


def _patch(patches: ExitStack, name: str, watch: Watch) -> None:
    patch = mock.patch(name)
    original, _ = patch.get_original()
    patches.enter_context(mock.patch(name, watch.over(original)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_process")
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args()
    found = _measure(arguments.source, arguments.out, arguments.device)
    if found is not None:
        arguments.result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
