"""Markdown tables of times, and what each measured name means."""

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

#: Times on the device.
KERNELS = {
    "sweep": "sweep alone: global amax given, no check",
    "sweep_axis_0": "the same along axis 0",
    "sweep_block_size_32": "the same with blocks of 32",
    "sweep_with_codes_and_errors": "`sweep`: codes and errors too",
    "calibrate_checked": "`calibrate(weight)`: finite check, global amax, sweep",
    "calibrate_in_full": "`calibrate` without check: global amax and sweep",
    "quantize": "`quantize`",
    "quantize_given_amax": "`quantize`: global amax given, no check",
    "quantize_in_full": "`quantize` without check: global amax, sweep and pack",
    "global_amax": "`global_amax`: the weight searched for its largest magnitude, NaN and infinity",
    "floor": "floor: read the weight, write one float a block",
    "modelopt_sweep": "ModelOpt's `nvfp4_fp8_scale_sweep`",
    "modelopt_reference": "ModelOpt's reference calibrator, 126 passes",
}
#: Times of whole calls, as a user makes them.
CALLS = {
    "calibrate": "`calibrate(weight)`: finite check, global amax, sweep",
    "abs_max": "`np.abs(weight).max()`",
    "sweep": "`sweep(weight)`: codes and errors too",
    "quantize": "`quantize`",
    "global_amax": "`global_amax(weight)`: finite check included",
    "vector_norm": "`torch.linalg.vector_norm(weight, inf)`",
    "empty_launch": "a Triton kernel that writes one float",
    "sweep_64_blocks": "one small call (64 blocks), result on the host",
}
#: With what calibrate weights the errors.
OBJECTIVES = {
    "importance": "an importance, lognormal, one an input",
    "hessian_512_tokens": "a Hessian of 512 Gaussian tokens",
    "hessian_common_0.5": "the Hessian 0.5 I + 0.5 1 1^T",
    "hessian_common_0.9": "the Hessian 0.1 I + 0.9 1 1^T",
    "hessian_rank_1": "a Hessian of one token",
}


def objectives(rows: dict[str, Row]) -> list[str]:
    """Times of calibrate with importances and Hessians, beside the plain one of the same run."""
    cells = {"-": [times(rows["calibrate"]), "1", ""]} | {
        text: [
            times(rows[name]),
            f"{rows[name]['over_calibrate']:.3g}",
            f"{rows[name]['blocks_equal_to_oracle']:,}",
        ]
        for name, text in OBJECTIVES.items()
        if name in rows
    }
    head = ["`calibrate(weight)`, float32, with", "ms", "times the plain one", "blocks equal to the oracle's"]
    note = "With Hessians the gate compares one row in 32."
    return [*plain_table(head, cells), "", note, ""]


def table(columns: dict[str, Row], meaning: dict[str, str]) -> list[str]:
    """Times by name and dtype, of the names that the first column has."""
    cells = {
        text: [times(column[name]) if name in column else "" for column in columns.values()]
        for name, text in meaning.items()
        if name in next(iter(columns.values()))
    }
    return plain_table(["what", *(f"{dtype}, ms" for dtype in columns)], cells)


def plain_table(head: list[str], rows: dict[str, list[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def times(row: dict[str, float]) -> str:
    return f"{row['p50_ms']:.4g} ({row['p20_ms']:.4g} .. {row['p80_ms']:.4g})"


def ratio(row: Row, over: str, under: str) -> str:
    """Of two medians; empty where one was not measured."""
    if over not in row or under not in row:
        return ""
    return f"{row[over]['p50_ms'] / row[under]['p50_ms']:.3g}"


def shape(entry: Row) -> str:
    return "x".join(map(str, entry["shape"]))


def by_gpus(numbers: Iterable[int], text: str) -> list[str]:
    """A column for each number of GPUs."""
    return [f"{n} GPU{'s' * (n > 1)}: {text}" for n in numbers]


def versions(entry: Row) -> str:
    return ", ".join(f"{name} {version}" for name, version in entry["versions"].items())


def provenance(entry: Row) -> str:
    return f"Weight {shape(entry)}, {run(entry)}."


def run(entry: Row) -> str:
    """On what code and machine it was measured, and when."""
    driver = f"driver {entry['cuda']['driver']}, " if "cuda" in entry else ""
    machine = f"; {driver}{entry['host']}" if "host" in entry else ""
    return f"commit {entry['commit']}, {entry['time']}; {versions(entry)}{machine}"


def layout(row: Row) -> str:
    """Processes x devices of each, or the one that they share."""
    return f"{row['processes']} x {row['devices'] // row['processes'] or 1}"
