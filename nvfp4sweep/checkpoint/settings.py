"""What an NVFP4 checkpoint is to be."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from nvfp4sweep.checkpoint.layouts import MODELOPT, Layout
from nvfp4sweep.formats import E4M3_MAX, MIN_CODE
from nvfp4sweep.problem import check_min_code


@dataclass(frozen=True)
class Settings:
    """What the checkpoint is to be.

    Attributes:
        layout: one of layouts.LAYOUTS.
        input_scale: the multiplier of activations, written for each weight (W4A4); None for W4A16.
        include: regular expressions: tensors to quantize though the rules leave them out by name.
        exclude: tensors to leave as they are.
        groups: tensors that match one of these, with the same text in its parentheses, share a global
            scale, besides those that plan.FUSED_LAYERS names.
        min_code: the lowest code of a block scale: 8 where a runtime flushes subnormal ones to zero.
        scale_max: the largest block scale, up to 448. A lower one leaves headroom, as 256 does for 4/6.
        strict: refuse a linear weight with a K that 16 does not divide.
        skip_bad: leave weights with NaN or infinity as they are.

    Raises:
        ValueError: one of them cannot be; the message names it.
    """

    layout: Layout = MODELOPT
    input_scale: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    min_code: int = MIN_CODE
    scale_max: float = E4M3_MAX
    strict: bool = False
    skip_bad: bool = False

    def __post_init__(self) -> None:
        for name in ("include", "exclude", "groups"):
            check_patterns(name, getattr(self, name))
        if self.input_scale is not None and not 0 < self.input_scale < float("inf"):
            raise ValueError(f"input_scale={self.input_scale} must be positive and finite")
        check_min_code(self.min_code)
        if not 0 < self.scale_max <= E4M3_MAX:
            raise ValueError(f"scale_max={self.scale_max} must lie in (0, {E4M3_MAX:g}]")


def check_patterns(name: str, patterns: Iterable[str]) -> None:
    """
    Raises:
        ValueError: one is not a regular expression; the message begins with `name`.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from None
