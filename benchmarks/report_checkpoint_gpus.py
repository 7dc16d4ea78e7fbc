"""The part of docs/scaling.md on all GPUs at once, without the disk."""

from collections.abc import Sequence

from benchmarks.report_tables import Row, layout, plain_table, run

_SECTION = """### All GPUs at once, without the disk: {device}

The same weights in memory, divided by their bytes, {gb:.1f} GB; from when all GPUs begin to the last one's end. Of {run}.

{table}

Search and pack: from a GPU's memory to its memory, which is the compute part of a checkpoint: as a CUDA graph, so that
the GPUs alone are timed; and as calls, one a matrix, of which a process has launched its last after the time in
brackets. Copies: the weights to the GPUs, and nothing else. From host to host: both, and the results back, as
`quantize` does it with what it has read.

So {most} GPUs have {graph:.2f} times the compute of one, and the host feeds them {copies:.2f} times as fast: that bounds
what engines reach, {host:.2f} times. Calls on weights that are on GPUs are bound by the host, where the time in brackets is
nearly all: it takes longer to launch a small matrix than a GPU to search it, and the threads of one process wait for
each other's interpreter. Behind the copies that shows little.
"""  # noqa: E501


def section(layouts: Sequence[Row]) -> str:
    """Of the newest run of checkpoint_gpus for each number of processes and GPUs."""
    rows = sorted(layouts, key=lambda row: (row["devices"], row["processes"]))
    alone = rows[0]
    n_bytes = alone["weight_bytes"]
    most = max((row for row in rows if row["devices"] == row["processes"]), key=lambda row: row["devices"])

    def cell(row: Row, step: str, launched: bool = False) -> str:
        seconds = row[step]["seconds"]
        of_launches = f" ({1e3 * row[step]['launched_seconds']:.1f})" if launched else ""
        return f"{1e3 * seconds:.1f}{of_launches}, {n_bytes / seconds / 1e9:.0f}, {speedup(row, step):.2f}"

    def speedup(row: Row, step: str) -> float:
        return float(alone[step]["seconds"] / row[step]["seconds"])

    cells = {
        layout(row): [
            cell(row, "graph"),
            cell(row, "compute", launched=True),
            cell(row, "copies"),
            cell(row, "host_to_host"),
        ]
        for row in rows
    }
    steps = ("search and pack, a graph", "search and pack, calls", "copies", "from host to host")
    head = ["processes x GPUs each", *(f"{step}: ms, GB/s, speed-up" for step in steps)]
    return _SECTION.format(
        device=alone["device"],
        gb=n_bytes / 1e9,
        run=run(most),
        table="\n".join(plain_table(head, cells)),
        most=most["devices"],
        graph=speedup(most, "graph"),
        copies=speedup(most, "copies"),
        host=speedup(most, "host_to_host"),
    )
