"""The JAX part of docs/benchmarks.md."""

from benchmarks.report_tables import Row, plain_table, provenance, ratio, shape, table

_CALLS = {
    "eager": "eager, global amax given, no check",
    "eager_own_amax": "eager, no check",
    "eager_checked": "`calibrate(array)`: eager, finite check, global amax, sweep",
    "jit_triton": '`jit`, `implementation="triton"`, global amax given',
    "jit_triton_own_amax": '`jit`, `implementation="triton"`',
    "jit_xla": '`jit`, `implementation="xla"`, global amax given',
    "jit_xla_own_amax": '`jit`, `implementation="xla"`',
    "torch": "the PyTorch adapter, global amax given, no check",
    "torch_own_amax": "the PyTorch adapter, no check",
    "torch_checked": "the PyTorch adapter, finite check, global amax, sweep",
}


def jax(entry: Row) -> str:
    place = "CUDA" if entry["benchmark"] == "jax_cuda" else "CPU"
    lines = [f"## JAX, {place}: {entry['device']}", "", provenance(entry), ""]
    lines += [
        f"`calibrate` of {entry['dtype']} {shape(entry)}; {entry['blocks_equal_to_oracle']:,} blocks equal to"
        f" the oracle's in each way. Time of one call of {entry['in_a_row']} in a row, the wait for the last"
        " included:",
        "",
        *table({"time": entry["times"]}, _CALLS),
        "",
    ]
    ratios = {
        "eager / PyTorch adapter, global amax given": ratio(entry["times"], "eager", "torch"),
        "jit, xla / eager": ratio(entry["times"], "jit_xla", "eager"),
    }
    lines += [*plain_table(["ratio", ""], {name: [cell] for name, cell in ratios.items() if cell}), ""]
    small = entry["small"]
    lines += [f"Time on the host of a small call, {shape(small)}, {small['in_a_row']} in a row, no wait:", ""]
    return "\n".join([*lines, *table({"time": small["times"]}, _CALLS), ""])
