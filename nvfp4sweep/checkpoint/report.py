"""What exact scales save on each linear weight of a checkpoint: rows, a table and a CSV file."""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich import box
from rich.table import Table

from nvfp4sweep.api import global_amax
from nvfp4sweep.checkpoint.baselines import ScaleErrors, scale_errors, total
from nvfp4sweep.checkpoint.plan import fusion_groups
from nvfp4sweep.checkpoint.reader import Checkpoint, TensorInfo
from nvfp4sweep.checkpoint.writer import replacing

CAPTION = (
    "Squared errors, summed over the tensor, where every block takes its scale from its maximum (absmax), "
    "the better of two scales (4/6, with its own global scale G / (6 * 256), as published), or the best "
    "of all 126 (exact). Saved: exact against absmax."
)
CSV_COLUMNS = (
    "tensor",
    "shape",
    "blocks",
    "squared_error_absmax",
    "squared_error_four_over_six",
    "squared_error_exact",
    "saved_percent",
    "milliseconds",
)


class Swept(NamedTuple):
    """A framework's answer, on the host.

    Attributes:
        code: uint8, the shape of the weight's blocks.
        global_amax: float32, [] or, for stacked experts, [E].
        seconds: time of the call, without copies to and from a device.
    """

    code: npt.NDArray[np.uint8]
    global_amax: npt.NDArray[np.float32]
    seconds: float


#: weight, shared global amax or None, batch_dims -> Swept
Engine = Callable[[npt.NDArray[Any], npt.NDArray[np.float32] | None, int], Swept]


@dataclass(frozen=True)
class Row:
    """One tensor of a report, or the sum of several.

    Attributes:
        shape: None for a sum.
        errors: the squared errors, and the histogram of chosen codes.
        seconds: time of the search.
    """

    name: str
    shape: tuple[int, ...] | None
    blocks: int
    errors: ScaleErrors
    seconds: float

    @property
    def saving(self) -> float:
        """The part of absmax's error that exact scales remove, in percent."""
        return saving(self.errors.exact, self.errors.absmax)


def saving(error: float, reference: float) -> float:
    """How much smaller `error` is than `reference`, in percent; 0 where both are 0."""
    return 100 * (1 - error / reference) if reference else 0.0


def sum_rows(name: str, rows: Sequence[Row]) -> Row:
    errors = total([row.errors for row in rows])
    return Row(name, None, sum(row.blocks for row in rows), errors, sum(row.seconds for row in rows))


def batch_dims(tensor: TensorInfo) -> int:
    """1 for stacked experts [E, N, K], which have a global amax each."""
    return len(tensor.shape) - 2


def fused_tensors(tensors: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
    """The groups of `fusion_groups`, without those that stack different numbers of matrices."""
    by_name = {tensor.name: tensor for tensor in tensors}
    groups = [[by_name[name] for name in group] for group in fusion_groups(by_name)]
    return [group for group in groups if len({tensor.shape[:-2] for tensor in group}) == 1]


def shared_amaxes(
    checkpoint: Checkpoint, groups: Sequence[Sequence[TensorInfo]], advance: Callable[[TensorInfo], None]
) -> dict[str, npt.NDArray[np.float32]]:
    """The global amax that each group of `fused_tensors` shares, by tensor name, reading one at a time.

    Fused stacks of experts share one amax an expert.

    Args:
        advance: called with every tensor read.

    Raises:
        CheckpointError, ValueError: a tensor that cannot be read, or holds NaN or infinity.
    """
    shared: dict[str, npt.NDArray[np.float32]] = {}
    for group in groups:
        amaxes = []
        for tensor in group:
            weight = checkpoint.read(tensor)
            with naming(tensor):
                amaxes.append(global_amax(weight, batch_dims=batch_dims(tensor)))
            del weight  # before the next is read
            advance(tensor)
        amax = np.asarray(np.max(amaxes, axis=0))
        shared.update((tensor.name, amax) for tensor in group)
    return shared


def measure(
    tensor: TensorInfo, weight: npt.NDArray[Any], amax: npt.NDArray[np.float32] | None, engine: Engine
) -> tuple[Row, Swept]:
    """Calibrate one weight and compare its scales with the usual ones.

    Args:
        weight: as Checkpoint.read returns it.
        amax: the global amax that it shares, or None for its own.

    Raises:
        ValueError: NaN or infinity in the weight; the message begins with the tensor's name.
    """
    with naming(tensor):
        swept = engine(weight, amax, batch_dims(tensor))
    errors = scale_errors(weight, swept.code, swept.global_amax)
    return Row(tensor.name, tensor.shape, swept.code.size, errors, swept.seconds), swept


@contextmanager
def naming(tensor: TensorInfo) -> Iterator[None]:
    """Put the tensor's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{tensor.name}: {error}") from None


def make_table(rows: Sequence[Row], summed: Row, narrow: bool = False) -> Table:
    """A table for a terminal; its names omit a final ".weight". `narrow` leaves out shapes and times."""
    table = Table(
        box=box.SIMPLE_HEAD,
        caption=CAPTION if narrow else f"{CAPTION} ms: time of the sweep.",
        caption_justify="left",
        show_footer=True,
        pad_edge=False,
        collapse_padding=True,
    )
    columns = ("shape", "blocks", "absmax", "4/6", "exact", "saved", "ms")
    part = slice(1, -1) if narrow else slice(None)
    table.add_column("tensor", f"total of {len(rows):,}", overflow="fold")
    for column, footer in zip(columns[part], _cells(summed)[part], strict=True):
        style = "bold green" if column == "saved" else None
        table.add_column(column, footer, justify="right", no_wrap=True, style=style)
    for row in rows:
        table.add_row(row.name.removesuffix(".weight"), *_cells(row)[part])
    return table


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a tensor, all digits; the sum is left to the reader's tool.

    Raises:
        OSError: the file cannot be written; then none is left behind.
    """
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for row in rows:
            errors = (row.errors.absmax, row.errors.four_over_six, row.errors.exact)
            writer.writerow((row.name, _shape(row), row.blocks, *errors, row.saving, row.seconds * 1e3))


def _shape(row: Row) -> str:
    return "x".join(map(str, row.shape)) if row.shape else ""


def _cells(row: Row) -> tuple[str, ...]:
    errors = (row.errors.absmax, row.errors.four_over_six, row.errors.exact)
    return (
        _shape(row),
        f"{row.blocks:,}",
        *(f"{error:#.5g}".rstrip(".") for error in errors),
        f"{row.saving:.1f} %",
        f"{row.seconds * 1e3:,.1f}",
    )
