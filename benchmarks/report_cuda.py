"""The CUDA part of docs/benchmarks.md. A section that the ledger's line lacks is left out."""

from benchmarks.report_tables import CALLS, KERNELS, Row, plain_table, provenance, ratio, shape, table, times

_DTYPES = ("bfloat16", "float32", "float16")

_METHOD = """Where a section below names another weight, that one is timed, and a sample of its blocks is
compared: amaxes, codes and errors. So it is for axis 0 and for blocks of 32. Times on the device are
those between two events queued behind a delay, so that launches are hidden. Wall times run from the call
on an idle device until `torch.cuda.synchronize()` returns, unless a row says otherwise. Weights rotate
through more memory than the second-level cache holds, except in small calls."""

_SMALL = {
    "calibrate": "`calibrate(weight)`",
    "calibrate_unchecked": "`calibrate(weight, check_finite=False)`",
    "sweep": "sweep alone: global amax given, no check",
    "empty_launch": "a Triton kernel that writes one float, launched as Triton does",
}
_EXPERTS = {"stacked": "a global amax an expert", "one_matrix": "the same elements as one matrix"}
_HARD = {
    "gaussian": "Gaussian",
    "sparse": "Gaussian, 9 of 10 elements zero",
    "uniform": "uniform",
    "zero": "all zero",
}


_OBJECTIVES = {
    "plain": "-",
    **{f"importance_sigma_{s}": f"an importance an input, lognormal, sigma {s}" for s in range(4)},
    "tokens_512": "a Hessian of 512 Gaussian tokens",
    "common_0.5": "the Hessian 0.5 I + 0.5 1 1^T",
    "common_0.9": "the Hessian 0.1 I + 0.9 1 1^T",
    "tokens_8": "a Hessian of 8 tokens",
    "rank_1": "the Hessian 1 1^T",
}


def cuda(entry: Row, plot: str) -> str:
    columns = {dtype: entry[dtype] for dtype in _DTYPES if dtype in entry}
    lines = [f"## CUDA: {entry['device']}", "", provenance(entry), "", _METHOD, ""]
    if columns:
        lines += _weight(columns) + _facts(columns)
    sections = {"small": _small, "first_call": _first_call, "experts": _experts, "hard": _hard}
    for name, section in sections.items():
        if name in entry:
            lines += section(entry[name])
    if "sizes" in entry:
        lines += _sizes(entry["sizes"], plot)
    return "\n".join(lines)


def cuda_objectives(entry: Row) -> str:
    """Sweeps with importances and Hessians, beside the plain one and ModelOpt's."""
    columns = {dtype: entry[dtype] for dtype in _DTYPES if dtype in entry}
    lines = [f"## CUDA, with importances and Hessians: {entry['device']}", "", provenance(entry), ""]
    lines += [
        "Time on the device of the sweep alone. The codes and amaxes of every block were compared with the",
        "CPU engine's; amaxes, codes and errors of a sample with the oracle's.",
        "",
    ]
    cells = {
        text: [f"{times(c['device'][name])}, {ratio(c['device'], name, 'plain')}" for c in columns.values()]
        for name, text in _OBJECTIVES.items()
    }
    head = ["with", *(f"{dtype}, ms, and times the plain one" for dtype in columns)]
    lines += [*plain_table(head, cells), ""]
    peers = {}
    for dtype, column in columns.items():
        for name, text in _OBJECTIVES.items():
            if f"modelopt_{name}" in column["device"]:
                against = column[f"against_modelopt_{name}"]
                peers[f"{dtype}, {text}"] = [
                    times(column["device"][f"modelopt_{name}"]),
                    ratio(column["device"], f"modelopt_{name}", name),
                    f"{against['differ']:,}",
                    f"{against['ours_worse']:,}",
                    f"{against['theirs_worse']:,}",
                ]
    if peers:
        head = ["weight and Hessian", "ModelOpt's Hessian sweep, ms", "over ours", "blocks that differ"]
        head += ["ours worse, in float64", "ModelOpt's worse"]
        lines += ["ModelOpt's sweep in the same run:", "", *plain_table(head, peers), ""]
    return "\n".join(lines)


def _weight(columns: dict[str, Row]) -> list[str]:
    device = {dtype: row["device"] for dtype, row in columns.items()}
    wall = {dtype: row["wall"] for dtype, row in columns.items()}
    lines = ["Time on the device:", "", *table(device, KERNELS), ""]
    return [*lines, "Wall time, launches and the wait included:", "", *table(wall, CALLS), ""]


def _facts(columns: dict[str, Row]) -> list[str]:
    rows = columns.values()
    peak = [row["peak_extra_bytes"] for row in rows]
    device = [row["device"] for row in rows]
    facts = {
        "blocks equal to the oracle's, of all": [f"{row['blocks_equal_to_oracle']:,}" for row in rows],
        "blocks where ModelOpt's sweep differs": [
            str(row["blocks_that_differ"].get("modelopt_sweep", "")) for row in rows
        ],
        "peak memory beyond weight and result, bytes: sweep alone": [f"{p['sweep']:,}" for p in peak],
        "the same: `calibrate(weight)`": [f"{p['calibrate']:,}" for p in peak],
        "sweep alone / floor": [ratio(d, "sweep", "floor") for d in device],
        "`calibrate` without check / floor": [ratio(d, "calibrate_in_full", "floor") for d in device],
        "`quantize` without check / floor": [ratio(d, "quantize_in_full", "floor") for d in device],
        "ModelOpt's sweep / sweep alone": [ratio(d, "modelopt_sweep", "sweep") for d in device],
        "ModelOpt's reference / sweep alone": [ratio(d, "modelopt_reference", "sweep") for d in device],
    }
    lines = ["Correctness, memory, and ratios of the medians on the device:", ""]
    measured = {name: cells for name, cells in facts.items() if any(cells)}
    return [*lines, *plain_table(["what", *columns], measured), ""]


def _small(section: Row) -> list[str]:
    lines = ["### Small calls", ""]
    lines += [
        f"bfloat16 {shape(section)}, {_compared(section)}. Time on the host, launches included, of calls"
    ]
    lines += [
        "that do not wait for the device, a hundred in a row:",
        "",
        *table({"time": section["host"]}, _SMALL),
        "",
    ]
    lines += ["Wall time of one call from an idle device until its result is ready:", ""]
    return [*lines, *table({"time": section["wall"]}, _SMALL), ""]


def _first_call(section: Row) -> list[str]:
    return [
        f"A process's first call takes {section['cold_s']} s where nothing is compiled yet, and"
        f" {section['cached_s']} s with Triton's cache on disk from a process before. Each dtype, layout"
        " (blocks along the last axis or another), block size and set of outputs has a kernel of its own.",
        "",
    ]


def _experts(section: Row) -> list[str]:
    lines = ["### Stacked experts", "", f"Time on the device of the sweep alone, bfloat16 {shape(section)},"]
    lines += [f"{_compared(section)}. Their ratio is {ratio(section, 'stacked', 'one_matrix')}.", ""]
    return [*lines, *table({"time": section}, _EXPERTS), ""]


def _hard(section: Row) -> list[str]:
    rows = {
        text: [times(section[name]), ratio(section, name, "gaussian")]
        for name, text in _HARD.items()
        if name in section
    }
    lines = ["### Hard and easy weights", ""]
    lines += [f"Time on the device of the sweep alone, bfloat16, {_compared(section)} of each:", ""]
    return [*lines, *plain_table(["weight", "time, ms", "of the Gaussian's"], rows), ""]


def _sizes(sizes: list[Row], plot: str) -> list[str]:
    rows = {f"{row['elements']:,}": _size(row) for row in sizes}
    head = ["elements", "sweep alone, ms", "floor, ms", "sweep / floor", "`calibrate(weight)`, wall, ms"]
    lines = ["### Time against size", "", f"![Time against the number of elements]({plot})", ""]
    lines += [
        "bfloat16; the first and the last 4,096 blocks were compared (fewer where there are fewer):",
        "",
    ]
    return [*lines, *plain_table(head, rows), ""]


def _size(row: Row) -> list[str]:
    return [
        times(row["sweep"]),
        times(row["floor"]),
        ratio(row, "sweep", "floor"),
        times(row["calibrate_wall"]),
    ]


def _compared(section: Row) -> str:
    return f"{section['blocks_compared']:,} blocks compared"
