"""What the commands of `nvfp4sweep` share: progress bars, refusals, and where to sweep."""

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from nvfp4sweep.checkpoint.reader import Checkpoint, TensorInfo


def progress_bars(quiet: bool = False) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[read]} of {task.fields[tensors]} tensors,"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


def add_bar(
    progress: Progress, name: str, checkpoint: Checkpoint, tensors: Sequence[TensorInfo]
) -> Callable[[TensorInfo], None]:
    """A bar for these tensors of a checkpoint; the function returned moves it by one tensor."""
    task = progress.add_task(
        name, total=sum(map(checkpoint.n_bytes, tensors)), tensors=f"{len(tensors):,}", read="0"
    )
    read = 0

    def advance(tensor: TensorInfo) -> None:
        nonlocal read
        read += 1
        progress.update(task, advance=checkpoint.n_bytes(tensor), read=f"{read:,}")

    return advance


def check_output(option: str, file: Path | None) -> None:
    if file is None:
        return
    if file.is_dir():
        raise typer.BadParameter(f"{file} is a folder", param_hint=option)
    if not file.parent.is_dir():
        raise typer.BadParameter(f"the folder {file.parent} does not exist", param_hint=option)


@contextmanager
def refusing(parameter: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn these exceptions into a message that names the parameter, with exit code 2."""
    try:
        yield
    except errors as error:
        raise typer.BadParameter(str(error), param_hint=parameter) from None


def require(module: str, option: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = error.name or module
        raise typer.BadParameter(f"{name} is needed and not installed", param_hint=option) from None


def resolve_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise typer.BadParameter(f"{device!r} is none of auto, cpu, cuda, cuda:N", param_hint="--device")
    if device == "cpu" or (device == "auto" and importlib.util.find_spec("torch") is None):
        return "cpu"
    cuda = require("torch", "--device").cuda
    count = cuda.device_count() if cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    if int(device.partition(":")[2] or 0) >= count:
        raise typer.BadParameter(f"{device}: PyTorch sees {count} CUDA devices", param_hint="--device")
    return device


def resolve_devices(device: str) -> list[str]:
    """All CUDA devices where none is named by its number."""
    resolved = resolve_device(device)
    if resolved != "cuda":
        return [resolved]
    return [f"cuda:{i}" for i in range(require("torch", "--device").cuda.device_count())]


def to_torch(array: npt.NDArray[Any], device: str, *, non_blocking: bool = False) -> Any:
    """A tensor on this device. PyTorch does not take ml_dtypes' bfloat16, but takes its bits.

    non_blocking: as Tensor.to has it; a pinned array stays as it is until the device has been waited for.
    """
    torch = importlib.import_module("torch")
    bits = array.view(np.int16) if array.dtype.name == "bfloat16" else array
    tensor = torch.from_numpy(bits).to(device, non_blocking=non_blocking)
    return tensor if bits is array else tensor.view(torch.bfloat16)
