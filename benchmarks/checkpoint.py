"""`nvfp4sweep quantize` on a Llama made up for it: end to end, and its parts by themselves.

    python -m benchmarks.checkpoint FOLDER [--layers N] [--device cpu|cuda] [--runs PxD ...] [--ledger FILE]

PxD is a run of P processes with D devices each, P > 1 by torchrun; 1 x all devices where none is given.
FOLDER is a new folder on the disk to be measured; it is removed. The files are dropped from the page cache
before each time they are read, where the system does as it is asked. Some matrices of the first run's result
are compared with the oracle, and all bytes of the others' with the first's.
"""

import argparse
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from benchmarks import gate, ledger
from benchmarks.checkpoint_model import make_model
from benchmarks.checkpoint_parts import forget, parts, step
from nvfp4sweep.checkpoint import Settings
from nvfp4sweep.checkpoint.reader import Checkpoint
from nvfp4sweep.checkpoint.selection import Selection
from nvfp4sweep.checkpoint.writer import Entry, open_shard, write_json
from nvfp4sweep.cli_common import resolve_devices

_CHECKED_ROWS = 512


class _Run(NamedTuple):
    processes: int
    devices_each: int

    @property
    def devices(self) -> int:
        """In all."""
        return self.processes * self.devices_each

    def __str__(self) -> str:
        return f"{self.processes}x{self.devices_each}"


def _run_of(text: str) -> _Run:
    if not re.fullmatch(r"[1-9]\d*x1|1x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be 1xD, or Px1: each of several processes has one")
    processes, _, devices = text.partition("x")
    return _Run(int(processes), int(devices))


def _measure(run: _Run, source: Path, out: Path, kind: str) -> dict[str, Any]:
    """In processes of its own."""
    forget(source)
    result = out.with_name("result.json")
    start = [sys.executable, "-m"]
    if run.processes > 1:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(run.processes), "-m"]
        start += torchrun
    command = [*start, "benchmarks.checkpoint_process", str(source), str(out), str(result), "--device", kind]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(run.devices)))).split(",")
    limited = {"CUDA_VISIBLE_DEVICES": ",".join(visible[: run.devices])} if kind == "cuda" else {}
    subprocess.run(command, check=True, env=os.environ | limited)
    found = json.loads(result.read_text())
    result.unlink()
    devices = run.devices if kind == "cuda" else 1  # which all processes share
    return {"processes": run.processes, "devices": devices, **found}


def _check(source: Path, out: Path) -> int:
    """The number of blocks compared with the oracle."""
    dense, stored = Checkpoint(source), Checkpoint(out)
    scales = {tensor.name: tensor for tensor in stored.tensors if tensor.name.endswith(".weight_scale")}
    blocks = 0
    for tensor in [t for t in dense.tensors if t.name.endswith(("o_proj.weight", "down_proj.weight"))][:4]:
        weight = dense.read(tensor)
        amax = np.float32(np.abs(weight.astype(np.float32)).max())
        rows = np.linspace(0, len(weight) - 1, _CHECKED_ROWS).astype(int)
        scale = scales[f"{tensor.name}_scale"]
        code = np.frombuffer(b"".join(stored.chunks(scale)), np.uint8).reshape(scale.shape)
        blocks += gate.require_equal(tensor.name, code[rows], gate.oracle_codes(weight[rows], amax))
    return blocks


def _require_same(run: _Run, out: Path, first: Path) -> None:
    """SystemExit if a byte differs."""
    names = {
        str(path.relative_to(folder))
        for folder in (out, first)
        for path in folder.rglob("*")
        if path.is_file()
    }
    _, different, unread = filecmp.cmpfiles(out, first, names, shallow=False)
    if different or unread:
        raise SystemExit(f"{run}: {min(different + unread)} is not that of the first run: not recorded")


def _peak_bytes(source: Path, out: Path) -> int:
    """Of a process that quantizes."""
    command = [sys.executable, "-m", "nvfp4sweep", "quantize", str(source), str(out), "--device", "cpu"]
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command], check=True, capture_output=True, text=True
    )
    shutil.rmtree(out)
    return int(done.stdout) * 1024


def _peaks(folder: Path) -> dict[str, int]:
    """Peak memory with a large stack of experts, and with next to nothing, which is what programs take."""
    shapes = {"least": (1, 32, 64), "stack": (32, 4096, 2048)}
    peaks = {}
    for name, shape in shapes.items():
        source = folder / name
        source.mkdir()
        entries = [
            Entry(f"model.layers.{i}.mlp.experts.down_proj", "BF16", shape, 2 * int(np.prod(shape)))
            for i in range(4)
        ]
        values = np.random.default_rng(0).standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        with open_shard(source / "model.safetensors", entries) as shard:
            for entry in entries:
                shard.write(entry.name, [values.view(np.uint8).data])
        write_json(source / "config.json", {"model_type": "qwen3_moe"})
        peaks[name] = _peak_bytes(source, folder / "out")
        shutil.rmtree(source)
    return {
        "largest_tensor_bytes": 2 * int(np.prod(shapes["stack"])),
        "peak_bytes": peaks["stack"],
        "peak_bytes_of_next_to_nothing": peaks["least"],
    }


def _measure_all(folder: Path, layers: int, devices: Sequence[str], runs: Sequence[_Run]) -> dict[str, Any]:
    """In `folder`, which is not there yet."""
    source, out, other = folder / "model", folder / "out", folder / "other"
    kind = devices[0].partition(":")[0]
    with step("model"):
        make_model(source, layers)
    rows: list[dict[str, Any]] = []
    for run in runs:
        first = not rows
        with step(f"run {run}"):
            rows.append(_measure(run, source, out if first else other, kind))
        print(json.dumps(rows[-1]), flush=True)
        if first:
            with step("oracle"):
                blocks = _check(source, out)
        else:
            with step("comparison"):
                _require_same(run, other, out)
            shutil.rmtree(other)
    selection = Selection(source, Settings())
    entry = {
        "layers": layers,
        "input_bytes": _n_bytes(source),
        "output_bytes": _n_bytes(out),
        "weight_bytes": sum(map(selection.checkpoint.n_bytes, selection.plan.tensors)),
        "blocks_compared": blocks,
        "parts_seconds": parts(selection, out, devices[0]),
        "runs": rows,
    }
    shutil.rmtree(source)
    shutil.rmtree(out)
    if kind == "cpu":
        with step("peaks"):
            entry |= _peaks(folder)
    return entry


def _n_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--runs", type=_run_of, nargs="+", metavar="PxD")
    parser.add_argument("--ledger", type=Path, default=ledger.PATH)
    arguments = parser.parse_args()
    devices = resolve_devices(arguments.device)
    kind = devices[0].partition(":")[0]
    runs = arguments.runs or [_Run(1, len(devices))]
    for run in runs:
        if run.devices > len(devices) and (kind == "cuda" or run.devices_each > 1):
            parser.error(f"--runs {run}: there are {len(devices)} devices")
    entry = {
        **ledger.environment(_device_name(kind)),
        "benchmark": f"checkpoint_{kind}",
        "devices": len(devices),
        "host": ledger.processor(),
    }
    arguments.folder.mkdir(parents=True)
    try:
        entry |= _measure_all(arguments.folder, arguments.layers, devices, runs)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    ledger.append(entry, arguments.ledger)


def _device_name(kind: str) -> str:
    if kind == "cpu":
        return ledger.processor()
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
