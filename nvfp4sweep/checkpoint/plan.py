"""Which tensors of a checkpoint are linear weights, and which of them share a global amax.

Both rules are here and nowhere else. They go by names, since a checkpoint holds nothing better.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from nvfp4sweep.checkpoint.reader import TensorInfo
from nvfp4sweep.formats import BLOCK_SIZE

FLOAT_DTYPES = ("F32", "F16", "BF16", "F64")

#: Linear in shape, but NVFP4 checkpoints keep them in high precision: (reason, pattern in the name).
KEPT_IN_HIGH_PRECISION = (
    ("embedding", re.compile(r"embed|token_type|(^|\.)(wte|wpe)\.")),
    ("output head", re.compile(r"(^|\.)lm_head\.|^output\.weight$")),
    ("router", re.compile(r"router|(^|\.)(shared_expert_)?gate\.weight$")),
)
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


@dataclass(frozen=True)
class Plan:
    """What to calibrate.

    Attributes:
        tensors: the linear weights, in natural order of their names (layer 2 before layer 10).
        skipped: the names of all other tensors, by the reason for leaving them out.
    """

    tensors: tuple[TensorInfo, ...]
    skipped: dict[str, tuple[str, ...]]


def make_plan(tensors: Iterable[TensorInfo]) -> Plan:
    """Divide a checkpoint's tensors by `reason_to_skip`."""
    chosen: list[TensorInfo] = []
    skipped: dict[str, list[str]] = {}
    for tensor in sorted(tensors, key=lambda tensor: _natural_key(tensor.name)):
        reason = reason_to_skip(tensor)
        if reason is None:
            chosen.append(tensor)
        else:
            skipped.setdefault(reason, []).append(tensor.name)
    return Plan(tuple(chosen), {reason: tuple(names) for reason, names in skipped.items()})


def reason_to_skip(tensor: TensorInfo) -> str | None:
    """Why a tensor is not calibrated, or None for a linear weight.

    A linear weight is a floating tensor [N, K] whose name ends in "weight", or stacked experts
    [E, N, K] (named such as experts.gate_up_proj, with or without .weight), with K divisible by 16.
    Blocks run along the last axis; weights stored as [K, N] are not recognised as such. Embeddings,
    output heads and routers are left out, as NVFP4 checkpoints leave them.
    """
    axes = len(tensor.shape)
    if tensor.dtype not in FLOAT_DTYPES:
        return "integer or already quantized"
    if axes < 2:
        return "fewer than two axes"
    if not (_WEIGHT.search(tensor.name) if axes == 2 else axes == 3 and _EXPERTS.search(tensor.name)):
        return "not a linear weight by name or shape"
    for reason, pattern in KEPT_IN_HIGH_PRECISION:
        if pattern.search(tensor.name):
            return reason
    if tensor.size == 0:
        return "empty"
    if tensor.shape[-1] % BLOCK_SIZE:
        return f"last axis not divisible by {BLOCK_SIZE}"
    return None


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


def _natural_key(name: str) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
