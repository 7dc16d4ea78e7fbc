"""nvfp4sweep quantize: what goes on at the same time, and what is interrupted goes on."""

import errno
import itertools
import multiprocessing
import random
import shutil
import threading
import time
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nvfp4sweep

pytest.importorskip("typer", reason="the extra [checkpoint] is not installed")
pytest.importorskip("safetensors", reason="the extra [checkpoint] is not installed")

from quantize_models import (
    FILES,
    MODULES,
    Array,
    contents,
    make_tensors,
    read_all,
    write_model,
)

from nvfp4sweep import cli_checkpoint
from nvfp4sweep.checkpoint import quantizer, selection, writer
from nvfp4sweep.checkpoint.engines import Engine, Packed, numpy_engine
from nvfp4sweep.checkpoint.quality import PAGE_NAME
from nvfp4sweep.checkpoint.quantizer import quantize_checkpoint
from nvfp4sweep.checkpoint.reader import Checkpoint, CheckpointError, TensorInfo
from nvfp4sweep.checkpoint.settings import Settings

# --- at the same time ---------------------------------------------------------------------------------


def test_errors_are_counted_while_the_next_tensor_is_searched(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine off the CPU: its second call and the first tensor's errors wait for each other."""
    both = threading.Barrier(2, timeout=30)
    engine_calls, error_calls = itertools.count(), itertools.count()
    scale_errors = quantizer.scale_errors

    def engine(*arguments: Any) -> Packed:
        if next(engine_calls) == 1:
            both.wait()
        return numpy_engine(*arguments)

    def errors(*arguments: Any) -> Any:
        if next(error_calls) == 0:
            both.wait()
        return scale_errors(*arguments)

    monkeypatch.setattr(quantizer, "scale_errors", errors)
    quantize_checkpoint(model, tmp_path / "a", engines=[engine], off_cpu=True)
    assert next(engine_calls) == next(error_calls) == len(MODULES)
    monkeypatch.undo()
    quantize_checkpoint(model, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(("off_cpu", "most"), [(False, 2), (True, 3)])
def test_tensors_in_memory(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off_cpu: bool, most: int
) -> None:
    """While the engine holds on to its first tensor, so many are read and no more."""
    held, full, beyond = threading.Event(), threading.Event(), threading.Event()
    times: Counter[TensorInfo] = Counter()
    since = 0  # reads: of what the engine holds on to, and after that
    read = Checkpoint.read

    def counted(checkpoint: Checkpoint, tensor: TensorInfo, *empty: Any) -> Array:
        nonlocal since
        times[tensor] += 1
        if since or times[tensor] == 2:
            since += 1
        if since == most:
            full.set()
        if since > most:
            beyond.set()
        return read(checkpoint, tensor, *empty)

    def engine(*arguments: Any) -> Packed:
        if not held.is_set():
            held.set()
            assert full.wait(30)
            assert not beyond.wait(0.5)
        return numpy_engine(*arguments)

    monkeypatch.setattr(Checkpoint, "read", counted)
    quantize_checkpoint(model, tmp_path / "out", engines=[engine], off_cpu=off_cpu)
    assert list(times.values()) == [2] * 6


@pytest.mark.parametrize("n_files", [1, 2])
def test_large_files_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_files: int) -> None:
    """The same tensors in more files, whatever the number of files before, and however often interrupted."""
    tensors = make_tensors()
    if n_files == 1:
        tensors = [tensors[0] | tensors[1]]
    model = write_model(tmp_path / "model", tensors)
    quantize_checkpoint(model, tmp_path / "whole")
    (model / "model-00001-of-00004.safetensors").write_bytes(b"not of the model")
    monkeypatch.setattr(selection, "SHARD_BYTES", 9000)
    calls = itertools.count()

    def engine(*arguments: Any) -> Packed:
        if next(calls) in (1, 9, 16):
            raise KeyboardInterrupt
        return numpy_engine(*arguments)

    interrupted = 0
    while not (tmp_path / "out").exists():
        try:
            quantize_checkpoint(model, tmp_path / "out", engines=[engine])
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted >= 2
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) == 4
    found, expected = read_all(tmp_path / "out"), read_all(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())
    for name in ("config.json", PAGE_NAME):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("seed", range(5))
def test_files_are_cut_evenly(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(selection, "SHARD_BYTES", 100)
    sizes = np.random.default_rng(seed).integers(0, 40, 50).tolist()
    tensors = [TensorInfo(str(i), (size,), "U8", Path("model")) for i, size in enumerate(sizes)]
    parts = selection._cut(tensors, lambda tensor: tensor.size)
    assert [tensor for part in parts for tensor in part] == tensors
    assert len(parts) == -(-sum(sizes) // 100)
    mean = sum(sizes) / len(parts)
    assert all(abs(sum(tensor.size for tensor in part) - mean) <= 40 for part in parts)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_torch_engine_has_finished_when_it_returns(device: str) -> None:
    """Memory that weights are read to is used again, and results are written at once."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    engine, rng = cli_checkpoint.torch_engine(device), np.random.default_rng(7)
    weight = cli_checkpoint.empty_for(device)((2048, 2048), ml_dtypes.bfloat16)
    importance = rng.lognormal(0, 2, 2048).astype(np.float32)
    for given, min_code in ((None, 1), (importance, 8), (None, 1)):
        drawn = rng.standard_normal(weight.shape, np.float32).astype(weight.dtype)
        amax = np.float32(nvfp4sweep.global_amax(drawn))
        weight[:] = drawn
        found = engine(weight, amax, given, min_code)
        weight[:] = 0
        expected = numpy_engine(drawn, amax, given, min_code)
        for one, other in zip(found, expected, strict=True):
            assert one.tobytes() == other.tobytes()
    importance[3] = np.nan
    with pytest.raises(ValueError, match=r"importance\[3\] is nan"):
        engine(weight, np.float32(1), importance, 1)


# --- interruptions ----------------------------------------------------------------------------------


def test_goes_on(model: Path, tmp_path: Path) -> None:
    """Stopped after any number of matrices, then run again, it ends as if it had not been stopped."""
    quantize_checkpoint(model, tmp_path / "whole")
    calls = 0

    def failing(limit: int) -> Engine:
        def engine(*arguments: Any) -> Packed:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise KeyboardInterrupt
            return numpy_engine(*arguments)

        return engine

    for limit in (0, 3, 9, 0, 2):  # the first shard has seven
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(model, tmp_path / "out", engines=[failing(limit)])
        assert not (tmp_path / "out").exists()
        assert not list((tmp_path / "out.partial").rglob("*.tmp"))
    with pytest.raises(CheckpointError, match=r"out.partial is of another call"):
        quantize_checkpoint(model, tmp_path / "out", Settings(min_code=8))
    quantize_checkpoint(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_finished_but_for_the_last_step(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("nvfp4sweep.checkpoint.folders._sync", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    quantize_checkpoint(model, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(CheckpointError, match="out is there already"):
        quantize_checkpoint(model, tmp_path / "out")


def test_a_shard_is_finished_while_the_next_is_searched(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = [threading.Event() for _ in MODULES]
    count = itertools.count()

    def engine(*arguments: Any) -> Packed:
        searched[next(count)].set()
        return numpy_engine(*arguments)

    def sync(stream: Any) -> None:
        if stream.name.endswith(f"{FILES[0]}.tmp"):  # the first shard has seven matrices
            assert searched[7].wait(10)

    monkeypatch.setattr(writer, "_sync", sync)
    quantize_checkpoint(model, tmp_path / "out", engines=[engine])


def test_what_is_written_is_not_kept(model: Path, tmp_path: Path) -> None:
    before: weakref.ref[Array] | None = None

    def engine(*arguments: Any) -> Packed:
        nonlocal before
        deadline = time.monotonic() + 10
        while before and before() is not None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        found = numpy_engine(*arguments)
        before = weakref.ref(found.packed)
        return found

    settings = Settings(exclude=("experts",))  # what experts of a stack become is written together
    quantize_checkpoint(model, tmp_path / "out", settings, engines=[engine])


@pytest.mark.parametrize("file", FILES)
def test_a_shard_that_the_disk_refuses(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    quantize_checkpoint(model, tmp_path / "whole")

    def sync(stream: Any) -> None:
        if stream.name.endswith(f"{file}.tmp"):
            raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_sync", sync)
        with pytest.raises(OSError, match="full"):
            quantize_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    left = [path.name for path in (tmp_path / "out.partial").rglob("model*") if path.suffix != ".json"]
    assert left == FILES[: FILES.index(file)]
    quantize_checkpoint(model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def _interrupt(folder: Path) -> None:
    raise KeyboardInterrupt


def _slow_engine(*arguments: Any) -> Packed:
    time.sleep(0.01)
    return numpy_engine(*arguments)


def _run(model: Path, out: Path) -> None:
    quantize_checkpoint(model, out, engines=[_slow_engine])


def test_killed_at_any_moment(model: Path, tmp_path: Path) -> None:
    """SIGKILL 50 times: after each there is no checkpoint, or a whole one."""
    quantize_checkpoint(model, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    rng = random.Random(0)
    out = tmp_path / "out"
    kills = 0
    longest = 0.2
    while kills < 50:
        process = context.Process(target=_run, args=(model, out))
        start = time.monotonic()
        process.start()
        process.join(rng.uniform(0, longest))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            longest *= 1.05
        else:
            assert process.exitcode == 0
            longest = 1.2 * (time.monotonic() - start)
        if out.exists():
            assert contents(out) == whole
            shutil.rmtree(out)
            shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    quantize_checkpoint(model, out)
    assert contents(out) == whole
