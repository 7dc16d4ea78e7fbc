"""Which tensors of a checkpoint are linear weights, and which of them share a global amax.

Both rules are here and nowhere else. They go by names, since a checkpoint holds nothing better.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nvfp4sweep.checkpoint.reader import TensorInfo
from nvfp4sweep.formats import BLOCK_SIZE

FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")

#: Linear in shape, but NVFP4 checkpoints keep them in high precision: (reason, pattern in the name).
KEPT_IN_HIGH_PRECISION = (
    ("embedding", re.compile(r"embed|token_type|(^|\.)(wte|wpe)\.")),
    ("output head", re.compile(r"(^|\.)lm_head\.|^output\.weight$")),
    ("vision tower", re.compile(r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector)\.")),
    ("router", re.compile(r"router|(^|\.)(shared_expert_)?gate\.weight$")),
)
_UNEVEN = f"not divisible by {BLOCK_SIZE}"
_WEIGHT = re.compile(r"(^|[._])weight$")
#: Three axes are stacked experts [E, N, K] only where the name says so: convolutions have three too.
_EXPERTS = re.compile(r"(expert|moe)(.*\.)?(.*_proj|w[123]|.*weight)$")

#: Layers of one parent module whose weights runtimes concatenate, and then need one global scale.
FUSED_LAYERS = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"q_a_proj", "kv_a_proj_with_mqa"}),
    frozenset({"query", "key", "value"}),
    frozenset({"to_q", "to_k", "to_v"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
)


#: Layers of which each rank of tensor parallelism takes a part of the inputs, and in which numbers.
_ROW_PARALLEL = re.compile(r"(^|\.)(o_proj|out_proj|down_proj|w2|wo|fc2|dense_4h_to_h)(\.weight)?$")
_TENSOR_PARALLEL = (2, 4, 8)

#: Models whose stacked experts are [E, K, N], and those of them that alternate rows of gate and up.
TRANSPOSED_EXPERTS = frozenset({"llama4", "llama4_text", "gpt_oss"})
INTERLEAVED_EXPERTS = frozenset({"gpt_oss"})


@dataclass(frozen=True)
class Plan:
    """What to calibrate.

    Attributes:
        tensors: the linear weights, in natural order of their names (layer 2 before layer 10).
        skipped: the names of all other tensors, by the reason for leaving them out.
    """

    tensors: tuple[TensorInfo, ...]
    skipped: dict[str, tuple[str, ...]]


def make_plan(tensors: Iterable[TensorInfo], rule: Callable[[TensorInfo], str | None] | None = None) -> Plan:
    """Divide a checkpoint's tensors by a rule: `reason_to_skip`, or one like it."""
    rule = rule or reason_to_skip
    chosen: list[TensorInfo] = []
    skipped: dict[str, list[str]] = {}
    for tensor in sorted(tensors, key=lambda tensor: natural_key(tensor.name)):
        reason = rule(tensor)
        if reason is None:
            chosen.append(tensor)
        else:
            skipped.setdefault(reason, []).append(tensor.name)
    return Plan(tuple(chosen), {reason: tuple(names) for reason, names in skipped.items()})


def reason_to_skip(
    tensor: TensorInfo, model_type: str = "", *, whatever_its_name: bool = False
) -> str | None:
    """Why a tensor is not calibrated, or None for a linear weight.

    A linear weight is a floating tensor [N, K] whose name ends in "weight", or stacked experts
    [E, N, K] (named such as experts.gate_up_proj, with or without .weight), with K divisible by 16.
    Blocks run along the last axis; weights stored as [K, N] are not recognised as such, but for the
    TRANSPOSED_EXPERTS of a `model_type`. What KEPT_IN_HIGH_PRECISION names is left out, as NVFP4
    checkpoints leave it, unless `whatever_its_name`.
    """
    axes = len(tensor.shape)
    if tensor.dtype not in FLOAT_DTYPES:
        return "integer or already quantized"
    if axes < 2:
        return "fewer than two axes"
    if not (_WEIGHT.search(tensor.name) if axes == 2 else axes == 3 and _EXPERTS.search(tensor.name)):
        return "not a linear weight by name or shape"
    for reason, pattern in KEPT_IN_HIGH_PRECISION:
        if pattern.search(tensor.name) and not whatever_its_name:
            return reason
    if tensor.size == 0:
        return "empty"
    if axes == 3 and model_type in TRANSPOSED_EXPERTS:
        return f"axis 1 {_UNEVEN}" if tensor.shape[1] % BLOCK_SIZE else None
    return f"last axis {_UNEVEN}" if tensor.shape[-1] % BLOCK_SIZE else None


@dataclass(frozen=True)
class Matrix:
    """A matrix [N, K] of a quantized checkpoint: a linear weight, or one of a stack's.

    Attributes:
        module: the name of its layer.
        shape: (N, K).
        expert: which of a stack [E, ...] it is of; None for a weight of two axes.
        rows: which of the tensor's N are its own.
        transposed: whether the tensor has them as [K, N].
    """

    module: str
    shape: tuple[int, int]
    expert: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    transposed: bool = False

    def of(self, weight: Any) -> Any:
        """Its part of the tensor, a view."""
        if self.expert is not None:
            weight = weight[self.expert]
        return (weight.T if self.transposed else weight)[self.rows]


def matrices(tensor: TensorInfo, model_type: str = "") -> list[Matrix]:
    """What a tensor that `reason_to_skip` does not name is to runtimes, which load experts one by one.

    Args:
        model_type: of the model's configuration: it tells how stacked experts lie.
    """
    module = tensor.name.removesuffix(".weight")
    if len(tensor.shape) == 2:
        return [Matrix(module, tensor.shape)]
    transposed = model_type in TRANSPOSED_EXPERTS
    experts, rows, columns = tensor.shape
    if transposed:
        rows, columns = columns, rows
    parent, _, layer = module.rpartition(".")
    parts = {layer: slice(None)}
    if layer == "gate_up_proj" and model_type in INTERLEAVED_EXPERTS:
        parts = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    elif layer == "gate_up_proj":
        parts = {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, None)}
    return [
        Matrix(f"{parent}.{i}.{name}", (len(range(rows)[part]), columns), i, part, transposed)
        for i in range(experts)
        for name, part in parts.items()
    ]


def fusion_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The names whose weights are fused at inference: the members of a FUSED_LAYERS set in one module.

    Only groups of two or more are returned, each in the order of `names`.
    """
    groups: dict[tuple[str, frozenset[str]], list[str]] = {}
    for name in names:
        parent, _, layer = name.removesuffix(".weight").rpartition(".")
        for fused in FUSED_LAYERS:
            if layer in fused:
                groups.setdefault((parent, fused), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def shared_groups(names: Sequence[str], patterns: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """The names that share a global scale: fusion groups, and what expressions put together.

    Groups that overlap are one. Only those of two or more are returned.

    Args:
        patterns: names that match one of these, with the same text in its parentheses, are a group.
    """
    groups = fusion_groups(names)
    for pattern in patterns:
        matching: dict[tuple[str | None, ...], list[str]] = {}
        for name in names:
            if match := re.search(pattern, name):
                matching.setdefault(match.groups(), []).append(name)
        groups += [tuple(group) for group in matching.values()]
    joined: dict[str, tuple[str, ...]] = {}
    for group in groups:
        both = tuple(dict.fromkeys(member for name in group for member in joined.get(name, (name,))))
        joined.update(dict.fromkeys(both, both))
    distinct = {id(group): group for group in joined.values()}  # tuples hash all their names, each time
    return [group for group in distinct.values() if len(group) > 1]


def cut_by_tensor_parallelism(tensors: Iterable[TensorInfo], model_type: str = "") -> list[str]:
    """A sentence for each kind of layer whose K, divided by the ranks, is no multiple of 16."""
    found: dict[tuple[str, int], list[str]] = {}
    for tensor in tensors:
        if match := _ROW_PARALLEL.search(tensor.name):
            columns = matrices(tensor, model_type)[0].shape[1]
            found.setdefault((match[2], columns), []).append(tensor.name)
    sentences = []
    for (_, columns), names in found.items():
        cut = [n for n in _TENSOR_PARALLEL if columns % n == 0 and columns // n % BLOCK_SIZE]
        if cut:
            others = f" and {len(names) - 1:,} like it" if len(names) > 1 else ""
            sentences.append(
                f"{names[0]}{others}: K = {columns:,}, and {cut[0]} ranks of tensor parallelism take "
                f"{columns // cut[0]:,} each, which cuts blocks of {BLOCK_SIZE}"
            )
    return sentences


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """To sort by: layer 2 comes before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
