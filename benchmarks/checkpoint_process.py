"""One process of a measured run of benchmarks.checkpoint, alone or under torchrun.

    python -m benchmarks.checkpoint_process SOURCE OUT RESULT --device cpu|cuda

The clock starts when the engines of all ranks are warm. Rank 0 writes RESULT, a JSON file of seconds.
"""

import argparse
import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

import nvfp4sweep
from nvfp4sweep.checkpoint import Settings, numpy_engine, quantize_checkpoint
from nvfp4sweep.checkpoint.baselines import scale_errors
from nvfp4sweep.checkpoint.engines import Engine
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
    """On rank 0 the seconds of the slowest rank, and the longest that a rank was at each stage, and an engine
    at work."""
    ranks = ranks_of_environment()
    devices = device_of_rank(resolve_devices(device), ranks)
    weights = Selection(source, Settings()).plan.tensors
    engines = [warm_engine(name, weights) for name in devices]
    watches = [Watch() for _ in engines]
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
            engines=[watch.over(engine) for watch, engine in zip(watches, engines, strict=True)],
            off_cpu=devices != ["cpu"],
            empty=empty_for(devices[0]),
            ranks=ranks,
        )
        seconds = time.perf_counter() - start
    mine = {
        "seconds": seconds,
        "engine_seconds": max(watch.seconds for watch in watches),
        **{f"{stage}_seconds": watch.seconds for stage, watch in stages.items()},
    }
    all_ranks = ranks.gather(mine)
    found = {name: max(row[name] for row in all_ranks) for name in mine}
    return None if ranks.rank > 0 else {name: round(value, 3) for name, value in found.items()}


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
