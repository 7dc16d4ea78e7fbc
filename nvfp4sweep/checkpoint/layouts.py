"""How NVFP4 checkpoints name and shape what belongs to a weight, and what their configuration says.

The packed codes and the block scales are the same bytes in both layouts; the second scale is a multiplier []
in ModelOpt's and a divisor [1] in compressed-tensors'. Read off files that nvidia-modelopt 0.47.0 wrote and
that transformers 5.23 with compressed-tensors 0.20.0 loads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import nvfp4sweep
from nvfp4sweep.checkpoint.writer import Entry
from nvfp4sweep.formats import BLOCK_SIZE

Array = npt.NDArray[Any]
Json = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """Names of a module's tensors, and its files' configuration.

    Attributes:
        scalar_shape: of the global scale and the input scale.
        reciprocal: whether these are divisors.
        fp8_cache: what "kv_cache_scheme" is in its configuration where the KV cache is in FP8.
    """

    name: str
    packed: str
    scale: str
    global_scale: str
    input_scale: str
    scalar_shape: tuple[int, ...]
    reciprocal: bool
    config: Callable[[Sequence[str], bool], Json]
    other_files: Callable[[Sequence[str], bool], dict[str, Json]]
    fp8_cache: Json

    def entries(self, module: str, shape: tuple[int, int], with_input: bool) -> list[Entry]:
        """The tensors of a weight of this shape, [N, K]."""
        rows, columns = shape
        scalars = [self.global_scale] + [self.input_scale] * with_input
        return [
            Entry(f"{module}.{self.packed}", "U8", (rows, columns // 2), rows * columns // 2),
            Entry(
                f"{module}.{self.scale}",
                "F8_E4M3",
                (rows, columns // BLOCK_SIZE),
                rows * columns // BLOCK_SIZE,
            ),
            *(Entry(f"{module}.{name}", "F32", self.scalar_shape, 4) for name in scalars),
        ]

    def arrays(
        self, module: str, packed: Array, scale: Array, global_scale: float, input_scale: float | None
    ) -> dict[str, Array]:
        """The same tensors' contents, from the multipliers `global_scale` and `input_scale`."""
        scalars = {self.global_scale: global_scale}
        if input_scale is not None:
            scalars[self.input_scale] = input_scale
        stored = {
            name: np.float32(1) / np.float32(value) if self.reciprocal else np.float32(value)
            for name, value in scalars.items()
        }
        return {
            f"{module}.{self.packed}": packed,
            f"{module}.{self.scale}": scale,
            **{f"{module}.{name}": np.full(self.scalar_shape, value) for name, value in stored.items()},
        }


_FP8_CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}
_PRODUCER = {"name": "nvfp4sweep", "version": nvfp4sweep.__version__}


def _modelopt_algorithm(with_input: bool) -> str:
    return "NVFP4" if with_input else "W4A16_NVFP4"


def _modelopt_config(ignore: Sequence[str], with_input: bool) -> Json:
    numbers = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE}
    group: Json = {"weights": numbers, "targets": ["Linear"]}
    if with_input:
        group["input_activations"] = numbers
    return {
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "quant_algo": _modelopt_algorithm(with_input),
        "producer": _PRODUCER,
        "quant_method": "modelopt",
    }


def _modelopt_files(ignore: Sequence[str], with_input: bool) -> dict[str, Json]:
    quantization = {
        "quant_algo": _modelopt_algorithm(with_input),
        "kv_cache_quant_algo": None,
        "group_size": BLOCK_SIZE,
        "exclude_modules": list(ignore),
    }
    return {"hf_quant_config.json": {"producer": _PRODUCER, "quantization": quantization}}


def _compressed_tensors_config(ignore: Sequence[str], with_input: bool) -> Json:
    numbers = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "symmetric": True,
        "group_size": BLOCK_SIZE,
    }
    weights = numbers | {
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    }
    inputs = numbers | {"dynamic": "local", "observer": "static_minmax"}
    group = {
        "format": "nvfp4-pack-quantized",
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs if with_input else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


MODELOPT = Layout(
    name="modelopt",
    packed="weight",
    scale="weight_scale",
    global_scale="weight_scale_2",
    input_scale="input_scale",
    scalar_shape=(),
    reciprocal=False,
    config=_modelopt_config,
    other_files=_modelopt_files,
    fp8_cache=_FP8_CACHE,
)
COMPRESSED_TENSORS = Layout(
    name="compressed-tensors",
    packed="weight_packed",
    scale="weight_scale",
    global_scale="weight_global_scale",
    input_scale="input_global_scale",
    scalar_shape=(1,),
    reciprocal=True,
    config=_compressed_tensors_config,
    other_files=lambda ignore, with_input: {},
    fp8_cache=_FP8_CACHE | {"strategy": "tensor", "symmetric": True},
)
LAYOUTS = {layout.name: layout for layout in (MODELOPT, COMPRESSED_TENSORS)}
