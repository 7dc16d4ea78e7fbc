"""nvfp4sweep quantize in several processes, as torchrun starts them; and disks that refuse."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer", reason="the extra [checkpoint] is not installed")
pytest.importorskip("safetensors", reason="the extra [checkpoint] is not installed")
pytest.importorskip("torch", reason="PyTorch is not installed")

from quantize_models import contents
from safetensors.numpy import save_file

from nvfp4sweep.checkpoint.engines import Packed, numpy_engine
from nvfp4sweep.checkpoint.passes import STAGES
from nvfp4sweep.checkpoint.quantizer import quantize_checkpoint
from nvfp4sweep.checkpoint.reader import CheckpointError

_LIMIT = 120  # seconds


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards; layers that share a scale lie in different ones."""
    folder = tmp_path_factory.mktemp("model") / "model"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        name = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj")[i]
        tensors = {
            f"model.layers.{j}.self_attn.{name}.weight": (rng.standard_normal((48, 64)) * (i + 1)).astype(
                np.float32
            )
            for j in range(3)
        }
        save_file(tensors | {f"norm.{i}.weight": np.ones(7, np.float32)}, folder / f"{i}.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture(scope="module")
def whole(model: Path) -> dict[str, bytes]:
    out = model.parent / "whole"
    quantize_checkpoint(model, out)
    return contents(out)


def start(model: Path, out: Path, size: int, **variables: str) -> list[subprocess.Popen[str]]:
    """The processes that torchrun would start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nvfp4sweep", "quantize", str(model), str(out), "--device", "cpu"]
    return [
        subprocess.Popen(
            command,
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "COLUMNS": "400", **variables,
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


class ThreadRanks:
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, given: list[object]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._given = barrier, given

    def gather(self, mine: object) -> list[object]:
        self._given[self.rank] = mine
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found


@pytest.mark.parametrize("size", [3, 7])
def test_who_reads_what(model: Path, whole: dict[str, bytes], tmp_path: Path, size: int) -> None:
    """All share what groups across shards need; of other weights a rank searches those that it quantizes."""
    barrier, given = threading.Barrier(size, timeout=_LIMIT), [None] * size
    read: list[dict[str, set[str]]] = [{stage: set() for stage in STAGES} for _ in range(size)]

    def work(rank: int) -> None:
        quantize_checkpoint(
            model, tmp_path / "out", ranks=ThreadRanks(rank, size, barrier, given),
            advance=lambda stage, tensor: read[rank][stage].add(tensor.name),
        )  # fmt: skip

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(work, range(size)))
    assert contents(tmp_path / "out") == whole
    alone = {f"model.layers.{j}.self_attn.{name}_proj.weight" for j in range(3) for name in ("o", "out")}
    assert all(mine["amax"] & alone == mine["quantize"] & alone for mine in read)
    assert all(mine["amax"] for mine in read)
    for stage in STAGES:
        assert sum(len(mine[stage]) for mine in read) == 15


def outputs(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """(exit code, what it printed) of each."""
    try:
        printed = [process.communicate(timeout=_LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


def test_ranks(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    done = outputs(start(model, tmp_path / "out", 3))
    assert [code for code, _ in done] == [0, 0, 0], done
    assert "15 matrices in NVFP4" in done[0][1]
    assert all("matrices" not in text for _, text in done[1:])
    assert contents(tmp_path / "out") == whole
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_part_before_they_end(
    model: Path, whole: dict[str, bytes], tmp_path: Path, *, fails: bool
) -> None:
    """What goes wrong then is no failure, and nothing that hides one."""
    size, out = 2, tmp_path / "out"
    barrier, given = threading.Barrier(size, timeout=_LIMIT), [None] * size
    parted: list[int] = []

    class Leaving(ThreadRanks):
        def gather(self, mine: object) -> list[object]:
            found = super().gather(mine)
            if mine is None:
                parted.append(self.rank)
                raise CheckpointError("another rank has ended")
            return found

    def engine(*arguments: Any) -> Packed:
        if fails:
            raise ValueError("broken")
        return numpy_engine(*arguments)

    def work(rank: int) -> None:
        quantize_checkpoint(model, out, engines=[engine], ranks=Leaving(rank, size, barrier, given))

    with ThreadPoolExecutor(size) as pool:
        ended = [pool.submit(work, rank) for rank in range(size)]
        if fails:
            assert all("broken" in str(one.exception()) for one in ended)
        else:
            assert [one.result() for one in ended] == [None, None]
            assert contents(out) == whole
    assert sorted(parted) == [0, 1]


def test_a_rank_that_fails(model: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(model, bad)
    weight = np.ones((48, 64), np.float32)
    weight[3, 5] = np.nan
    save_file({"model.layers.9.self_attn.o_proj.weight": weight}, bad / "5.safetensors")
    done = outputs(start(bad, tmp_path / "out", 2))
    assert [code for code, _ in done] == [2, 2], done
    name = "model.layers.9.self_attn.o_proj.weight: weight[3, 5] is nan"
    assert all(name in text for _, text in done)
    assert sum("rank" in text and "of 2 failed" in text for _, text in done) == 1
    assert not (tmp_path / "out").exists()


def test_a_rank_that_is_killed(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """The other says so and ends; then one process alone goes on from there."""
    out = tmp_path / "out"
    processes = start(model, out, 2)
    deadline = time.monotonic() + _LIMIT
    while not (tmp_path / "out.partial" / "state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    processes[1].kill()
    done = outputs(processes)
    assert done[1][0] == -signal.SIGKILL
    assert done[0][0] == 2, done
    assert "another rank has ended" in done[0][1]
    assert not out.exists()
    quantize_checkpoint(model, out)
    assert contents(out) == whole


# --- disks ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where the system lets us mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def command(model: Path, out: Path, *before: str) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "nvfp4sweep", "quantize", str(model), str(out), "--device", "cpu"]
    environment = {**os.environ, "COLUMNS": "400"}
    return subprocess.run([*before, *arguments], capture_output=True, text=True, env=environment)


def test_full_disk(model: Path, whole: dict[str, bytes], small_disk: Path) -> None:
    before = contents(model)
    (small_disk / "filler").write_bytes(bytes(30_000))
    done = command(model, small_disk / "out")
    assert done.returncode == 2
    assert "No space left on device" in done.stderr
    assert not (small_disk / "out").exists()
    assert not list(small_disk.rglob("*.tmp"))
    assert contents(model) == before
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert command(model, small_disk / "out").returncode == 0
    assert contents(small_disk / "out") == whole


def test_read_only_disk(model: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = command(model, small_disk / "out")
    assert done.returncode == 2
    assert "Read-only file system" in done.stderr
    assert list(small_disk.iterdir()) == []


def test_files_that_may_not_grow(model: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """As on a full disk, wherever the tests run."""
    done = command(model, tmp_path / "out", "sh", "-c", 'ulimit -f 8 && exec "$@"', "sh")
    assert done.returncode == 2
    assert "File too large" in done.stderr
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert command(model, tmp_path / "out").returncode == 0
    assert contents(tmp_path / "out") == whole
