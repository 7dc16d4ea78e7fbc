"""A Mixtral that `nvfp4sweep quantize` wrote, in transformers 4.57: `make peers`."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.utils.quantization_config import CompressedTensorsConfig

import nvfp4sweep
from nvfp4sweep import packing
from nvfp4sweep.checkpoint import COMPRESSED_TENSORS, Settings, quantize_checkpoint

CONFIG = MixtralConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    vocab_size=128,
    max_position_embeddings=64,
)


def dequantized(tensors: dict[str, Any], module: str) -> Any:
    scale = tensors[f"{module}.weight_scale"].view(torch.uint8).numpy()
    return torch.from_numpy(
        nvfp4sweep.QuantizedTensor(
            tensors[f"{module}.weight_packed"].numpy(),
            packing.scale_bytes(scale),
            1 / tensors[f"{module}.weight_global_scale"].numpy().reshape(()),
            axis=1,
            block_size=16,
        ).dequantize(np.float32)
    )


def test_logits(tmp_path: Path) -> None:
    """Those of the dense model with our values for weights, bit for bit.

    Loaded in float32, since this transformers rounds global scales to the model's dtype, and unpacked at
    once.
    """
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG).bfloat16().save_pretrained(tmp_path / "dense")
    written = quantize_checkpoint(tmp_path / "dense", tmp_path / "out", Settings(COMPRESSED_TENSORS))
    assert len(written.modules) == 2 * (4 + 4 * 3)
    shutil.copytree(tmp_path / "dense", tmp_path / "twin")
    tensors, stored = (load_file(tmp_path / folder / "model.safetensors") for folder in ("twin", "out"))
    for module in written.modules:
        tensors[f"{module}.weight"] = dequantized(stored, module).bfloat16()
    save_file(tensors, tmp_path / "twin/model.safetensors", metadata={"format": "pt"})
    unpacked = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    tokens = torch.arange(20)[None]
    logits = []
    for folder, options in (("out", unpacked), ("twin", {})):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32, **options)
        with torch.no_grad():
            logits.append(model.bfloat16()(tokens).logits)
    assert torch.equal(*logits)
