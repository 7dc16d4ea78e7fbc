"""`nvfp4sweep quantize` on a Llama made up for it: end to end, beside a copy of its files and its parts.

    python -m benchmarks.checkpoint FOLDER [--layers N] [--device cpu|cuda] [--ledger FILE]

FOLDER is a new folder on the disk to be measured; it is removed. The files are dropped from the page cache
before each time they are read, where the system does as it is asked. Some matrices of the result are
compared with the oracle first.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

import nvfp4sweep
from benchmarks import gate, ledger
from nvfp4sweep.checkpoint import Settings, numpy_engine, quantize_checkpoint
from nvfp4sweep.checkpoint.quantizer import Engine, Packed
from nvfp4sweep.checkpoint.reader import Checkpoint
from nvfp4sweep.checkpoint.writer import Entry, open_shard, write_json
from nvfp4sweep.cli_checkpoint import torch_engine
from nvfp4sweep.cli_common import resolve_devices

Array = npt.NDArray[Any]

# Of Llama 3.1 8B.
_HIDDEN, _INTERMEDIATE, _KEYS, _VOCABULARY = 4096, 14336, 1024, 128256
_LAYERS_A_SHARD = 8
_POOL = 2**27  # elements, of which all weights are cut
_CHECKED_ROWS = 512


def _layer(i: int) -> dict[str, tuple[int, ...]]:
    attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
    return {
        f"{attention}q_proj.weight": (_HIDDEN, _HIDDEN),
        f"{attention}k_proj.weight": (_KEYS, _HIDDEN),
        f"{attention}v_proj.weight": (_KEYS, _HIDDEN),
        f"{attention}o_proj.weight": (_HIDDEN, _HIDDEN),
        f"{mlp}gate_proj.weight": (_INTERMEDIATE, _HIDDEN),
        f"{mlp}up_proj.weight": (_INTERMEDIATE, _HIDDEN),
        f"{mlp}down_proj.weight": (_HIDDEN, _INTERMEDIATE),
        f"model.layers.{i}.input_layernorm.weight": (_HIDDEN,),
        f"model.layers.{i}.post_attention_layernorm.weight": (_HIDDEN,),
    }


def make_model(folder: Path, layers: int) -> None:
    """Gaussian bfloat16 weights, shards of _LAYERS_A_SHARD layers."""
    folder.mkdir(parents=True)
    pool = np.random.default_rng(0).standard_normal(_POOL, np.float32).astype(ml_dtypes.bfloat16)
    bits = pool.view(np.uint8)
    groups: list[dict[str, tuple[int, ...]]] = []
    for i in range(layers):
        if i % _LAYERS_A_SHARD == 0:
            groups.append({})
        groups[-1] |= _layer(i)
    groups[0]["model.embed_tokens.weight"] = (_VOCABULARY, _HIDDEN)
    groups[-1] |= {"lm_head.weight": (_VOCABULARY, _HIDDEN), "model.norm.weight": (_HIDDEN,)}
    weight_map = {}
    offset = 0
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        entries = [Entry(name, "BF16", shape, 2 * int(np.prod(shape))) for name, shape in group.items()]
        with open_shard(folder / file, entries) as shard:
            for entry in entries:
                offset = (offset + 2 * 7919 * 16) % (bits.size // 2)
                shard.write(entry.name, _cut(bits, offset, entry.n_bytes))
                weight_map[entry.name] = file
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(folder / "config.json", {"model_type": "llama", "num_hidden_layers": layers})


def _cut(bits: npt.NDArray[np.uint8], offset: int, n_bytes: int) -> list[memoryview]:
    parts = []
    while n_bytes:
        part = bits[offset : offset + n_bytes]
        parts.append(part.data)
        n_bytes -= part.size
        offset = 0
    return parts


class _Timed:
    """An engine, and the seconds that its calls took together."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, threading.Lock()
        self.seconds = 0.0

    def __call__(self, matrix: Array, amax: np.float32, importance: Array | None, min_code: int) -> Packed:
        start = time.perf_counter()
        found = self._engine(matrix, amax, importance, min_code)
        with self._lock:
            self.seconds += time.perf_counter() - start
        return found


def _forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    if hasattr(os, "posix_fadvise"):
        for path in folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for path in target.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # as quantize does
        os.close(descriptor)


def _parts(source: Path, out: Path, engine: Engine) -> dict[str, float]:
    """Seconds of each step by itself, one tensor after another: what quantize does at the same time."""
    checkpoint = Checkpoint(source)
    steps = dict.fromkeys(("read", "amax", "quantize"), 0.0)
    for tensor in checkpoint.tensors:
        if "_proj" not in tensor.name:
            continue
        start = time.perf_counter()
        weight = checkpoint.read(tensor)
        read = time.perf_counter()
        amax = nvfp4sweep.global_amax(weight)
        found = time.perf_counter()
        engine(weight, np.float32(amax), None, 1)
        steps["read"] += read - start
        steps["amax"] += found - read
        steps["quantize"] += time.perf_counter() - found
        del weight
    _forget(out)
    steps["copy_result"] = _seconds(lambda: _copy(out, out.with_name("copied")))
    shutil.rmtree(out.with_name("copied"))
    return {name: round(seconds, 3) for name, seconds in steps.items()}


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ledger", type=Path, default=ledger.PATH)
    arguments = parser.parse_args()
    folder, source, out = arguments.folder, arguments.folder / "model", arguments.folder / "out"
    devices = resolve_devices(arguments.device)
    kind = devices[0].partition(":")[0]
    entry: dict[str, Any] = {
        **ledger.environment(_device_name(devices)),
        "benchmark": f"checkpoint_{kind}",
        "host": ledger.processor(),
        "layers": arguments.layers,
    }
    try:
        make_model(source, arguments.layers)
        n_bytes = sum(path.stat().st_size for path in source.iterdir())
        engines = [_Timed(numpy_engine if kind == "cpu" else torch_engine(device)) for device in devices]
        for engine in engines:  # compiled, or loaded, before the clock starts
            engine(np.ones((256, 256), ml_dtypes.bfloat16), np.float32(1), None, 1)
            engine.seconds = 0.0
        _forget(source)
        copy = _seconds(lambda: _copy(source, folder / "copy"))
        shutil.rmtree(folder / "copy")
        _forget(source)
        whole = _seconds(lambda: quantize_checkpoint(source, out, Settings(), engines=engines))
        compute = sum(engine.seconds for engine in engines)
        entry |= {
            "input_bytes": n_bytes,
            "output_bytes": sum(path.stat().st_size for path in out.iterdir()),
            "blocks_compared": _check(source, out),
            "seconds": {
                "copy": round(copy, 3),
                "quantize_checkpoint": round(whole, 3),
                "engine": round(compute, 3),
            },
            "input_gb_per_second": round(n_bytes / whole / 1e9, 3),
            "copy_gb_per_second": round(n_bytes / copy / 1e9, 3),
        }
        _forget(source)
        entry["parts_seconds"] = _parts(source, out, engines[0])
        shutil.rmtree(source)
        shutil.rmtree(out)
        if kind == "cpu":
            entry |= _peaks(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ledger.append(entry, arguments.ledger)


def _device_name(devices: list[str]) -> str:
    if devices[0] == "cpu":
        return ledger.processor()
    import torch

    return f"{len(devices)} x {torch.cuda.get_device_name()}"


if __name__ == "__main__":
    main()
