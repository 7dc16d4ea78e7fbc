"""Importances from a file: safetensors under the names of the tensors, or a GGUF imatrix of llama.cpp."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nvfp4sweep.checkpoint.folders import identity
from nvfp4sweep.checkpoint.plan import matrices
from nvfp4sweep.checkpoint.reader import Checkpoint, CheckpointError, TensorInfo

Array = npt.NDArray[Any]

#: What llama.cpp calls the architecture of models whose model_type it does not take over as it is.
_GGUF_ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


class Importances:
    """The importances of a file, by the names of tensors.

    Args:
        path: *.safetensors, with [K] or, for stacked experts, [E, K] under each tensor's name; or *.gguf,
            as llama-imatrix writes it: the mean square of each input.
        model_type: of the model's configuration.

    Raises:
        CheckpointError: the file cannot be read.
    """

    def __init__(self, path: Path, model_type: str) -> None:
        self._path, self._model_type = path, model_type
        self._file = _Imatrix(path, model_type) if path.suffix == ".gguf" else _Safetensors(path)

    def identity(self) -> list[int]:
        return identity(self._path)

    def has(self, tensor: TensorInfo) -> bool:
        return self._file.has(tensor.name)

    def of(self, tensor: TensorInfo) -> Array | None:
        """float32 [K], or [E, K] for a stack; None if the file has none.

        Raises:
            CheckpointError: it has another shape.
        """
        if not self.has(tensor):
            return None
        importance = self._file.read(tensor.name)
        columns = matrices(tensor, self._model_type)[0].shape[1]
        expected = (*tensor.shape[:-2], columns)
        if importance.shape != expected:
            raise CheckpointError(
                f"the importance of {tensor.name} in {self._path} has the shape {importance.shape}, "
                f"and must have {expected}"
            )
        return importance


class _Safetensors:
    def __init__(self, path: Path) -> None:
        self._checkpoint = Checkpoint(path)
        self._tensors = {tensor.name: tensor for tensor in self._checkpoint.tensors}

    def has(self, name: str) -> bool:
        return name in self._tensors

    def read(self, name: str) -> Array:
        return self._checkpoint.read(self._tensors[name])


class _Imatrix:
    """GGUF: <name>.in_sum2 [E, K], sums of squares; <name>.counts [E, 1], of how many tokens."""

    def __init__(self, path: Path, model_type: str) -> None:
        try:
            import gguf
        except ImportError:
            raise CheckpointError(
                f"{path} needs the package gguf: pip install 'nvfp4sweep[imatrix]'"
            ) from None
        try:
            tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        except (OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from None
        self._sums = {
            name.removesuffix(".in_sum2"): data for name, data in tensors.items() if name.endswith(".in_sum2")
        }
        self._counts = {name: tensors.get(f"{name}.counts") for name in self._sums}
        if not self._sums or any(counts is None for counts in self._counts.values()):
            raise CheckpointError(f"{path} is not an imatrix: it has no .in_sum2 and .counts for each weight")
        named = _GGUF_ARCHITECTURES.get(model_type, model_type.removesuffix("_text").replace("_", ""))
        known = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
        if named not in known:
            raise CheckpointError(f"{path}: how llama.cpp names the tensors of {model_type!r} is not known")
        layers = 1 + max(
            (int(number) for name in self._sums for number in re.findall(r"\d+", name)), default=0
        )
        self._names = gguf.get_tensor_name_map(known[named], layers)

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def read(self, name: str) -> Array:
        """Zeros for an expert without tokens: they count as ones."""
        there, expert = self._find(name) or (name, None)
        counts = np.asarray(self._counts[there], np.float32).reshape(-1, 1)
        sums = np.asarray(self._sums[there], np.float32).reshape(len(counts), -1)
        means: Array = sums / np.maximum(counts, 1)
        one = expert if expert is not None else 0
        return means if expert is None and len(means) > 1 else np.asarray(means[one])

    def _find(self, name: str) -> tuple[str, int | None] | None:
        """(its name there, which expert)."""
        for candidate, expert in _candidates(name):
            found = self._names.get_name(candidate)
            if found is not None and f"{found}.weight" in self._sums:
                return f"{found}.weight", expert
        return None


def _candidates(name: str) -> Iterator[tuple[str, int | None]]:
    """Names under which gguf may know a layer, and which expert: it has experts without their numbers."""
    layer = name.removesuffix(".weight")
    expert = _EXPERT.search(layer)
    if expert is not None:
        yield layer.replace(expert[0], ".experts.", 1), int(expert[1])
    else:
        yield layer, None
        yield layer.replace("gate_up_proj", "gate_proj"), None  # they read the same inputs
