"""nvfp4sweep verify: nothing to say of sound checkpoints, and something of each fault."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer", reason="the extra [checkpoint] is not installed")
pytest.importorskip("safetensors", reason="the extra [checkpoint] is not installed")

from quantize_models import ATTENTION, FILES, LAYER, MODULES
from safetensors import deserialize
from typer.testing import CliRunner

from nvfp4sweep import cli
from nvfp4sweep.checkpoint.layouts import COMPRESSED_TENSORS, LAYOUTS, MODELOPT, Layout
from nvfp4sweep.checkpoint.quantizer import quantize_checkpoint
from nvfp4sweep.checkpoint.reader import CheckpointError
from nvfp4sweep.checkpoint.settings import Settings
from nvfp4sweep.checkpoint.verifier import Verifier
from nvfp4sweep.checkpoint.writer import Entry, open_shard

O_PROJ = f"{LAYER}self_attn.o_proj"
Edit = Callable[[dict[str, Any]], None]


def edit_shard(folder: Path, edit: Edit) -> None:
    """Of the second shard, which holds O_PROJ; the index follows."""
    path = folder / FILES[1]
    tensors = {name: dict(tensor) for name, tensor in deserialize(path.read_bytes())}
    edit(tensors)
    entries = [Entry(n, t["dtype"], tuple(t["shape"]), len(t["data"])) for n, t in tensors.items()]
    with open_shard(path, entries) as shard:
        for name, tensor in tensors.items():
            shard.write(name, [bytes(tensor["data"])])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {name: file for name, file in index["weight_map"].items() if file != FILES[1]}
    index["weight_map"] = kept | dict.fromkeys(tensors, FILES[1])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def messages(folder: Path) -> list[str]:
    return [str(problem) for problem in Verifier(folder).problems()]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
@pytest.mark.parametrize("input_scale", [None, 1.0])
def test_ours_is_sound(model: Path, tmp_path: Path, layout: Layout, input_scale: float | None) -> None:
    quantize_checkpoint(model, tmp_path / "out", Settings(layout, input_scale))
    verifier = Verifier(tmp_path / "out")
    assert sorted(verifier.modules) == MODULES
    assert list(verifier.problems()) == []
    errors = {row.module: row for row in verifier.errors(model, {})}
    assert sorted(errors) == MODULES
    for row in errors.values():
        assert row.stored == pytest.approx(row.scales.exact, rel=1e-5)
        assert row.scales.absmax >= row.scales.exact


def drop(end: str) -> Edit:
    return lambda tensors: tensors.pop(f"{O_PROJ}.{end}")


def set_scale(byte: int) -> Edit:
    def edit(tensors: dict[str, Any]) -> None:
        data = bytearray(tensors[f"{O_PROJ}.weight_scale"]["data"])
        data[5] = byte
        tensors[f"{O_PROJ}.weight_scale"]["data"] = bytes(data)

    return edit


def set_scalar(value: float, shape: list[int], name: str = O_PROJ, end: str = "weight_scale_2") -> Edit:
    data = np.float32(value).tobytes()
    return lambda tensors: tensors[f"{name}.{end}"].update(shape=shape, data=data)


def transpose(tensors: dict[str, Any]) -> None:
    tensors[f"{O_PROJ}.weight_scale"]["shape"].reverse()


def as_bytes(tensors: dict[str, Any]) -> None:
    tensors[f"{O_PROJ}.weight_scale"]["dtype"] = "U8"


@pytest.mark.parametrize(
    ("layout", "edit", "message"),
    [
        (MODELOPT, drop("weight_scale"), f"{O_PROJ}: weight_scale is missing"),
        (MODELOPT, drop("weight_scale_2"), f"{O_PROJ}: weight_scale_2 is missing"),
        (COMPRESSED_TENSORS, drop("weight_packed"), f"{O_PROJ}: weight_packed is missing"),
        (MODELOPT, set_scale(0x7F), f"{O_PROJ}: 1 of 64 block scales are NaN"),
        (MODELOPT, set_scale(0xFF), f"{O_PROJ}: 1 of 64 block scales are NaN"),
        (COMPRESSED_TENSORS, set_scale(0), f"{O_PROJ}: 1 of 64 block scales are zero"),
        (MODELOPT, set_scale(0x80), f"{O_PROJ}: 1 of 64 block scales are zero"),
        (MODELOPT, set_scale(0x9A), f"{O_PROJ}: 1 of 64 block scales are negative"),
        (MODELOPT, set_scalar(1, [1]), f"{O_PROJ}: weight_scale_2 has the shape [1], not []"),
        (
            COMPRESSED_TENSORS,
            set_scalar(1, [], end="weight_global_scale"),
            f"{O_PROJ}: weight_global_scale has the shape [], not [1]",
        ),
        (
            MODELOPT,
            set_scalar(np.inf, []),
            f"{O_PROJ}: weight_scale_2 is [inf], and must be positive and finite",
        ),
        (MODELOPT, transpose, f"{O_PROJ}: weight_scale has the shape [2, 32], not [32, 2]"),
        (MODELOPT, as_bytes, f"{O_PROJ}: weight_scale is U8, and must be F8_E4M3"),
    ],
)
def test_faulty_tensors(model: Path, tmp_path: Path, layout: Layout, edit: Edit, message: str) -> None:
    quantize_checkpoint(model, tmp_path / "out", Settings(layout))
    edit_shard(tmp_path / "out", edit)
    assert messages(tmp_path / "out") == [message]


def test_groups_must_agree(model: Path, tmp_path: Path) -> None:
    quantize_checkpoint(model, tmp_path / "out")
    edit_shard(tmp_path / "out", set_scalar(1.0, [], ATTENTION[1]))
    (found,) = messages(tmp_path / "out")
    assert found.startswith(
        f"{ATTENTION[1]}: fused with q_proj, v_proj, and their global scales differ, up to "
    )


def edit_config(folder: Path, file: str, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / file).read_text())
    edit(content["quantization_config" if file == "config.json" else "quantization"])
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "edit", "message"),
    [
        ("config.json", lambda q: q.update(quant_method="gptq"), "config.json: quant_method is 'gptq'"),
        ("config.json", lambda q: q["ignore"].remove("lm_head"), "config.json: does not ignore lm_head"),
        (
            "config.json",
            lambda q: q["ignore"].append(O_PROJ),
            f"config.json: ignores {O_PROJ}, which is quantized",
        ),
        (
            "config.json",
            lambda q: q["ignore"].append("model.layers.0.self_attn"),
            f"config.json: ignores {ATTENTION[1]}",
        ),
        ("config.json", lambda q: q["ignore"].append("re:.*o_proj"), f"config.json: ignores {O_PROJ}"),
        (
            "config.json",
            lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=32),
            "config.json: config_groups: weights must have num_bits 4 and group_size 16",
        ),
        (
            "config.json",
            lambda q: q["config_groups"]["group_0"].update(input_activations={"num_bits": 4}),
            f"{MODULES[0]}: no input scale, as 13 modules",
        ),
        (
            "hf_quant_config.json",
            lambda q: q.pop("group_size"),
            "hf_quant_config.json: quantization has no group_size",
        ),
        (
            "hf_quant_config.json",
            lambda q: q["exclude_modules"].pop(),
            "hf_quant_config.json: exclude_modules is not what config.json ignores",
        ),
    ],
)
def test_faulty_configurations(
    model: Path, tmp_path: Path, file: str, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    quantize_checkpoint(model, tmp_path / "out")
    edit_config(tmp_path / "out", file, edit)
    assert messages(tmp_path / "out")[0].startswith(message)


def test_missing_files(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(model, out)
    (out / "hf_quant_config.json").unlink()
    assert messages(out) == ["hf_quant_config.json: is missing"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    del index["weight_map"]["counter"]
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{FILES[1]}: model.safetensors.index.json does not name counter, which is in it" in messages(out)
    (out / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        messages(out)
    with pytest.raises(CheckpointError, match="has no NVFP4 weight of modelopt or compressed-tensors"):
        Verifier(model)


def test_command(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(model, out)
    invoke = CliRunner().invoke
    result = invoke(cli.app, ["verify", str(out), "--against", str(model)])
    assert result.exit_code == 0, result.output
    assert "13 quantized modules, nothing wrong" in result.output
    assert f"{LAYER}mlp.experts.2.down_proj" in result.output
    edit_shard(out, set_scale(0))
    result = invoke(cli.app, ["verify", str(out)])
    assert result.exit_code == 1
    assert f"{O_PROJ}: 1 of 64 block scales are zero\n1 problems in 13 quantized modules" in result.output
    assert invoke(cli.app, ["verify", str(model)]).exit_code == 2
