"""The commands that make and check NVFP4 checkpoints."""

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from nvfp4sweep.checkpoint import quantizer
from nvfp4sweep.checkpoint.converter import convert_checkpoint
from nvfp4sweep.checkpoint.engines import Engine, Packed, numpy_engine
from nvfp4sweep.checkpoint.folders import read_config
from nvfp4sweep.checkpoint.layouts import LAYOUTS, MODELOPT
from nvfp4sweep.checkpoint.passes import STAGES
from nvfp4sweep.checkpoint.quality import PAGE_NAME
from nvfp4sweep.checkpoint.reader import Checkpoint, Empty
from nvfp4sweep.checkpoint.report import saving
from nvfp4sweep.checkpoint.rescaler import rescale_groups as rescale
from nvfp4sweep.checkpoint.settings import Settings, check_patterns
from nvfp4sweep.checkpoint.verifier import Errors, Verifier
from nvfp4sweep.cli_common import add_bar, progress_bars, refusing, require, resolve_devices, to_torch
from nvfp4sweep.cli_ranks import device_of_rank, ranks_of_environment
from nvfp4sweep.formats import MIN_CODE
from nvfp4sweep.problem import check_min_code

_MOST_PINNED = 2**30  # bytes of a tensor


def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN_DIR", help="A Hugging Face folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="A folder that is not there yet.")],
    layout: Annotated[str, typer.Option(metavar="|".join(LAYOUTS), help="Whose names.")] = MODELOPT.name,
    input_scale: Annotated[
        float | None, typer.Option(help="Write this scale of activations too: W4A4 instead of W4A16.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Quantize though the rules leave it out by name."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="REGEX", help="Leave as it is.")] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="One global scale for all with the same text in its parentheses."),
    ] = None,
    importance: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Importances of inputs: safetensors by tensor name, GGUF imatrix."),
    ] = None,
    min_code: Annotated[int, typer.Option(help="Lowest code of a block scale: 8 for Marlin.")] = MIN_CODE,
    scale_max: Annotated[float, typer.Option(help="Largest block scale: 256 leaves headroom.")] = 448,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse a K that 16 does not divide.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave weights with NaN or infinity as they are.")
    ] = False,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to sweep. auto: CUDA if PyTorch has it.")
    ] = "auto",
) -> None:
    """Write an NVFP4 checkpoint of a model, with exact block scales, without loading the model.

    An interrupted call leaves OUT_DIR.partial; the same call goes on from there.
    """
    _check_layout(layout)
    _check_min_code(min_code)
    ranks = ranks_of_environment()
    devices = device_of_rank(resolve_devices(device), ranks)
    engines = [numpy_engine if name == "cpu" else torch_engine(name) for name in devices]
    with refusing("IN_DIR OUT_DIR", ValueError, OSError), progress_bars(quiet=ranks.rank > 0) as progress:
        settings = Settings(
            LAYOUTS[layout], input_scale, tuple(include or ()), tuple(exclude or ()), tuple(group or ()),
            min_code, scale_max, strict, skip_bad,
        )  # fmt: skip
        empty = empty_for(devices[0])
        job = quantizer.Job(source, target, settings, importance, engines, devices != ["cpu"], empty, ranks)
        selection = job.selection
        bars = {
            stage: add_bar(progress, stage, selection.checkpoint, selection.plan.tensors) for stage in STAGES
        }
        written = job.run(lambda stage, tensor: bars[stage](tensor))
    if ranks.rank == 0:
        _print_written(written, target)


def _print_written(written: quantizer.Written, target: Path) -> None:
    typer.echo(
        f"{len(written.modules):,} matrices in NVFP4, {sum(map(len, written.skipped.values())):,} tensors as "
        f"they were, {written.n_bytes / 1e9:,.3f} GB: {target}"
    )
    for reason, names in written.skipped.items():
        typer.echo(f"  {reason}: {len(names):,}, {names[0]}" + (", ..." if names[1:] else ""))
    for warning in written.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"What the scales are worth: {target / PAGE_NAME}")


def torch_engine(device: str) -> Engine:
    """Searches on this device of PyTorch's."""
    torch, package = require("torch", "--device"), require("nvfp4sweep_torch", "--device")
    torch.empty(1, device=device)  # else pinned memory would take a context on the first GPU

    def run(
        matrix: npt.NDArray[Any],
        amax: np.float32,
        importance: npt.NDArray[Any] | None,
        min_code: int,
    ) -> Packed:
        # Copies and kernels follow each other on the device, and the host waits at the end: that the matrix
        # is finite is known from its amax.
        found = package.quantize(
            to_torch(matrix, device, non_blocking=True),
            global_amax=torch.full((), float(amax), device=device),
            importance=None if importance is None else to_torch(importance, device, non_blocking=True),
            min_code=min_code,
            check_finite=importance is not None,
        )
        packed = Packed(
            to_host(found.packed), to_host(found.scale.view(torch.uint8)), to_host(found.global_scale)
        )
        if found.packed.is_cuda:
            torch.cuda.current_stream(device).synchronize()
        return packed

    def to_host(tensor: Any) -> npt.NDArray[Any]:
        # New memory would be mapped page by page as it is written to: PyTorch keeps pinned memory for reuse.
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return host.copy_(tensor, non_blocking=True).numpy()  # type: ignore[no-any-return]

    return run


def empty_for(device: str) -> Empty:
    """Gives the memory that weights are best read to, for an engine on this device."""
    return np.empty if device == "cpu" else _pinned_empty


def _pinned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """As numpy.empty; GPUs copy from it by themselves, and PyTorch keeps it for reuse."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes > _MOST_PINNED:  # PyTorch would round it up to a power of 2
        return np.empty(shape, dtype)
    torch = require("torch", "--device")
    memory: npt.NDArray[Any] = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True).numpy()
    return memory.view(dtype).reshape(shape)


def convert(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="An NVFP4 checkpoint, whoever wrote it.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is not there yet.")],
    layout: Annotated[str, typer.Option(metavar="|".join(LAYOUTS), help="Whose names it is to have.")],
) -> None:
    """Write an NVFP4 checkpoint in the other layout, without touching codes and block scales."""
    _check_layout(layout)
    with refusing("DIR OUT", ValueError, OSError), progress_bars() as progress:
        checkpoint = Checkpoint(source)
        advance = add_bar(progress, "convert", checkpoint, checkpoint.tensors)
        done = convert_checkpoint(source, target, LAYOUTS[layout], advance=advance)
    activations = "W4A4" if done.with_input else "W4A16"
    typer.echo(
        f"{len(done.modules):,} modules ({activations}) from {done.before.name} to {layout}, "
        f"{len(done.ignored):,} layers ignored: {target}"
    )


def rescale_groups(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="An NVFP4 checkpoint, whoever wrote it.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that is not there yet.")],
    group: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Weights with the same text in its parentheses are a group too."),
    ] = None,
    min_code: Annotated[int, typer.Option(help="Lowest code of a block scale: 8 for Marlin.")] = MIN_CODE,
) -> None:
    """Give layers that runtimes fuse one global scale, where an NVFP4 checkpoint has several.

    Only block scales move. Quantize the original weights again where they are at hand: that costs less.
    """
    _check_min_code(min_code)
    groups = group or []
    with refusing("--group", ValueError):
        check_patterns("groups", groups)
    with refusing("DIR OUT", ValueError, OSError), progress_bars() as progress:
        checkpoint = Checkpoint(source)
        advance = add_bar(progress, "rescale", checkpoint, checkpoint.tensors)
        done = rescale(source, target, groups=groups, min_code=min_code, advance=advance)
    if not done:
        typer.echo("no group differs: nothing is written")
        return
    for member in done:
        typer.echo(
            f"{member.module}: {member.ratio:.4g} of the common scale, {member.exact:,} of {member.blocks:,} "
            f"block scales exact, squared error {member.error:.3g} of the squared values"
        )
    typer.echo(f"{len(done):,} modules share their scale now: {target}")
    typer.echo("With the original weights at hand, `nvfp4sweep quantize` on them costs less.")


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise typer.BadParameter(f"{layout!r} is none of {', '.join(LAYOUTS)}", param_hint="--layout")


def _check_min_code(min_code: int) -> None:
    with refusing("--min-code", ValueError):
        check_min_code(min_code)


def verify(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="An NVFP4 checkpoint, whoever wrote it.")],
    against: Annotated[
        Path | None, typer.Option(metavar="IN_DIR", help="The model it was made of: compare the errors.")
    ] = None,
) -> None:
    """Check tensors, scales, groups, index and configuration; exit code 1 if anything is wrong."""
    rows: list[Errors] = []
    with refusing("DIR", ValueError, OSError):
        verifier = Verifier(path)
        problems = list(verifier.problems())
    if against is not None:
        with refusing("--against", ValueError, OSError):
            rows = list(verifier.errors(against, read_config(against)))
            if not rows:
                raise ValueError(f"{against} has no weight of {path}'s")
        _print_errors(rows)
    for problem in problems:
        typer.echo(str(problem))
    if problems:
        typer.echo(f"{len(problems):,} problems in {len(verifier.modules):,} quantized modules")
        raise typer.Exit(1)
    typer.echo(f"{len(verifier.modules):,} quantized modules, nothing wrong")


def _print_errors(rows: list[Errors]) -> None:
    console = Console(highlight=False)
    table = Table(
        box=box.SIMPLE_HEAD,
        caption="Squared errors: as stored; and under the stored global scale with block scales from the "
        "blocks' maxima (absmax), and the best (exact). More: stored against exact.",
        caption_justify="left",
    )
    table.add_column("module", overflow="fold")
    for name in ("stored", "absmax", "exact", "more"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        more = round(-saving(row.stored, row.scales.exact), 2) + 0.0  # no -0
        numbers = (row.stored, row.scales.absmax, row.scales.exact)
        table.add_row(row.module, *(f"{number:#.5g}".rstrip(".") for number in numbers), f"{more:.2f} %")
    if not console.is_terminal:  # A file or a pipe has no width.
        needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
        table.width = needed
        console.width = max(console.width, needed)
    console.print(table)
