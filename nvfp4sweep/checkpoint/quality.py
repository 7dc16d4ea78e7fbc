"""What a checkpoint's scales are worth, told beside it: JSON for programs, a page for people."""

import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import nvfp4sweep
from nvfp4sweep.checkpoint.baselines import ScaleErrors
from nvfp4sweep.checkpoint.plan import natural_key
from nvfp4sweep.checkpoint.report import Row, saving, sum_rows
from nvfp4sweep.checkpoint.writer import write_json, write_text
from nvfp4sweep.formats import BLOCK_SIZE, MAX_CODE
from nvfp4sweep.window import FIRST_NORMAL_CODE

JSON_NAME = "nvfp4_report.json"
PAGE_NAME = "nvfp4_report.html"


class Quality(NamedTuple):
    """A quantized matrix.

    Attributes:
        module: its layer.
        shape: (N, K).
        global_amax: what its global scale comes from.
        errors: `exact` is what was stored.
    """

    module: str
    shape: tuple[int, int]
    global_amax: float
    errors: ScaleErrors

    @property
    def blocks(self) -> int:
        return self.shape[0] * self.shape[1] // BLOCK_SIZE

    def as_json(self) -> dict[str, Any]:
        """Counts of codes and offsets are sparse: only those above 0, by number."""
        errors = self.errors
        return {
            "module": self.module,
            "shape": list(self.shape),
            "global_amax": self.global_amax,
            "blocks": self.blocks,
            "squared_error": {
                "absmax": errors.absmax,
                "four_over_six": errors.four_over_six,
                "stored": errors.exact,
            },
            "saved_percent": saving(errors.exact, errors.absmax),
            "blocks_by_code": _sparse(errors.codes, 0),
            "blocks_by_offset_from_absmax": _sparse(errors.offsets, MAX_CODE),
            "blocks_clipped": errors.clipped,
        }

    @staticmethod
    def from_json(content: dict[str, Any]) -> "Quality":
        errors = content["squared_error"]
        return Quality(
            content["module"],
            tuple(content["shape"]),
            content["global_amax"],
            ScaleErrors(
                errors["absmax"],
                errors["four_over_six"],
                errors["stored"],
                _dense(content["blocks_by_offset_from_absmax"], MAX_CODE, 2 * MAX_CODE + 1),
                _dense(content["blocks_by_code"], 0, MAX_CODE + 1),
                content["blocks_clipped"],
            ),
        )


def write_quality(
    folder: Path,
    qualities: Sequence[Quality],
    skipped: dict[str, tuple[str, ...]],
    warnings: Sequence[str],
) -> None:
    """Write JSON_NAME and PAGE_NAME. They depend on nothing but the arguments.

    Args:
        skipped: the tensors that were copied, by the reason.
    """
    ordered = sorted(qualities, key=lambda quality: natural_key(quality.module))
    rows = [Row(q.module, q.shape, q.blocks, q.errors, 0.0) for q in ordered]
    total = sum_rows("total", rows)
    content = {
        "producer": {"name": "nvfp4sweep", "version": nvfp4sweep.__version__},
        "saved_percent": total.saving,
        "warnings": list(warnings),
        "skipped": {reason: list(names) for reason, names in skipped.items()},
        "modules": [quality.as_json() for quality in ordered],
    }
    write_json(folder / JSON_NAME, content)
    write_text(folder / PAGE_NAME, _page(rows, total, skipped, warnings))


def _page(
    rows: Sequence[Row], total: Row, skipped: dict[str, tuple[str, ...]], warnings: Sequence[str]
) -> str:
    template = Template(files(__package__).joinpath("quality.html").read_text(encoding="utf-8"))
    return template.substitute(
        version=nvfp4sweep.__version__,
        saved=f"{total.saving:.2f}",
        modules=f"{len(rows):,}",
        blocks=f"{total.blocks:,}",
        total=_line(total),
        rows="\n".join(map(_line, rows)),
        codes=_bars(total.errors.codes, 0, "code"),
        offsets=_bars(total.errors.offsets, MAX_CODE, "offset"),
        warnings=_list(warnings) or "<p>None.</p>",
        skipped="\n".join(
            f"<details><summary>{html.escape(reason)}: {len(names):,}</summary>{_list(names)}</details>"
            for reason, names in skipped.items()
        ),
    )


def _line(row: Row) -> str:
    errors, codes = row.errors, row.errors.codes
    percent = 100 / max(1, row.blocks)
    cells = (
        ("x".join(map(str, row.shape or ())), None),
        (f"{row.blocks:,}", row.blocks),
        *((f"{error:.5g}", error) for error in (errors.absmax, errors.four_over_six, errors.exact)),
        (f'<meter max="50" value="{max(0.0, row.saving):.2f}"></meter> {row.saving:.2f} %', row.saving),
        (f"{errors.clipped * percent:.2f} %", errors.clipped * percent),
        (f"{codes[MAX_CODE] * percent:.2f} %", codes[MAX_CODE] * percent),
        (f"{codes[:FIRST_NORMAL_CODE].sum() * percent:.2f} %", codes[:FIRST_NORMAL_CODE].sum() * percent),
    )
    drawn = "".join(
        f"<td>{text}</td>" if value is None else f'<td data-value="{value!r}">{text}</td>'
        for text, value in ((text, None if value is None else float(value)) for text, value in cells)
    )
    return f"<tr><th>{html.escape(row.name)}</th>{drawn}</tr>"


def _bars(counts: npt.NDArray[np.int64], zero: int, name: str) -> str:
    """An SVG with a bar for each number that occurs, and those between; the first and last are written."""
    used = np.flatnonzero(counts)
    if not used.size:
        return ""
    first, last = int(used[0]), int(used[-1])
    height = 100 / counts.max()
    bars = (
        f'<rect x="{8 * (i - first)}" y="{100 - height * counts[i]:.2f}" width="7" '
        f'height="{height * counts[i]:.2f}"><title>{name} {i - zero}: {counts[i]:,} blocks</title></rect>'
        for i in used
    )
    width = max(160, 8 * (last - first + 1))
    ends = (
        f'<text x="0" y="112">{name} {first - zero}</text>'
        f'<text x="{width}" y="112" text-anchor="end">{last - zero}</text>'
    )
    return (
        f'<svg viewBox="0 0 {width} 116" role="img" aria-label="blocks by {name}">{"".join(bars)}{ends}</svg>'
    )


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>" if items else ""


def _sparse(counts: Any, zero: int) -> dict[str, int]:
    return {str(int(i) - zero): int(counts[i]) for i in np.flatnonzero(counts)}


def _dense(counts: dict[str, int], zero: int, length: int) -> Any:
    dense = np.zeros(length, np.int64)
    for number, count in counts.items():
        dense[int(number) + zero] = count
    return dense
