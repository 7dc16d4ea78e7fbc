"""A small model that tests of checkpoints quantize, and what they read of the result."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import deserialize
from safetensors.numpy import save_file

Array = np.ndarray[Any, Any]
LAYER = "model.layers.0."
ATTENTION = [f"{LAYER}self_attn.{name}_proj" for name in "qkv"]
#: Of two shards: what belongs together lies in both.
SHARDS: list[dict[str, tuple[tuple[int, ...], Any]]] = [
    {
        "model.embed_tokens.weight": ((64, 32), ml_dtypes.bfloat16),
        f"{ATTENTION[0]}.weight": ((32, 32), ml_dtypes.bfloat16),
        f"{LAYER}mlp.experts.gate_up_proj": ((3, 32, 32), np.float16),
        f"{LAYER}mlp.gate.weight": ((3, 32), np.float32),
        f"{LAYER}input_layernorm.weight": ((32,), ml_dtypes.bfloat16),
    },
    {
        f"{ATTENTION[1]}.weight": ((16, 32), ml_dtypes.bfloat16),
        f"{ATTENTION[2]}.weight": ((16, 32), ml_dtypes.bfloat16),
        f"{LAYER}self_attn.o_proj.weight": ((32, 32), np.float32),
        f"{LAYER}mlp.experts.down_proj": ((3, 32, 16), np.float16),
        f"{LAYER}mlp.uneven.weight": ((16, 24), np.float32),
        "lm_head.weight": ((64, 32), ml_dtypes.bfloat16),
        "counter": ((1,), np.int64),
    },
]
DTYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
    "U8": np.uint8,
}
FILES = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
IGNORED = sorted(["model.embed_tokens", f"{LAYER}mlp.gate", f"{LAYER}mlp.uneven", "lm_head"])
MODULES = sorted(
    [*ATTENTION, f"{LAYER}self_attn.o_proj"]
    + [f"{LAYER}mlp.experts.{i}.{name}_proj" for i in range(3) for name in ("gate", "up", "down")]
)


def make_tensors() -> list[dict[str, Array]]:
    rng = np.random.default_rng(0)
    shards = [
        {
            name: (rng.standard_normal(shape) * rng.uniform(0.1, 3)).astype(dtype)
            for name, (shape, dtype) in s.items()
        }
        for s in SHARDS
    ]
    shards[1][f"{LAYER}mlp.experts.down_proj"][1] = 0  # an expert of zeros
    return shards


def write_model(folder: Path, shards: list[dict[str, Array]], **config: Any) -> Path:
    folder.mkdir()
    for file, tensors in zip(FILES, shards, strict=False):
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in zip(FILES, shards, strict=False) for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "hidden_size": 32} | config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("[1]")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def read_all(folder: Path) -> dict[str, Array]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict[str, Array] = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors = dict(deserialize((folder / file).read_bytes()))
        assert sorted(tensors) == sorted(n for n, f in index["weight_map"].items() if f == file)
        for name, tensor in tensors.items():
            array = np.frombuffer(bytes(tensor["data"]), DTYPES[tensor["dtype"]])
            found[name] = array.reshape(tensor["shape"])
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
    return found
