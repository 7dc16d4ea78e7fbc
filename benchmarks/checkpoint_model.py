"""The model that benchmarks.checkpoint quantizes: a Llama of random weights."""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nvfp4sweep.checkpoint.writer import Entry, open_shard, write_json

# Of Llama 3.1 8B.
_HIDDEN, _INTERMEDIATE, _KEYS, _VOCABULARY = 4096, 14336, 1024, 128256
_LAYERS_A_SHARD = 1  # processes share shards: fewer would leave some idle
_ITEM_BYTES = 2
_POOL = 2**27  # elements, of which all weights are cut


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


def _shards(layers: int) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of each shard's tensors, by name."""
    groups: list[dict[str, tuple[int, ...]]] = []
    for i in range(layers):
        if i % _LAYERS_A_SHARD == 0:
            groups.append({})
        groups[-1] |= _layer(i)
    groups[0]["model.embed_tokens.weight"] = (_VOCABULARY, _HIDDEN)
    groups[-1] |= {"lm_head.weight": (_VOCABULARY, _HIDDEN), "model.norm.weight": (_HIDDEN,)}
    return groups


def shards(layers: int) -> list[dict[str, int]]:
    """The bytes of each shard's tensors, by name."""
    return [{name: _n_bytes(shape) for name, shape in shard.items()} for shard in _shards(layers)]


def _n_bytes(shape: tuple[int, ...]) -> int:
    return _ITEM_BYTES * math.prod(shape)


def make_model(folder: Path, layers: int) -> None:
    """Gaussian bfloat16 weights, shards of _LAYERS_A_SHARD layers."""
    folder.mkdir(parents=True)
    pool = np.random.default_rng(0).standard_normal(_POOL, np.float32).astype(ml_dtypes.bfloat16)
    bits = pool.view(np.uint8)
    groups = _shards(layers)
    weight_map = {}
    offset = 0
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        entries = [Entry(name, "BF16", shape, _n_bytes(shape)) for name, shape in group.items()]
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
