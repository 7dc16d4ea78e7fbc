"""The parts of docs/benchmarks.md on many weights, several GPUs and whole checkpoints."""

from benchmarks.report_tables import Row, by_gpus, layout, plain_table, run, shape, times

_RANKS = {
    "calibrate": "`calibrate(local, process_group=...)`",
    "calibrate_unchecked": "the same without check",
    "sweep": "the sweep alone: global amax given, no check",
    "global_amax": "`global_amax(local, process_group=...)`",
    "all_reduce": "an all-reduce of one float",
}
_MANY = {
    "many": "`calibrate_many` of separate weights",
    "many_parts_of_one": "`calibrate_many` of the parts of one tensor",
    "stacked": "`calibrate` of one stacked tensor",
    "loop": "`calibrate` of one weight after another",
}
#: What each part is, and the bytes that it is about.
_PARTS = {
    "read": ("the weights read", "weight_bytes"),
    "read_cached": ("the same from the page cache", "weight_bytes"),
    "amax": ("their global amaxes, on the CPU", "weight_bytes"),
    "quantize": ("to the engine, search, pack, and back", "weight_bytes"),
    "report": ("the report's errors, on the CPU", "weight_bytes"),
    "write": ("the result written to the page cache", "output_bytes"),
    "sync": ("fsync of the result", "output_bytes"),
    "copy": ("the input's files copied", "input_bytes"),
}


def ranks(by_number: dict[int, Row]) -> str:
    """Of the newest run for each number of ranks."""
    numbers = sorted(by_number)
    first = by_number[numbers[0]]["wall"]
    cells = {
        text: [
            f"{times(by_number[n]['wall'][name])}, "
            f"{first[name]['p50_ms'] / by_number[n]['wall'][name]['p50_ms']:.2f}"
            for n in numbers
        ]
        for name, text in _RANKS.items()
    }
    newest = by_number[numbers[-1]]
    same = len({entry["checksum"] for entry in by_number.values()}) == 1
    head = ["call to result, on the slowest rank", *by_gpus(numbers, "ms, speed-up")]
    return "\n".join(
        [
            f"## Ranks: {newest['device']}", "",
            f"One weight {shape(newest)}, {newest['dtype']}, sharded by rows; NCCL. Of {run(newest)}.", "",
            *plain_table(head, cells), "",
            f"The codes have {'one checksum' if same else 'different checksums'}, whatever the number; of"
            f" {newest['blocks_compared']:,} blocks they were compared with the oracle's before.", "",
        ]
    )  # fmt: skip


def many(entry: Row) -> str:
    base = entry["stacked"]["elements_per_second"]
    cells = {
        text: [
            f"{entry[name]['tensors']:,}",
            times(entry[name]),
            f"{entry[name]['elements_per_second'] / 1e9:.1f}",
            f"{100 * entry[name]['elements_per_second'] / base:.0f} %",
        ]
        for name, text in _MANY.items()
    }
    head = ["", "weights", "ms", "10^9 elements a second", "of the stacked tensor's"]
    return "\n".join(
        [
            f"## Many weights: {entry['device']}", "",
            f"Weights {shape(entry)}, {entry['dtype']}, each with its own amax and check."
            f" Of {run(entry)}.", "",
            *plain_table(head, cells), "",
            f"Compared before: {entry['blocks_equal_to_cpu']:,} blocks with the CPU engine's,"
            f" {entry['blocks_equal_to_stacked']:,} with those of the stacked tensor.", "",
        ]
    )  # fmt: skip


def checkpoint(entry: Row) -> str:
    first = entry["runs"][0]["engine_seconds"]
    runs = {
        layout(row): [
            f"{row['seconds']:.1f}",
            f"{entry['input_bytes'] / row['seconds'] / 1e9:.2f}",
            f"{row['engine_seconds']:.2f}",
            f"{first / row['engine_seconds']:.2f}",
            *(f"{row[f'{stage}_seconds']:.1f}" for stage in ("read", "report", "write")),
        ]
        for row in entry["runs"]
    }
    parts = {
        text: [
            f"{entry['parts_seconds'][name]:.2f}",
            f"{entry[size] / entry['parts_seconds'][name] / 1e9:.2f}",
        ]
        for name, (text, size) in _PARTS.items()
    }
    head = [
        "processes x devices of each", "seconds", "GB of input a second", "engine, s", "its speed-up",
        "reading, s", "report, s", "writing, s",
    ]  # fmt: skip
    lines = [
        f"## Checkpoints: {entry['device']}",
        "",
        f"A Llama of {entry['layers']} layers as large as Llama 3.1 8B's: {entry['input_bytes'] / 1e9:.1f} GB"
        f" in, of which {entry['weight_bytes'] / 1e9:.1f} GB are quantized; {entry['output_bytes'] / 1e9:.1f}"
        f" GB out. Files were dropped from the page cache before each run. Of {run(entry)}.",
        "",
        *plain_table(head, runs),
        "",
        "Engine: to the device, search, pack, and back, on the device that was longest at it; speed-up over"
        " the first run. The other columns: how long the process that was longest at it read weights (twice),"
        " added up the report's errors, and wrote; these go on at the same time.",
        "",
        f"The results have the same bytes. {entry['blocks_compared']:,} blocks of the first were compared"
        " with the oracle's. The parts by themselves, one after another:",
        "",
        *plain_table(["", "seconds", "GB a second"], parts),
        "",
    ]
    if "peak_bytes" in entry:
        largest, peak, least = (
            entry[name] / 1e6
            for name in ("largest_tensor_bytes", "peak_bytes", "peak_bytes_of_next_to_nothing")
        )
        lines += [
            f"Peak memory with stacks of experts of {largest:,.0f} MB each: {peak:,.0f} MB,"
            f" {peak / largest:.2f} times that, of which {least:,.0f} MB are there with next to no weights.",
            "",
        ]
    return "\n".join(lines)
