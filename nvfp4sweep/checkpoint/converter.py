"""An NVFP4 checkpoint in the other layout, without the weights it was made of; codes are never touched."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvfp4sweep.checkpoint.folders import CONFIG_NAME, copy_others, read_json, write_index
from nvfp4sweep.checkpoint.layouts import Json, Layout
from nvfp4sweep.checkpoint.plan import FLOAT_DTYPES
from nvfp4sweep.checkpoint.reader import CheckpointError, TensorInfo
from nvfp4sweep.checkpoint.rewriter import Advance, Change, Entries, open_sound, rewrite, work_folder
from nvfp4sweep.checkpoint.verifier import Verifier, matches
from nvfp4sweep.checkpoint.writer import Entry, write_json
from nvfp4sweep.formats import BLOCK_SIZE

_ALGORITHMS = ("NVFP4", "W4A16_NVFP4")
#: What a configuration may hold that the other layout has no words for.
_UNTRANSLATED = ("transform_config", "sparsity_config")


@dataclass(frozen=True)
class Converted:
    """What `convert_checkpoint` did.

    Attributes:
        before: the layout that it had.
        modules: the quantized layers.
        ignored: the layers named in the configuration as not quantized.
        with_input: whether activations are quantized: W4A4, not W4A16.
    """

    before: Layout
    modules: tuple[str, ...]
    ignored: tuple[str, ...]
    with_input: bool


def convert_checkpoint(
    source: Path, target: Path, layout: Layout, *, advance: Advance = lambda tensor: None
) -> Converted:
    """Write an NVFP4 checkpoint, whoever made it, in the other layout.

    Codes and block scales are the same bytes. Global and input scales become their reciprocals in
    float32, of the layout's shape, so values differ by the rounding of a reciprocal: by at most 2^-24 of
    themselves. There and back, such a scale is what it was or a neighbour of it in float32; and one that
    has been converted before is what it was.

    The configuration is written anew. Layers to ignore are named one by one: the layouts read patterns
    differently. W4A4 stays W4A4, and a KV cache in FP8 stays one, with its scales as they are. All else
    is carried along. An interrupted call leaves a folder `target`.partial, from which the same call goes
    on; in memory is a part of one tensor.

    Args:
        source: a folder with config.json and one or more *.safetensors files.
        target: a folder that is not there yet, or is empty.
        layout: one of layouts.LAYOUTS.
        advance: told of each tensor that was written.

    Raises:
        CheckpointError: `source` has this layout already, or is broken, or its configuration says what
            cannot be said in the other; or `target` is in the way.
        OSError: the disk refuses.
    """
    verifier, before = open_sound(source, target)
    if before is layout:
        raise CheckpointError(f"{source} is in the layout {layout.name} already")
    config = read_json(source / CONFIG_NAME)
    scheme = _read_scheme(source, config, verifier, before)
    changes = _changes(verifier, layout)
    folder = work_folder(verifier, target, {"command": "convert", "layout": layout.name, "config": config})

    def write_others(folder: Path, entries: Entries) -> None:
        copy_others(source, folder, {*entries, *before.other_files([], scheme.with_input)})
        write_index(source, folder, entries)
        _write_scheme(folder, config, layout, scheme)

    rewrite(verifier.checkpoint, folder, changes, write_others, advance)
    return Converted(before, tuple(verifier.modules), scheme.ignored, scheme.with_input)


# --- tensors ------------------------------------------------------------------------------------------


def _changes(verifier: Verifier, layout: Layout) -> dict[str, Change]:
    changes = {}
    for module in verifier.modules.values():
        for end, tensor in ((layout.packed, module.packed), (layout.scale, module.scale)):
            if tensor is not None:
                n_bytes = verifier.checkpoint.n_bytes(tensor)
                entry = Entry(f"{module.name}.{end}", tensor.dtype, tensor.shape, n_bytes)
                changes[tensor.name] = Change(entry)
        for end, tensor in (
            (layout.global_scale, module.global_scale),
            (layout.input_scale, module.input_scale),
        ):
            if tensor is not None:
                entry = Entry(f"{module.name}.{end}", "F32", layout.scalar_shape, 4)
                changes[tensor.name] = Change(entry, _reciprocal(verifier, tensor).tobytes)
    kept = {tensor.name for tensor in verifier.checkpoint.tensors} - set(changes)
    taken = kept & {change.entry.name for change in changes.values()}
    if taken:
        raise CheckpointError(f"{min(taken)} is there besides, and would be named as one of the new tensors")
    return changes


def _reciprocal(verifier: Verifier, tensor: TensorInfo) -> np.float32:
    value = verifier.scalar(tensor)
    with np.errstate(over="ignore"):
        found = np.float32(1) / value
    if not np.finfo(np.float32).tiny <= found < np.inf:
        raise CheckpointError(f"{tensor.name} is {value}, and its reciprocal is no normal float32")
    return found


# --- the configuration --------------------------------------------------------------------------------


class _Scheme(NamedTuple):
    """What a configuration says, in the words of neither layout."""

    ignored: tuple[str, ...]
    with_input: bool
    with_fp8_cache: bool


def _read_scheme(source: Path, config: Json, verifier: Verifier, layout: Layout) -> _Scheme:
    """
    Raises:
        CheckpointError: it says more than a _Scheme can.
    """
    others = [source / file for file in layout.other_files([], False)]
    other: Json = {}
    for path in others:
        if path.is_file():
            other = read_json(path).get("quantization") or {}
    said = config.get("quantization_config") or other  # older checkpoints have the other file only
    if not said:
        raise CheckpointError(f"{source / CONFIG_NAME} has no quantization_config")
    algorithm = said.get("quant_algo", _ALGORITHMS[0])
    if algorithm not in _ALGORITHMS:
        raise CheckpointError(
            f"{source}: quant_algo is {algorithm!r}, and must be {' or '.join(_ALGORITHMS)}"
        )
    for key in _UNTRANSLATED:
        if said.get(key):
            raise CheckpointError(f"{source / CONFIG_NAME} has a {key}, which cannot be translated")
    with_input = _quantizes_input(source, said, algorithm)
    lacking = [module.name for module in verifier.modules.values() if module.input_scale is None]
    if with_input and lacking:
        raise CheckpointError(f"{source}: {lacking[0]} has no input scale, though activations are quantized")
    cache = said.get("kv_cache_scheme") or said.get("kv_cache_quant_algo") or other.get("kv_cache_quant_algo")
    if cache and not _is_fp8(cache):
        raise CheckpointError(f"{source}: the KV cache is {cache}: only FP8 can be translated")
    listed = said.get("ignore") or said.get("exclude_modules") or other.get("exclude_modules") or []
    return _Scheme(_names(verifier, [str(name) for name in listed]), with_input, bool(cache))


def _quantizes_input(source: Path, said: Json, algorithm: str) -> bool:
    groups = list((said.get("config_groups") or {}).values())
    for group in groups:
        numbers = group.get("weights") or {}
        if (numbers.get("num_bits"), numbers.get("group_size")) != (4, BLOCK_SIZE):
            raise CheckpointError(
                f"{source / CONFIG_NAME}: config_groups: weights must have num_bits 4 and group_size 16"
            )
        if group.get("output_activations"):
            raise CheckpointError(f"{source / CONFIG_NAME}: config_groups: outputs cannot be quantized")
    answers = {bool(group.get("input_activations")) for group in groups} or {algorithm == "NVFP4"}
    if len(answers) > 1:
        raise CheckpointError(
            f"{source / CONFIG_NAME}: config_groups: all must quantize activations, or none"
        )
    return answers.pop()


def _is_fp8(cache: Any) -> bool:
    """Of kv_cache_quant_algo, or of a kv_cache_scheme."""
    if not isinstance(cache, dict):
        return str(cache).upper() == "FP8"
    numbers = (cache.get("num_bits"), cache.get("type"), cache.get("strategy") or "tensor")
    return numbers == (8, "float", "tensor") and not cache.get("dynamic")


def _names(verifier: Verifier, listed: Sequence[str]) -> tuple[str, ...]:
    """The list without its patterns, but with all matrices that are not quantized, and what patterns name."""
    kept = [name for name in listed if not name.startswith("re:") and "*" not in name]
    named = {"lm_head"} if matches("lm_head", listed) else set()  # it may share the embedding's tensor
    for tensor in verifier.checkpoint.tensors:
        name = tensor.name.removesuffix(".weight")
        is_matrix = len(tensor.shape) == 2 and name != tensor.name
        if tensor.dtype in FLOAT_DTYPES and (is_matrix or (len(tensor.shape) > 2 and matches(name, listed))):
            named.add(name)
    return (*kept, *sorted(named - set(kept)))


def _write_scheme(folder: Path, config: Json, layout: Layout, scheme: _Scheme) -> None:
    quantization = layout.config(scheme.ignored, scheme.with_input)
    files = layout.other_files(scheme.ignored, scheme.with_input)
    if scheme.with_fp8_cache:
        quantization["kv_cache_scheme"] = layout.fp8_cache
        for content in files.values():
            content["quantization"]["kv_cache_quant_algo"] = "FP8"
    for name, content in files.items():
        write_json(folder / name, content)
    write_json(folder / CONFIG_NAME, config | {"quantization_config": quantization})
