"""Checkpoints that `nvfp4sweep quantize` writes, read by those who did not write it: `make peers`.

Their pins clash with the other tests', so this runs in an environment of its own.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import minilm
import mlx.core as mx
import modelopt.torch.quantization as mtq
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4 import helpers
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, Qwen2Config
from transformers.utils.quantization_config import CompressedTensorsConfig

import nvfp4sweep
from nvfp4sweep import formats, packing
from nvfp4sweep.checkpoint import COMPRESSED_TENSORS, MODELOPT, Settings, baselines, quantize_checkpoint

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "dense"
    torch.manual_seed(0)
    config = CONFIGS[request.param](**SHAPE)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def modules(tensors: dict[str, Any]) -> list[str]:
    found = [name.removesuffix(".weight_scale_2") for name in tensors if name.endswith(".weight_scale_2")]
    assert len(found) == 14
    return found


def dequantized(tensors: dict[str, Any], module: str) -> Any:
    """float32, by NumPy, from ModelOpt's layout."""
    packed, scale = tensors[f"{module}.weight"].numpy(), tensors[f"{module}.weight_scale"].float().numpy()
    second = tensors[f"{module}.weight_scale_2"].numpy()
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
    points = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[codes & 7] * np.where(codes & 8, -1, 1)
    return (points * np.repeat(scale * second, 16, axis=1)).astype(np.float32)


@pytest.fixture(scope="module")
def ours(model: Path) -> dict[str, Any]:
    folder = model.parent / "modelopt"
    quantize_checkpoint(model, folder, Settings(MODELOPT))
    return load_file(folder / "model.safetensors")  # type: ignore[no-any-return]


def test_transformers_and_compressed_tensors(model: Path, ours: dict[str, Any]) -> None:
    """The logits are those of the dense model with our values for weights, bit for bit."""
    folder = model.parent / "compressed-tensors"
    quantize_checkpoint(model, folder, Settings(COMPRESSED_TENSORS))
    twin = model.parent / "twin"
    shutil.copytree(model, twin)
    tensors = load_file(twin / "model.safetensors")
    for module in modules(ours):
        tensors[f"{module}.weight"] = torch.from_numpy(dequantized(ours, module)).bfloat16()
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(20)[None]
    logits = []
    for path in (folder, twin):
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        with torch.no_grad():
            logits.append(loaded(tokens).logits)
    assert torch.equal(*logits)


def test_compressed_tensors_packs_the_same_bytes(ours: dict[str, Any]) -> None:
    for module in modules(ours):
        packed = ours[f"{module}.weight"]
        rows, columns = packed.shape
        unpacked = helpers.unpack_fp4_from_uint8(packed, rows, 2 * columns, dtype=torch.float32)
        assert torch.equal(helpers.pack_fp4_to_uint8(unpacked), packed)
        scale = ours[f"{module}.weight_scale"].float() * ours[f"{module}.weight_scale_2"]
        values = (unpacked * scale.repeat_interleave(16, 1)).numpy()
        np.testing.assert_array_equal(values, dequantized(ours, module))


def test_modelopt_dequantizes(ours: dict[str, Any]) -> None:
    for module in modules(ours):
        packed, scale, second = (ours[f"{module}.weight{end}"] for end in ("", "_scale", "_scale_2"))
        shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
        values = NVFP4QTensor(shape, torch.float32, packed).dequantize(
            torch.float32, scale=scale, double_scale=second, block_sizes={-1: 16}
        )
        np.testing.assert_array_equal(values.numpy(), dequantized(ours, module))


def test_torchao_dequantizes(ours: dict[str, Any]) -> None:
    for module in modules(ours):
        packed, scale, second = (ours[f"{module}.weight{end}"] for end in ("", "_scale", "_scale_2"))
        values = NVFP4Tensor(packed, scale, 16, torch.float32, second).dequantize(torch.float32)
        np.testing.assert_array_equal(values.numpy(), dequantized(ours, module))


def test_mlx_dequantizes(model: Path, ours: dict[str, Any]) -> None:
    dense = load_file(model / "model.safetensors")
    for module in modules(ours):
        if not module.endswith(("o_proj", "down_proj")):  # the others share their amax
            continue
        packed, scale = ours[f"{module}.weight"], ours[f"{module}.weight_scale"]
        amax = nvfp4sweep.global_amax(dense[f"{module}.weight"].float().numpy())
        values = mx.dequantize(
            mx.array(packed.numpy().view(np.uint32)),
            mx.array(scale.view(torch.uint8).numpy()),
            group_size=16,
            bits=4,
            mode="nvfp4",
            global_scale=mx.array(amax),
            dtype=mx.float32,
        )
        np.testing.assert_array_equal(np.array(values), dequantized(ours, module))


def test_modelopt_exports_the_same_but_for_scales_and_codes(model: Path) -> None:
    """Names, dtypes, shapes, the other tensors' bytes, and what the configuration says."""
    exported, folder = model.parent / "exported", model.parent / "w4a4"
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tokens = torch.arange(20)[None]
    mtq.quantize(dense, mtq.NVFP4_DEFAULT_CFG, lambda quantized: quantized(tokens))
    export_hf_checkpoint(dense, export_dir=exported)
    quantize_checkpoint(model, folder, Settings(MODELOPT, input_scale=1.0))
    theirs, mine = (load_file(path / "model.safetensors") for path in (exported, folder))
    assert {name: (t.shape, t.dtype) for name, t in theirs.items()} == {
        name: (t.shape, t.dtype) for name, t in mine.items()
    }
    packed = {f"{module}.weight" for module in modules(mine)}
    scaled = {name for name in mine if name.rpartition(".")[2] in ("weight_scale", "input_scale")}
    for name in set(mine) - packed - scaled:
        assert torch.equal(theirs[name], mine[name]), name  # global scales too
    assert any(not torch.equal(theirs[name], mine[name]) for name in packed)
    configs = [json.loads((path / "config.json").read_text()) for path in (exported, folder)]
    quantization = [config["quantization_config"] for config in configs]
    for one in quantization:
        del one["producer"]
        one["ignore"] = sorted(set(one["ignore"]) - {"model.embed_tokens"})  # no linear layer
    assert quantization[0] == quantization[1]
    others = [json.loads((path / "hf_quant_config.json").read_text()) for path in (exported, folder)]
    assert set(others[0]["quantization"]) == set(others[1]["quantization"])


def test_sentence_embeddings(tmp_path: Path) -> None:
    """A real model through a checkpoint: what transformers embeds with it, and how near that comes."""
    source = minilm.folder()
    quantize_checkpoint(source, tmp_path / "exact", Settings(COMPRESSED_TENSORS))
    quantize_checkpoint(source, tmp_path / "modelopt", Settings(MODELOPT))
    tensors = load_file(source / "model.safetensors")
    stored = load_file(tmp_path / "modelopt" / "model.safetensors")
    linear = [name.removesuffix(".weight_scale_2") for name in stored if name.endswith(".weight_scale_2")]
    weights = {f"{module}.weight": torch.from_numpy(dequantized(stored, module)) for module in linear}
    usual = {name: torch.from_numpy(absmax(tensors[name], stored, name)) for name in weights}
    for folder, changed in (("twin", weights), ("absmax", usual)):
        shutil.copytree(source, tmp_path / folder)
        # compressed-tensors gives bfloat16, whatever the model is in.
        rounded = {name: weight.bfloat16().float() for name, weight in changed.items()}
        save_file(tensors | rounded, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    unpacking = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    unpacked = AutoModel.from_pretrained(tmp_path / "exact", dtype=torch.float32, **unpacking)
    models = [AutoModel.from_pretrained(path, dtype=torch.float32) for path in (source, tmp_path / "absmax")]
    dense, other = map(embeddings, models)
    models[0].load_state_dict(unpacked.state_dict())  # into float32, which holds its bfloat16
    exact = embeddings(models[0])
    assert torch.equal(exact, embeddings(AutoModel.from_pretrained(tmp_path / "twin", dtype=torch.float32)))
    cosines = {
        name: torch.nn.functional.cosine_similarity(dense, found)
        for name, found in (("exact", exact), ("absmax", other))
    }
    for name, cosine in cosines.items():
        print(f"cosine of sentence embeddings, {name}: mean {cosine.mean():.5f}, least {cosine.min():.5f}")
    assert cosines["exact"].mean() > cosines["absmax"].mean() > 0.9


def absmax(weight: Any, stored: dict[str, Any], name: str) -> Any:
    """The weight with each block's scale from its maximum, under the same global scale."""
    second = stored[f"{name}_scale_2"].numpy()
    blocks = weight.float().numpy().reshape(len(weight), -1, 16)
    largest = np.abs(blocks).max(axis=2).astype(np.float64)
    code = baselines.absmax_code(largest, np.float32(second * np.float32(2688)))
    scale = formats.E4M3_VALUES[code].astype(np.float32) * second
    points = packing.encode(blocks, np.repeat(scale[:, :, None], 16, axis=2))
    values = np.concatenate([formats.E2M1_VALUES, -formats.E2M1_VALUES]).astype(np.float32)[points]
    return (values * scale[:, :, None]).reshape(weight.shape)


def embeddings(encoder: Any) -> Any:
    """Mean-pooled and normed, in float32, of minilm.SENTENCES."""
    encoder.eval()
    with torch.no_grad():
        pooled = [encoder(**batch).last_hidden_state.mean(dim=1) for batch in minilm.batches()]
    return torch.nn.functional.normalize(torch.cat(pooled))
