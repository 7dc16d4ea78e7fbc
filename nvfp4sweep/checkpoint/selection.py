"""What is to be done with a model: which tensors become what, which share a scale, what to warn of."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nvfp4sweep.checkpoint.folders import read_config, state_of
from nvfp4sweep.checkpoint.importances import Importances
from nvfp4sweep.checkpoint.plan import (
    cut_by_tensor_parallelism,
    make_plan,
    matrices,
    reason_to_skip,
    shared_groups,
)
from nvfp4sweep.checkpoint.reader import Checkpoint, CheckpointError, TensorInfo
from nvfp4sweep.checkpoint.report import batch_dims
from nvfp4sweep.checkpoint.settings import Settings
from nvfp4sweep.checkpoint.writer import Entry

_EXCLUDED = "excluded by the caller"
#: Of a file of the input: what transformers saved at most until its version 5, which saves ten times that.
SHARD_BYTES = 5 * 10**9


class Selection:
    """
    Args:
        source: a Hugging Face folder.
        importance: a file of importances.Importances, or None.

    Attributes:
        config: the model's config.json; `model_type` is of it.
        plan: which tensors are quantized, and why others are not.
        shards: the tensors of each file that is written.
        groups: by name, the names of the weights that share its global scale, its own among them.
        early: the weights whose largest magnitude must be known before a shard is begun.
        warnings: what may not be as the caller wants it, a sentence each.

    Raises:
        CheckpointError: the model cannot be quantized or read.
    """

    def __init__(self, source: Path, settings: Settings, importance: Path | None = None) -> None:
        self.source, self.settings = source, settings
        self.config = read_config(source)
        self.model_type = str(self.config.get("model_type", ""))
        self.checkpoint = Checkpoint(source)
        self.importances = None if importance is None else Importances(importance, self.model_type)
        self.plan = make_plan(self.checkpoint.tensors, self._reason_to_skip)
        self.shards = _shards(self.checkpoint)
        if not self.plan.tensors:
            raise CheckpointError(f"{source} has no linear weight to quantize")
        if settings.strict and (uneven := self._uneven()):
            raise CheckpointError(f"{uneven[0]} has a K that 16 does not divide, and strict is set")
        self.groups = self._groups()
        self.early = self._early()
        self.warnings = tuple(self._warnings())

    def state(self) -> dict[str, Any]:
        """What the result depends on, as JSON has it."""
        arguments = {
            "settings": asdict(self.settings) | {"layout": self.settings.layout.name},
            "importance": None if self.importances is None else self.importances.identity(),
            "config": self.config,
        }
        return state_of(self.checkpoint, arguments)

    def ignored(self, skipped: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
        """The layers with a matrix that is not quantized."""
        matrix = {tensor.name for tensor in self.checkpoint.tensors if len(tensor.shape) == 2}
        names = (name for group in skipped.values() for name in group if name in matrix)
        return tuple(sorted(name.removesuffix(".weight") for name in names if name.endswith(".weight")))

    def entries(self, tensor: TensorInfo, is_quantized: bool) -> list[Entry]:
        """What is written of a tensor."""
        if not is_quantized:
            return [Entry(tensor.name, tensor.dtype, tensor.shape, self.checkpoint.n_bytes(tensor))]
        with_input = self.settings.input_scale is not None
        return [
            entry
            for matrix in matrices(tensor, self.model_type)
            for entry in self.settings.layout.entries(matrix.module, matrix.shape, with_input)
        ]

    def _groups(self) -> dict[str, tuple[str, ...]]:
        experts = {tensor.name: tensor.shape[: batch_dims(tensor)] for tensor in self.plan.tensors}
        groups: dict[str, tuple[str, ...]] = {name: (name,) for name in experts}
        for group in shared_groups(list(experts), self.settings.groups):
            if len({experts[name] for name in group}) > 1:
                raise CheckpointError(f"{group[0]} and {group[-1]} share a scale, but not their experts")
            groups.update(dict.fromkeys(group, group))
        return groups

    def _early(self) -> Sequence[TensorInfo]:
        """Those that share a scale across shards. All, where one that is not finite is to be left as it is: a
        shard begins with the names of what is in it."""
        if self.settings.skip_bad:
            return self.plan.tensors
        file_of = {tensor.name: file for file, tensors in self.shards.items() for tensor in tensors}
        return [t for t in self.plan.tensors if len({file_of[name] for name in self.groups[t.name]}) > 1]

    def _reason_to_skip(self, tensor: TensorInfo) -> str | None:
        included = any(re.search(pattern, tensor.name) for pattern in self.settings.include)
        reason = reason_to_skip(tensor, self.model_type, whatever_its_name=included)
        if reason is None and any(re.search(pattern, tensor.name) for pattern in self.settings.exclude):
            return _EXCLUDED
        return reason

    def _uneven(self) -> list[str]:
        return [
            name for reason, names in self.plan.skipped.items() if "divisible" in reason for name in names
        ]

    def _warnings(self) -> Iterator[str]:
        for name in self._uneven():
            yield f"{name} stays as it is: 16 does not divide its K"
        yield from cut_by_tensor_parallelism(self.plan.tensors, self.model_type)
        if self.importances is not None:
            without = [tensor.name for tensor in self.plan.tensors if not self.importances.has(tensor)]
            if without:
                yield (
                    f"{len(without):,} of {len(self.plan.tensors):,} weights have no importance in the file, "
                    f"the first {without[0]}: all their inputs count alike"
                )


def _shards(checkpoint: Checkpoint) -> dict[str, list[TensorInfo]]:
    """Those of the input; all with new names where one has more than SHARD_BYTES, which is cut evenly.

    Processes share the work by shards, and what an interruption loses is one of each.
    """
    cut = [part for tensors in checkpoint.shards.values() for part in _cut(tensors, checkpoint.n_bytes)]
    if len(cut) == len(checkpoint.shards):
        return checkpoint.shards
    return {f"model-{i:05}-of-{len(cut):05}.safetensors": part for i, part in enumerate(cut, 1)}


def _cut(tensors: list[TensorInfo], n_bytes: Callable[[TensorInfo], int]) -> list[list[TensorInfo]]:
    """Parts of about SHARD_BYTES at most: each tensor is where the middle of its bytes is."""
    total = sum(map(n_bytes, tensors))
    if total <= SHARD_BYTES:
        return [tensors]
    n_parts = -(-total // SHARD_BYTES)
    parts: list[list[TensorInfo]] = [[] for _ in range(n_parts)]
    begin = 0
    for tensor in tensors:
        size = n_bytes(tensor)
        parts[min((2 * begin + size) * n_parts // (2 * total), n_parts - 1)].append(tensor)
        begin += size
    return [part for part in parts if part]
