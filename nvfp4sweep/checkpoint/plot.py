"""The picture of a report: what each tensor saves, and where the chosen codes lie."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from nvfp4sweep.checkpoint.report import Row, saving, sum_rows
from nvfp4sweep.checkpoint.writer import replacing
from nvfp4sweep.formats import MAX_CODE

#: With more tensors than this, those whose names differ only in numbers share a bar.
_MOST_BARS = 48
#: Beyond this the picture would be too tall: the bars with the most blocks are kept.
_MOST_KINDS = 96

_GREEN, _ORANGE, _SLATE, _GREY, _INK = "#2f8f5b", "#e08a2e", "#7c8798", "#c9ced6", "#2b2f36"


def write_plot(path: Path, rows: Sequence[Row], total: Row) -> None:
    """Save a PNG with two panels.

    Raises:
        OSError: the file cannot be written; then none is left behind.
    """
    bars = list(rows) if len(rows) <= _MOST_BARS else _by_kind(rows)
    # Figure and canvas by hand: no window system, and no global state of pyplot.
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03)
    figure = Figure(figsize=(13.5, max(5.2, 1.9 + 0.215 * len(bars))), layout=layout, dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 0.92))
    figure.suptitle(
        f"Exact NVFP4 block scales: {saving(total.errors.exact, total.errors.absmax):.1f} % less squared "
        f"error than absmax, {saving(total.errors.exact, total.errors.four_over_six):.1f} % less than 4/6",
        fontsize=14, fontweight="bold", color=_INK,
    )  # fmt: skip
    _draw_savings(left, bars, len(rows), total)
    _draw_offsets(right, total)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_savings(axes: Any, bars: Sequence[Row], tensors: int, total: Row) -> None:
    places = range(len(bars))
    exact = [bar.saving for bar in bars]
    four_over_six = [saving(bar.errors.four_over_six, bar.errors.absmax) for bar in bars]
    largest = max(1.0, *exact)
    drawn = axes.barh(places, exact, color=_GREEN, height=0.74, label="exact")
    marks = axes.plot(four_over_six, places, "D", color=_ORANGE, mec="white", ms=5.5, label="4/6")
    for i, value in enumerate(exact):
        inside = value > 0.1 * largest
        axes.annotate(
            f"{value:.1f}", (0 if inside else value, i), (5, 0), textcoords="offset points", va="center",
            fontsize=8, color="white" if inside else _INK,
        )  # fmt: skip
    line = axes.axvline(total.saving, color=_INK, lw=1, ls=(0, (4, 3)), label="exact, all tensors")
    axes.set_yticks(places, [bar.name.removesuffix(".weight") for bar in bars], fontsize=8.5)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(min(0, *four_over_six) * 1.06, largest * 1.06)
    kinds = "" if len(bars) == tensors else f"  ({tensors:,} tensors, by kind)"
    axes.set_xlabel(f"squared error saved against absmax, %{kinds}", color=_INK)
    axes.legend(
        handles=(drawn, *marks, line), loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, frameon=False,
        fontsize=9, labelcolor=_INK,
    )  # fmt: skip
    axes.set_title("Saving by tensor", fontsize=12, loc="left", color=_INK, pad=10)
    _plain(axes, "x")


def _draw_offsets(axes: Any, total: Row) -> None:
    counts = total.errors.offsets
    used = np.flatnonzero(counts) - MAX_CODE
    offsets = np.arange(min(used[0], -1), max(used[-1], 1) + 1)
    percent = 100 * counts[offsets + MAX_CODE] / counts.sum()
    colours = [_SLATE if offset == 0 else _GREEN for offset in offsets]
    axes.bar(offsets, percent, color=colours, width=0.82)
    if len(offsets) <= 24:
        for offset, value in zip(offsets, percent, strict=True):
            axes.annotate(
                _percentage(value), (offset, value), (0, 3), textcoords="offset points", ha="center",
                fontsize=9, color=_INK,
            )  # fmt: skip
        axes.set_xticks(offsets, [f"{offset:+d}" if offset else "0" for offset in offsets])
    axes.set_ylim(0, percent.max() * 1.09)
    axes.set_xlabel("chosen E4M3 code minus the absmax code", color=_INK)
    axes.set_ylabel("% of blocks", color=_INK)
    kept = _percentage(100 * counts[MAX_CODE] / counts.sum())
    axes.set_title(f"{kept} % of {total.blocks:,} blocks keep their absmax scale",
                   fontsize=12, loc="left", color=_INK, pad=10)  # fmt: skip
    _plain(axes, "y")


def _percentage(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.1f}" if value >= 0.05 else "<0.1"


def _plain(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(color=_GREY, labelcolor=_INK)
    axes.grid(axis=grid, color=_GREY, linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)


def _by_kind(rows: Sequence[Row]) -> list[Row]:
    """Rows whose names differ only in numbers, summed; at most _MOST_KINDS, in order of appearance."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(re.sub(r"\d+", "*", row.name), []).append(row)
    bars = [sum_rows(name, members) for name, members in kinds.items()]
    kept = sorted(range(len(bars)), key=lambda i: -bars[i].blocks)[:_MOST_KINDS]
    return [bars[i] for i in sorted(kept)]
