"""What is wrong with an NVFP4 checkpoint of either layout, whoever wrote it, and how large its errors are."""

import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import nvfp4sweep
from nvfp4sweep import packing
from nvfp4sweep.checkpoint.baselines import ScaleErrors, scale_errors
from nvfp4sweep.checkpoint.folders import CONFIG_NAME, read_json
from nvfp4sweep.checkpoint.layouts import LAYOUTS, Layout
from nvfp4sweep.checkpoint.plan import fusion_groups, matrices, reason_to_skip
from nvfp4sweep.checkpoint.reader import INDEX_NAME, Checkpoint, CheckpointError, TensorInfo
from nvfp4sweep.formats import BLOCK_SIZE, NVFP4_MAX

Array = npt.NDArray[Any]

#: Why a linear layer may have been left as it is: for none of these, or for nothing that its name tells.
_LINEAR = (None, "output head", "router", "vision tower")
_SIGN, _NAN = 0x80, 0x7F


class Problem(NamedTuple):
    """Something that a runtime would refuse, or read as another value. `where` is a module or a file."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class Module:
    """A quantized layer, and the tensors that its layout names."""

    name: str
    layout: Layout
    packed: TensorInfo | None
    scale: TensorInfo | None
    global_scale: TensorInfo | None
    input_scale: TensorInfo | None


class Errors(NamedTuple):
    """Squared errors of a module's weight: as stored, and those that its global scale allows.

    Attributes:
        stored: of the checkpoint's values.
        scales: with each block's scale from its maximum, by 4/6, and the least possible.
    """

    module: str
    stored: float
    scales: ScaleErrors


class Verifier:
    """
    Args:
        path: a folder with an NVFP4 checkpoint.

    Attributes:
        checkpoint: its tensors.
        modules: its quantized layers, by name.

    Raises:
        CheckpointError: it cannot be read, or nothing in it is in NVFP4.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.checkpoint = Checkpoint(path)
        self._tensors = {tensor.name: tensor for tensor in self.checkpoint.tensors}
        self.modules = {module.name: module for module in self._find_modules()}
        if not self.modules:
            raise CheckpointError(f"{path} has no NVFP4 weight of {' or '.join(LAYOUTS)}")
        self._found: dict[str, list[Problem]] = {}
        self._global_scales: dict[str, float] = {}  # of those looked at

    def problems(self) -> Iterator[Problem]:
        """All that is wrong, module by module, then between them, then in the configuration."""
        for module in self.modules.values():
            yield from self._of_module(module)
        yield from self._of_groups()
        yield from self._of_index()
        yield from self._of_config()

    def structure(self) -> Iterator[Problem]:
        """What keeps modules from being read: tensors missing, dtypes, shapes, scalars that scale nothing.

        Block scales are not looked at, and a scalar may be [] or [1] in either layout.
        """
        for module in self.modules.values():
            yield from self._of_tensors(module, {(), (1,)})

    def scale_problems(self, module: Module) -> Iterator[Problem]:
        """Block scales that are NaN, zero or negative."""
        if module.scale is not None and module.scale.dtype == "F8_E4M3":
            yield from self._of_scales(module, module.scale)

    def bytes_of(self, tensor: TensorInfo) -> npt.NDArray[np.uint8]:
        return np.frombuffer(b"".join(self.checkpoint.chunks(tensor)), np.uint8)

    def scalar(self, tensor: TensorInfo) -> np.float32:
        """Of a global scale or an input scale."""
        return np.float32(self.bytes_of(tensor).view(np.float32)[0])

    def errors(self, source: Path, config: dict[str, Any]) -> Iterator[Errors]:
        """Against the model that it was made of, for each module that is sound.

        Args:
            config: the source's configuration: it tells how stacked experts lie.
        """
        model_type = str(config.get("model_type", ""))
        dense = Checkpoint(source)
        for tensor in dense.tensors:
            if reason_to_skip(tensor, model_type, whatever_its_name=True) is not None:
                continue
            found = [m for m in matrices(tensor, model_type) if m.module in self.modules]
            weight = dense.read(tensor) if found else None
            for matrix in found:
                module = self.modules[matrix.module]
                packed, scale = module.packed, module.scale
                if weight is None or packed is None or scale is None or self._of_module(module):
                    continue
                yield self._errors(module, packed, scale, np.ascontiguousarray(matrix.of(weight)))

    # --- modules ----------------------------------------------------------------------------------------

    def _find_modules(self) -> Iterator[Module]:
        for layout in LAYOUTS.values():
            ends = (layout.packed, layout.scale, layout.global_scale, layout.input_scale)
            names = {
                name.removesuffix(f".{end}")
                for end in (layout.packed, layout.global_scale)
                for name, tensor in self._tensors.items()
                if name.endswith(f".{end}") and (end != layout.packed or tensor.dtype == "U8")
            }
            for name in sorted(names):
                yield Module(name, layout, *(self._tensors.get(f"{name}.{end}") for end in ends))

    def _of_module(self, module: Module) -> list[Problem]:
        """Looked for once: it reads all scales."""
        if module.name not in self._found:
            self._found[module.name] = list(self._look_at(module))
        return self._found[module.name]

    def _look_at(self, module: Module) -> Iterator[Problem]:
        yield from self._of_tensors(module, {module.layout.scalar_shape})
        yield from self.scale_problems(module)

    def _of_tensors(self, module: Module, scalar_shapes: Set[tuple[int, ...]]) -> Iterator[Problem]:
        layout = module.layout
        for end, tensor in (
            (layout.packed, module.packed),
            (layout.scale, module.scale),
            (layout.global_scale, module.global_scale),
        ):
            if tensor is None:
                yield Problem(module.name, f"{end} is missing")
        for tensor, dtype in (
            (module.packed, "U8"),
            (module.scale, "F8_E4M3"),
            (module.global_scale, "F32"),
            (module.input_scale, "F32"),
        ):
            if tensor is not None and tensor.dtype != dtype:
                yield Problem(module.name, f"{_end(tensor)} is {tensor.dtype}, and must be {dtype}")
        for tensor in (module.global_scale, module.input_scale):
            if tensor is not None and tensor.dtype == "F32":
                yield from self._of_scalar(module, tensor, scalar_shapes)
        yield from self._of_shapes(module)

    def _of_scalar(
        self, module: Module, tensor: TensorInfo, shapes: Set[tuple[int, ...]]
    ) -> Iterator[Problem]:
        shape = module.layout.scalar_shape
        if tensor.shape not in shapes:
            yield Problem(
                module.name, f"{_end(tensor)} has the shape {list(tensor.shape)}, not {list(shape)}"
            )
        values = self.bytes_of(tensor).view(np.float32)
        if not (np.isfinite(values) & (values > 0)).all():
            yield Problem(
                module.name, f"{_end(tensor)} is {values.tolist()}, and must be positive and finite"
            )
        elif tensor is module.global_scale and values.size == 1:
            self._global_scales[module.name] = float(values[0])

    def _of_shapes(self, module: Module) -> Iterator[Problem]:
        packed, scale = module.packed, module.scale
        if packed is None or scale is None:
            return
        if len(packed.shape) != 2 or packed.shape[1] * 2 % BLOCK_SIZE:
            yield Problem(module.name, f"{_end(packed)} has the shape {list(packed.shape)}, not [N, K / 2]")
            return
        expected = (packed.shape[0], packed.shape[1] * 2 // BLOCK_SIZE)
        if scale.shape != expected:
            yield Problem(
                module.name, f"{_end(scale)} has the shape {list(scale.shape)}, not {list(expected)}"
            )

    def _of_scales(self, module: Module, scale: TensorInfo) -> Iterator[Problem]:
        code = self.bytes_of(scale)
        for what, bad in (
            ("NaN", (code & _NAN) == _NAN),
            ("zero", (code & _NAN) == 0),
            ("negative", (code > _SIGN) & ((code & _NAN) != _NAN)),
        ):
            if bad.any():
                yield Problem(
                    module.name, f"{np.count_nonzero(bad):,} of {code.size:,} block scales are {what}"
                )

    # --- between them -----------------------------------------------------------------------------------

    def _of_groups(self) -> Iterator[Problem]:
        for group in fusion_groups(f"{name}.weight" for name in self.modules):
            names = [name.removesuffix(".weight") for name in group]
            scales = {self._global_scales[name] for name in names if name in self._global_scales}
            if len(scales) > 1:
                others = ", ".join(name.rpartition(".")[2] for name in names[1:])
                ratio = max(scales) / min(scales)
                yield Problem(
                    names[0], f"fused with {others}, and their global scales differ, up to {ratio:.3g} times"
                )

    def _of_index(self) -> Iterator[Problem]:
        if not (self._path / INDEX_NAME).is_file():
            return
        shards = {tensor.file for tensor in self.checkpoint.tensors}
        for shard in sorted(shards):
            extra = {tensor.name for tensor in Checkpoint(shard).tensors} - set(self._tensors)
            if extra:
                yield Problem(shard.name, f"{INDEX_NAME} does not name {min(extra)}, which is in it")

    # --- the configuration ------------------------------------------------------------------------------

    def _of_config(self) -> Iterator[Problem]:
        config = read_json(self._path / CONFIG_NAME)
        quantization = config.get("quantization_config")
        if not isinstance(quantization, dict):
            yield Problem(CONFIG_NAME, "has no quantization_config")
            return
        layouts = {module.layout.name for module in self.modules.values()}
        method = quantization.get("quant_method")
        if layouts != {method}:
            yield Problem(
                CONFIG_NAME, f"quant_method is {method!r}, and the weights are {' and '.join(layouts)}"
            )
            return
        groups = list((quantization.get("config_groups") or {}).values())
        for numbers in (group.get("weights") or {} for group in groups):
            if (numbers.get("num_bits"), numbers.get("group_size")) != (4, BLOCK_SIZE):
                yield Problem(CONFIG_NAME, "config_groups: weights must have num_bits 4 and group_size 16")
        with_input = any(group.get("input_activations") for group in groups)
        lacking = sorted(m.name for m in self.modules.values() if with_input and m.input_scale is None)
        if lacking:
            yield Problem(
                lacking[0], f"no input scale, as {len(lacking):,} modules, though activations are quantized"
            )
        ignored = [str(name) for name in quantization.get("ignore") or []]
        yield from self._of_ignored(CONFIG_NAME, ignored)
        for layout in (LAYOUTS[name] for name in layouts):
            for file in layout.other_files([], with_input):
                yield from self._of_other_file(file, ignored)

    def _of_ignored(self, file: str, ignored: Sequence[str]) -> Iterator[Problem]:
        for name in self.modules:
            if matches(name, ignored):
                yield Problem(file, f"ignores {name}, which is quantized")
        for tensor in self.checkpoint.tensors:
            name = tensor.name.removesuffix(".weight")
            linear = reason_to_skip(tensor) in _LINEAR and len(tensor.shape) == 2
            if linear and not matches(name, ignored):
                yield Problem(file, f"does not ignore {name}, which is not quantized")

    def _of_other_file(self, file: str, ignored: Sequence[str]) -> Iterator[Problem]:
        path = self._path / file
        if not path.is_file():
            yield Problem(file, "is missing")
            return
        quantization = read_json(path).get("quantization") or {}
        for key in ("quant_algo", "group_size", "kv_cache_quant_algo", "exclude_modules"):
            if key not in quantization:
                yield Problem(file, f"quantization has no {key}")
        if sorted(quantization.get("exclude_modules") or []) != sorted(ignored):
            yield Problem(file, f"exclude_modules is not what {CONFIG_NAME} ignores")

    # --- errors -----------------------------------------------------------------------------------------

    def _errors(self, module: Module, packed: TensorInfo, scale: TensorInfo, weight: Array) -> Errors:
        second = np.float32(self._global_scales[module.name])
        multiplier = np.float32(1) / second if module.layout.reciprocal else second
        values = nvfp4sweep.QuantizedTensor(
            self.bytes_of(packed).reshape(packed.shape),
            packing.scale_bytes(self.bytes_of(scale).reshape(scale.shape)),
            np.asarray(multiplier),
            axis=1,
            block_size=BLOCK_SIZE,
        ).dequantize()
        stored = np.square(weight.astype(np.float64) - values).sum()
        amax = np.float32(multiplier * np.float32(NVFP4_MAX))
        best = nvfp4sweep.sweep(weight, global_amax=amax)
        return Errors(module.name, float(stored), scale_errors(weight, best.code, np.asarray(amax)))


def _end(tensor: TensorInfo) -> str:
    return tensor.name.rpartition(".")[2]


def matches(name: str, ignored: Sequence[str]) -> bool:
    """As runtimes read such lists: the name or a parent's, * for anything, or "re:" and how it begins."""
    for pattern in ignored:
        if pattern.startswith("re:"):
            found = re.match(pattern[3:], name)
        else:
            found = re.fullmatch(re.escape(pattern).replace(r"\*", ".*") + r"(\..*)?", name)
        if found:
            return True
    return False
