"""The model that benchmarks.checkpoint quantizes: a Llama of random weights."""

import math
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nvfp4sweep.checkpoint.writer import Entry, open_shard, write_json

Shape = tuple[int, ...]


class Llama(NamedTuple):
    """The sizes of one; `keys` is the outputs of k_proj and of v_proj."""

    hidden: int
    intermediate: int
    keys: int
    vocabulary: int


LLAMA_8B = Llama(4096, 14336, 1024, 128256)
LLAMA_70B = Llama(8192, 28672, 1024, 128256)
_LAYERS_A_SHARD = 1  # processes share shards: fewer would leave some idle
_ITEM_BYTES = 2
_POOL = 2**27  # elements, of which all weights are cut


def layer_of(model: Llama, i: int) -> dict[str, Shape]:
    """The shapes of a layer's tensors, by name."""
    hidden, intermediate, keys, _ = model
    attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
    return {
        f"{attention}q_proj.weight": (hidden, hidden),
        f"{attention}k_proj.weight": (keys, hidden),
        f"{attention}v_proj.weight": (keys, hidden),
        f"{attention}o_proj.weight": (hidden, hidden),
        f"{mlp}gate_proj.weight": (intermediate, hidden),
        f"{mlp}up_proj.weight": (intermediate, hidden),
        f"{mlp}down_proj.weight": (hidden, intermediate),
        f"model.layers.{i}.input_layernorm.weight": (hidden,),
        f"model.layers.{i}.post_attention_layernorm.weight": (hidden,),
    }


def matrices(model: Llama) -> list[Shape]:
    """Of a layer: what is quantized."""
    return [shape for shape in layer_of(model, 0).values() if len(shape) == 2]


def _shards(layers: int) -> list[dict[str, Shape]]:
    """The shapes of each shard's tensors, by name."""
    groups: list[dict[str, Shape]] = []
    for i in range(layers):
        if i % _LAYERS_A_SHARD == 0:
            groups.append({})
        groups[-1] |= layer_of(LLAMA_8B, i)
    embedding = (LLAMA_8B.vocabulary, LLAMA_8B.hidden)
    groups[0]["model.embed_tokens.weight"] = embedding
    groups[-1] |= {"lm_head.weight": embedding, "model.norm.weight": (LLAMA_8B.hidden,)}
    return groups


def shards(layers: int) -> list[dict[str, int]]:
    """The bytes of each shard's tensors, by name."""
    return [{name: n_bytes(shape) for name, shape in shard.items()} for shard in _shards(layers)]


def n_bytes(shape: Shape) -> int:
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
        entries = [Entry(name, "BF16", shape, n_bytes(shape)) for name, shape in group.items()]
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
