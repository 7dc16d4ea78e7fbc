"""NVFP4 checkpoints for tests to edit, what to edit them with, and what their values are."""

import functools
import json
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantize_models import (
    ATTENTION,
    DTYPES,
    FILES,
    LAYER,
    MODULES,
    contents,
    make_tensors,
    write_model,
)
from safetensors import deserialize
from typer.testing import CliRunner

import nvfp4sweep
from nvfp4sweep import cli, formats
from nvfp4sweep.checkpoint.layouts import COMPRESSED_TENSORS, LAYOUTS, MODELOPT, Layout
from nvfp4sweep.checkpoint.quantizer import quantize_checkpoint
from nvfp4sweep.checkpoint.reader import CheckpointError, TensorInfo
from nvfp4sweep.checkpoint.settings import Settings
from nvfp4sweep.checkpoint.verifier import Verifier
from nvfp4sweep.checkpoint.writer import Entry, open_shard

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
O_PROJ = f"{LAYER}self_attn.o_proj"
EXPERT = f"{LAYER}mlp.experts.1."
OTHER = {MODELOPT.name: COMPRESSED_TENSORS, COMPRESSED_TENSORS.name: MODELOPT}
BOTH = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)


def make(folder: Path, layout: Layout, input_scale: float | None = None) -> Path:
    """folder/in, a checkpoint of two shards, and folder/model, which it was made of."""
    for name, content in _made(layout.name, input_scale).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder / "in"


@functools.cache
def _made(layout: str, input_scale: float | None) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model", make_tensors())
        quantize_checkpoint(model, folder / "in", Settings(LAYOUTS[layout], input_scale))
        return contents(folder)


def edit_tensors(folder: Path, edit: Callable[[Tensors], object]) -> None:
    """Of each shard; the index follows."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    weight_map = {}
    for file in FILES:
        tensors = {
            name: np.frombuffer(bytes(t["data"]), DTYPES[t["dtype"]]).reshape(t["shape"])
            for name, t in deserialize((folder / file).read_bytes())
        }
        edit(tensors)
        entries = [Entry(name, names[a.dtype], a.shape, a.nbytes) for name, a in tensors.items()]
        with open_shard(folder / file, entries) as shard:
            for name, array in tensors.items():
                shard.write(name, [array.tobytes()])
        weight_map |= dict.fromkeys(tensors, file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": weight_map}))


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object], file: str = "config.json") -> None:
    content = json.loads((folder / file).read_text())
    edit(content)
    (folder / file).write_text(json.dumps(content))


def quantization(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]  # type: ignore[no-any-return]


def run(*arguments: object) -> tuple[int, str]:
    """The exit code of the command, and what it prints."""
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], env={"COLUMNS": "400"})
    return result.exit_code, result.output


def problems(folder: Path) -> list[str]:
    return [str(problem) for problem in Verifier(folder).problems()]


def scalars(found: Tensors, end: str) -> dict[str, np.float32]:
    return {m: found[f"{m}.{end}"].reshape(())[()] for m in MODULES if f"{m}.{end}" in found}


def interrupting(after: int) -> Callable[[TensorInfo], None]:
    left = after

    def advance(tensor: TensorInfo) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1

    return advance


def values(found: Tensors, module: str, layout: Layout) -> list[Fraction]:
    packed, code = (found[f"{module}.{end}"].view(np.uint8) for end in (layout.packed, layout.scale))
    second = Fraction(float(found[f"{module}.{layout.global_scale}"].reshape(())))
    if layout.reciprocal:
        second = 1 / second
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(-1)
    points = formats.E2M1_VALUES[nibbles & 7] * np.where(nibbles & 8, -1, 1)
    products = points * np.repeat(formats.E4M3_VALUES[code].reshape(-1), 16)
    return [Fraction(product) * second for product in products]


def refused(call: Callable[[Path], object], folder: Path, message: str) -> None:
    """With this message, and nothing is left."""
    before = sorted(folder.iterdir())
    with pytest.raises(CheckpointError, match=message):
        call(folder / "out")
    assert sorted(folder.iterdir()) == before


def put(name: str, change: Callable[[Array], Array] | None) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        if name in tensors:
            array = tensors.pop(name)
            if change is not None:
                tensors[name] = change(array)

    return edit


def mismatch(folder: Path, layout: Layout) -> None:
    """Quantize q, k and v again, each under its own scale; q lies in another shard. Also an expert's gate."""
    dense = {name: array for shard in make_tensors() for name, array in shard.items()}
    weights = {name: dense[f"{name}.weight"] for name in ATTENTION}
    weights[f"{EXPERT}gate_proj"] = dense[f"{LAYER}mlp.experts.gate_up_proj"][1, :16] * np.float16(0.37)

    def edit(tensors: Tensors) -> None:
        for module, weight in weights.items():
            if f"{module}.{layout.packed}" in tensors:
                found = nvfp4sweep.quantize(np.ascontiguousarray(weight))
                new = layout.arrays(module, found.packed, found.scale, float(found.global_scale), None)
                tensors.update(new)
        for i, module in enumerate(ATTENTION):
            name = f"{module}.{layout.input_scale}"
            if name in tensors:
                tensors[name] = np.full(layout.scalar_shape, i + 2, np.float32)

    edit_tensors(folder, edit)
