"""Checkpoints that `nvfp4sweep quantize` writes, read by those who did not write it: `make peers`.

Their pins clash with the other tests', so this runs in an environment of its own.
"""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4 import helpers
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file, save_file
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import nvfp4sweep
from nvfp4sweep.checkpoint.layouts import COMPRESSED_TENSORS, MODELOPT
from nvfp4sweep.checkpoint.quantizer import Settings, quantize_checkpoint

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
