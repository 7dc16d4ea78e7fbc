"""nvfp4sweep quantize: names, bytes, configuration and refusals, on small folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import nvfp4sweep

pytest.importorskip("typer", reason="the extra [checkpoint] is not installed")
pytest.importorskip("safetensors", reason="the extra [checkpoint] is not installed")

from quantize_models import (
    ATTENTION,
    FILES,
    IGNORED,
    LAYER,
    MODULES,
    Array,
    contents,
    make_tensors,
    read_all,
    write_model,
)
from safetensors.numpy import save_file
from typer.testing import CliRunner

from nvfp4sweep import cli, cli_checkpoint, formats
from nvfp4sweep.checkpoint.layouts import COMPRESSED_TENSORS, LAYOUTS, MODELOPT, Layout
from nvfp4sweep.checkpoint.quantizer import quantize_checkpoint
from nvfp4sweep.checkpoint.reader import CheckpointError
from nvfp4sweep.checkpoint.selection import Selection
from nvfp4sweep.checkpoint.settings import Settings


def matrices_of(shards: list[dict[str, Array]]) -> dict[str, tuple[Array, np.float32]]:
    """Each module's matrix with the global amax that it must have."""
    tensors = shards[0] | shards[1]
    qkv = nvfp4sweep.global_amax(*(tensors[f"{name}.weight"] for name in ATTENTION))
    o_proj = tensors[f"{LAYER}self_attn.o_proj.weight"]
    expected = {name: (tensors[f"{name}.weight"], np.float32(qkv)) for name in ATTENTION}
    expected[f"{LAYER}self_attn.o_proj"] = (o_proj, np.abs(o_proj).max())
    for i in range(3):
        prefix = f"{LAYER}mlp.experts.{i}."
        both, down = (tensors[f"{LAYER}mlp.experts.{name}_proj"][i] for name in ("gate_up", "down"))
        most = np.abs(both).max().astype(np.float32)
        expected |= {f"{prefix}gate_proj": (both[:16], most), f"{prefix}up_proj": (both[16:], most)}
        expected[f"{prefix}down_proj"] = (down, np.float32(np.abs(down).max() or 1))
    return expected


def dequantized(found: dict[str, Array], module: str, layout: Layout) -> Array:
    packed, scale = found[f"{module}.{layout.packed}"], found[f"{module}.{layout.scale}"]
    second = found[f"{module}.{layout.global_scale}"]
    assert second.shape == layout.scalar_shape
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)
    points = formats.E2M1_VALUES[codes & 7] * np.where(codes & 8, -1, 1)
    scales = scale.astype(np.float32)
    scales = scales / second.reshape(()) if layout.reciprocal else scales * second.reshape(())
    return (points * np.repeat(scales, 16, axis=1)).astype(np.float32)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda layout: layout.name)
@pytest.mark.parametrize("input_scale", [None, 0.5])
def test_layouts(model: Path, tmp_path: Path, layout: Layout, input_scale: float | None) -> None:
    before = contents(model)
    out = tmp_path / "out"
    written = quantize_checkpoint(model, out, Settings(layout, input_scale))
    assert contents(model) == before
    assert sorted(written.modules) == MODULES
    assert sorted(written.ignored) == IGNORED
    found = read_all(out)
    expected = matrices_of(make_tensors())
    for module, (weight, amax) in expected.items():
        exact = nvfp4sweep.quantize(np.ascontiguousarray(weight), global_amax=amax)
        np.testing.assert_array_equal(found[f"{module}.{layout.packed}"], exact.packed)
        scale = found[f"{module}.{layout.scale}"]
        assert scale.dtype == ml_dtypes.float8_e4m3fn
        np.testing.assert_array_equal(scale.view(np.uint8), np.asarray(exact.scale).view(np.uint8))
        np.testing.assert_allclose(
            dequantized(found, module, layout), exact.dequantize(), rtol=2**-22, atol=0
        )
        if input_scale is not None:
            expected_scale = 1 / input_scale if layout.reciprocal else input_scale
            stored = found[f"{module}.{layout.input_scale}"]
            assert stored.shape == layout.scalar_shape
            assert stored == expected_scale
    tensors = {name: array for shard in make_tensors() for name, array in shard.items()}
    copied = sorted(name for names in written.skipped.values() for name in names)
    assert written.n_bytes == sum(array.nbytes for array in found.values())
    for name in copied:
        assert found[name].tobytes() == tensors[name].tobytes()
    extra = 4 if input_scale is not None else 3
    assert len(found) == extra * len(MODULES) + len(copied)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "original" / "params.json").read_text() == "[1]"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_configurations(model: Path, tmp_path: Path) -> None:
    quantize_checkpoint(model, tmp_path / "a", Settings(MODELOPT))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["hidden_size"] == 32
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["quant_algo"]) == ("modelopt", "W4A16_NVFP4")
    assert sorted(quantization["ignore"]) == IGNORED
    assert "input_activations" not in quantization["config_groups"]["group_0"]
    other = json.loads((tmp_path / "a" / "hf_quant_config.json").read_text())["quantization"]
    assert other == {
        "quant_algo": "W4A16_NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": quantization["ignore"],
    }

    quantize_checkpoint(model, tmp_path / "b", Settings(COMPRESSED_TENSORS, input_scale=1.0))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["format"] == "nvfp4-pack-quantized"
    assert quantization["config_groups"]["group_0"]["input_activations"]["dynamic"] == "local"
    assert not (tmp_path / "b" / "hf_quant_config.json").exists()


def test_selection(model: Path, tmp_path: Path) -> None:
    settings = Settings(include=(r"^lm_head",), exclude=(r"o_proj", r"experts"), groups=(r"(q_proj|lm_)",))
    written = quantize_checkpoint(model, tmp_path / "out", settings)
    assert sorted(written.modules) == sorted([*ATTENTION, "lm_head"])
    assert written.skipped["excluded by the caller"] == (
        f"{LAYER}mlp.experts.down_proj",
        f"{LAYER}mlp.experts.gate_up_proj",
        f"{LAYER}self_attn.o_proj.weight",
    )


def test_what_is_searched_before_all(model: Path) -> None:
    """Weights that share a scale across shards, and with skip_bad all."""
    attention = {f"{name}.weight" for name in ATTENTION}
    experts = {f"{LAYER}mlp.experts.{name}_proj" for name in ("gate_up", "down")}
    assert {tensor.name for tensor in Selection(model, Settings()).early} == attention
    grouped = Selection(model, Settings(groups=("experts",)))
    assert {tensor.name for tensor in grouped.early} == attention | experts
    selected = Selection(model, Settings(skip_bad=True))
    assert selected.early == selected.plan.tensors


def test_experts_share_no_scale_with_a_matrix(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"down_proj and .*o_proj.weight share a scale, but not their"):
        quantize_checkpoint(model, tmp_path / "out", Settings(groups=("(?:down|o)_proj",)))
    assert not (tmp_path / "out.partial").exists()


def test_groups_that_overlap(model: Path, tmp_path: Path) -> None:
    quantize_checkpoint(model, tmp_path / "out", Settings(groups=(r"self_attn\.(?:v|o)_proj",)))
    found = read_all(tmp_path / "out")
    names = [*ATTENTION, f"{LAYER}self_attn.o_proj"]
    assert len({float(found[f"{name}.weight_scale_2"]) for name in names}) == 1


def test_scales(model: Path, tmp_path: Path) -> None:
    quantize_checkpoint(model, tmp_path / "out", Settings(min_code=100, scale_max=256))
    found = read_all(tmp_path / "out")
    for module, (weight, amax) in matrices_of(make_tensors()).items():
        amax = np.float32(amax * np.float32(448 / 256)) if np.any(weight) else np.float32(448 / 256)
        exact = nvfp4sweep.quantize(np.ascontiguousarray(weight), global_amax=amax, min_code=100)
        scale = found[f"{module}.weight_scale"].view(np.uint8)
        np.testing.assert_array_equal(scale, np.asarray(exact.scale).view(np.uint8))
        assert scale.min() >= 100


@pytest.mark.parametrize("model_type", ["llama4", "gpt_oss"])
def test_transposed_experts(tmp_path: Path, model_type: str) -> None:
    rng = np.random.default_rng(3)
    both = rng.standard_normal((2, 32, 24)).astype(np.float32)  # [E, K, N]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    write_model(tmp_path / "model", [{name: both}, {"counter": np.zeros(1, np.int64)}], model_type=model_type)
    quantize_checkpoint(tmp_path / "model", tmp_path / "out")
    found = read_all(tmp_path / "out")
    for i in range(2):
        rows = both[i].T
        parts = (rows[0::2], rows[1::2]) if model_type == "gpt_oss" else (rows[:12], rows[12:])
        for part, layer in zip(parts, ("gate_proj", "up_proj"), strict=True):
            exact = nvfp4sweep.quantize(np.ascontiguousarray(part), global_amax=np.abs(both[i]).max())
            packed = found[f"model.layers.0.mlp.experts.{i}.{layer}.weight"]
            np.testing.assert_array_equal(packed, exact.packed)


def test_importance(model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    h = {
        f"{LAYER}self_attn.o_proj.weight": rng.lognormal(0, 2, 32).astype(np.float32),
        f"{LAYER}mlp.experts.down_proj": rng.lognormal(0, 2, (3, 16)).astype(np.float32),
    }
    save_file(h, tmp_path / "importance.safetensors")
    quantize_checkpoint(model, tmp_path / "out", importance=tmp_path / "importance.safetensors")
    found = read_all(tmp_path / "out")
    expected = matrices_of(make_tensors())
    weighed = {f"{LAYER}self_attn.o_proj": h[f"{LAYER}self_attn.o_proj.weight"]}
    weighed |= {f"{LAYER}mlp.experts.{i}.down_proj": h[f"{LAYER}mlp.experts.down_proj"][i] for i in range(3)}
    for module, (weight, amax) in expected.items():
        exact = nvfp4sweep.quantize(
            np.ascontiguousarray(weight), global_amax=amax, importance=weighed.get(module)
        )
        np.testing.assert_array_equal(found[f"{module}.weight"], exact.packed)
    save_file({f"{LAYER}self_attn.o_proj.weight": np.ones(16, np.float32)}, tmp_path / "bad.safetensors")
    with pytest.raises(
        CheckpointError, match=r"o_proj.weight .* has the shape \(16,\), and must have \(32,\)"
    ):
        quantize_checkpoint(model, tmp_path / "bad", importance=tmp_path / "bad.safetensors")
    assert not (tmp_path / "bad").exists()


# --- faults -----------------------------------------------------------------------------------------


def corrupt_header(model: Path) -> None:
    path = model / FILES[1]
    path.write_bytes(path.read_bytes()[:8] + b"?" * 64)


def truncate(model: Path) -> None:
    path = model / FILES[1]
    path.write_bytes(path.read_bytes()[:-7])


def quantized_already(model: Path) -> None:
    (model / "config.json").write_text('{"quantization_config": {}}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, FILES[1]),
        (corrupt_header, FILES[1]),
        (lambda model: (model / FILES[0]).unlink(), FILES[0]),
        (lambda model: (model / "config.json").unlink(), "config.json cannot be read"),
        (lambda model: (model / "config.json").write_text("{"), "config.json is not JSON"),
        (quantized_already, "quantized already"),
    ],
)
def test_bad_inputs(model: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(model)
    before = contents(model)
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(model, tmp_path / "out")
    assert contents(model) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_bad_folders(model: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for out, message in (
        (model, "must not lie in each other"),
        (model / "out", "must not lie in each other"),
        (tmp_path, "must not lie in each other"),
        (tmp_path / "full", "full is there already"),
        (tmp_path / "none" / "out", "none does not exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            quantize_checkpoint(model, out)
    (tmp_path / "empty").mkdir()
    quantize_checkpoint(model, tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "full", "model"]


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    shards = make_tensors()
    name = f"{LAYER}self_attn.o_proj.weight"
    shards[1][name][3, 5] = np.nan
    model = write_model(tmp_path / "model", shards)
    with pytest.raises(ValueError, match=rf"{name}: weight\[3, 5\] is nan"):
        quantize_checkpoint(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / "out.partial")
    written = quantize_checkpoint(model, tmp_path / "out", Settings(skip_bad=True))
    assert written.skipped["NaN or infinity"] == (name,)
    assert name.removesuffix(".weight") in written.ignored
    assert read_all(tmp_path / "out")[name].tobytes() == shards[1][name].tobytes()


def test_bad_settings(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exclude: '\(' is not a regular expression"):
        Settings(exclude=("(",))
    with pytest.raises(ValueError, match="input_scale=0 must be positive"):
        Settings(input_scale=0)
    with pytest.raises(ValueError, match=r"scale_max=449 must lie in \(0, 448\]"):
        Settings(scale_max=449)
    with pytest.raises(CheckpointError, match=r"uneven.weight has a K that 16 does not divide"):
        quantize_checkpoint(model, tmp_path / "out", Settings(strict=True))


def test_command(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(model), str(out), "--device", "cpu", "--layout", "compressed-tensors"]
    result = CliRunner().invoke(cli.app, [*arguments, "--exclude", "experts"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "4 matrices in NVFP4, 8 tensors as they were" in result.output
    assert "excluded by the caller: 2" in result.output
    assert len(read_all(out)) == 4 * 3 + 8
    again = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert again.exit_code == 2
    assert "out is there already" in again.output
    for option, value in (("--layout", "gguf"), ("--min-code", "0"), ("--device", "tpu")):
        bad = CliRunner().invoke(cli.app, ["quantize", str(model), str(tmp_path / "x"), option, value])
        assert bad.exit_code == 2, option
    assert not (tmp_path / "x.partial").exists()


def test_torch_engine_is_the_same(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    quantize_checkpoint(model, tmp_path / "a")
    quantize_checkpoint(model, tmp_path / "b", engines=[cli_checkpoint.torch_engine("cpu")] * 2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.gpu
@pytest.mark.parametrize("most_pinned", [2**30, 0])
def test_cuda_is_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_pinned: int
) -> None:
    """On all CUDA devices, from memory of either kind."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr(cli_checkpoint, "_MOST_PINNED", most_pinned)
    for device in ("cpu", "cuda"):
        result = CliRunner().invoke(
            cli.app, ["quantize", str(model), str(tmp_path / device), "--device", device]
        )
        assert result.exit_code == 0, result.output
    assert contents(tmp_path / "cpu") == contents(tmp_path / "cuda")
