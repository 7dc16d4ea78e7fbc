"""The command `nvfp4sweep`. It is above the adapters: frameworks are imported where an option asks."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt

import nvfp4sweep

try:
    import typer
    from rich.console import Console

    from nvfp4sweep.checkpoint import report as reports
    from nvfp4sweep.checkpoint.plan import Plan, make_plan
    from nvfp4sweep.checkpoint.reader import Checkpoint, CheckpointError, TensorInfo
    from nvfp4sweep.checkpoint.report import Engine, Row, Swept
    from nvfp4sweep.cli_checkpoint import convert, quantize, rescale_groups, verify
    from nvfp4sweep.cli_common import (
        add_bar,
        check_output,
        progress_bars,
        refusing,
        require,
        resolve_device,
        to_torch,
    )
except ImportError as missing:
    raise SystemExit(
        f"nvfp4sweep: {missing.name} is not installed: pip install 'nvfp4sweep[checkpoint]'"
    ) from None

app = typer.Typer(
    help=(nvfp4sweep.__doc__ or "").partition("\n")[0], no_args_is_help=True, add_completion=False
)


app.command()(quantize)
app.command()(verify)
app.command()(convert)
app.command()(rescale_groups)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"nvfp4sweep {nvfp4sweep.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A .safetensors file or a Hugging Face folder.")],
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one line a tensor, all digits.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Save a picture: savings, and chosen codes.")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to sweep. auto: CUDA if PyTorch has it.")
    ] = "auto",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also sweep with PyTorch and JAX; exit code 1 if codes differ.")
    ] = False,
    fuse: Annotated[
        bool, typer.Option(help="q/k/v and gate/up of a layer share their global amax, as at inference.")
    ] = True,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Name the tensors that were skipped.")
    ] = False,
) -> None:
    """What exact block scales save on every linear weight of a checkpoint.

    Nothing is written but the files asked for. One tensor is in memory at a time.
    """
    # Everything that can be refused is refused before the work begins.
    check_output("--csv", csv)
    check_output("--plot", plot)
    if plot is not None and plot.suffix.lower() != ".png":
        raise typer.BadParameter(f"{plot} does not end in .png", param_hint="--plot")
    write_plot = None if plot is None else require("nvfp4sweep.checkpoint.plot", "--plot").write_plot
    device = resolve_device(device)
    engine = _numpy_engine() if device == "cpu" else _torch_engine(device, "--device")
    with refusing("PATH", CheckpointError):
        checkpoint = Checkpoint(path)
        plan = make_plan(checkpoint.tensors)
        if not plan.tensors:
            raise CheckpointError(f"{path} has no linear weight. {_skipped(plan)}")
    agreement = _Agreement(device) if compare else None

    rows: list[Row] = []
    with progress_bars() as progress, refusing("PATH", ValueError):
        shared = {}
        if fuse:
            groups = reports.fused_tensors(plan.tensors)
            advance = add_bar(progress, "amax", checkpoint, [tensor for group in groups for tensor in group])
            shared = reports.shared_amaxes(checkpoint, groups, advance)
        advance = add_bar(progress, "sweep", checkpoint, plan.tensors)
        for tensor in plan.tensors:
            weight = checkpoint.read(tensor)
            row, swept = reports.measure(tensor, weight, shared.get(tensor.name), engine)
            rows.append(row)
            if agreement is not None:
                agreement.check(tensor, weight, swept)
            advance(tensor)
            del weight  # before the next is read

    total = reports.sum_rows("total", rows)
    _print_report(plan, rows, total, len(shared), device, verbose)
    if csv is not None:
        with refusing("--csv", OSError):
            reports.write_csv(csv, rows)
    if plot is not None and write_plot is not None:
        with refusing("--plot", OSError):
            write_plot(plot, rows, total)
    if agreement is not None:
        typer.echo(agreement.sentence())
        if agreement.first_difference is not None:
            raise typer.Exit(1)


def _print_report(
    plan: Plan, rows: Sequence[Row], total: Row, shared: int, device: str, verbose: bool
) -> None:
    console = Console(highlight=False)
    table = reports.make_table(rows, total)
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    if console.is_terminal:
        table = reports.make_table(rows, total, narrow=needed > console.width)
    else:  # A file or a pipe has no width.
        table.width = needed
        console.width = max(console.width, needed)
    console.print(table)
    errors = total.errors
    lines = [
        _skipped(plan) if plan.skipped else "",
        f"{shared} tensors share their global amax with those they are fused with." if shared else "",
        f"Squared error: {errors.absmax:.6g} at absmax, {errors.four_over_six:.6g} at 4/6, "
        f"{errors.exact:.6g} exact: {total.saving:.2f} % less than absmax, "
        f"{reports.saving(errors.exact, errors.four_over_six):.2f} % less than 4/6.",
        f"{total.blocks:,} blocks in {total.seconds:.3f} s on {device}: "
        f"{total.blocks / total.seconds:,.0f} blocks/s.",
    ]
    if verbose:
        lines[1:1] = [f"  {name}: {reason}" for reason, names in plan.skipped.items() for name in names]
    for line in filter(None, lines):
        console.print(line, soft_wrap=True, markup=False)


def _skipped(plan: Plan) -> str:
    count = sum(map(len, plan.skipped.values()))
    reasons = ", ".join(f"{reason} ({len(names):,})" for reason, names in plan.skipped.items())
    return f"Skipped {count:,} of {count + len(plan.tensors):,} tensors: {reasons or 'there are none'}."


def _numpy_engine() -> Engine:
    def run(weight: npt.NDArray[Any], amax: npt.NDArray[np.float32] | None, batch_dims: int) -> Swept:
        start = time.perf_counter()
        result = nvfp4sweep.sweep(weight, global_amax=amax, batch_dims=batch_dims)
        return Swept(result.code, result.global_amax, time.perf_counter() - start)

    return _warmed(run)


def _torch_engine(device: str, option: str) -> Engine:
    torch, package = require("torch", option), require("nvfp4sweep_torch", option)

    def synchronize() -> None:
        if device != "cpu":
            torch.cuda.synchronize(device)

    def run(weight: npt.NDArray[Any], amax: npt.NDArray[np.float32] | None, batch_dims: int) -> Swept:
        tensor = to_torch(weight, device)
        shared = None if amax is None else torch.from_numpy(amax).to(device)
        synchronize()
        start = time.perf_counter()
        result = package.sweep(tensor, global_amax=shared, batch_dims=batch_dims)
        synchronize()
        seconds = time.perf_counter() - start
        return Swept(result.code.cpu().numpy(), result.global_amax.cpu().numpy(), seconds)

    return _warmed(run)


def _jax_engine(jitted: bool, option: str) -> Engine:
    jax, package = require("jax", option), require("nvfp4sweep_jax", option)
    implementation = "xla" if jitted else None

    def sweep(weight: Any, amax: Any, batch_dims: int) -> Any:
        return package.sweep(weight, global_amax=amax, batch_dims=batch_dims, implementation=implementation)

    call = jax.jit(sweep, static_argnums=2) if jitted else sweep

    def run(weight: npt.NDArray[Any], amax: npt.NDArray[np.float32] | None, batch_dims: int) -> Swept:
        array = jax.numpy.asarray(weight)
        shared = None if amax is None else jax.numpy.asarray(amax)
        start = time.perf_counter()
        result = jax.block_until_ready(call(array, shared, batch_dims))
        seconds = time.perf_counter() - start
        return Swept(np.asarray(result.code), np.asarray(result.global_amax), seconds)

    return run


def _warmed(engine: Engine) -> Engine:
    """Run a small weight of each new dtype first: compiling is not part of a tensor's time."""
    seen: set[Any] = set()

    def run(weight: npt.NDArray[Any], amax: npt.NDArray[np.float32] | None, batch_dims: int) -> Swept:
        if weight.dtype not in seen:
            seen.add(weight.dtype)
            engine(np.zeros((256, 256), weight.dtype), None, 0)
        return engine(weight, amax, batch_dims)

    return run


class _Agreement:
    """On how many blocks all frameworks choose NumPy's code."""

    def __init__(self, device: str) -> None:
        self.blocks = 0
        self.agreed = 0
        self.first_difference: str | None = None
        self._numpy = None if device == "cpu" else _numpy_engine()
        self._engines = {
            "PyTorch": _torch_engine(device, "--compare"),
            "JAX (eager)": _jax_engine(False, "--compare"),
            "JAX (jit)": _jax_engine(True, "--compare"),
        }

    def check(self, tensor: TensorInfo, weight: npt.NDArray[Any], swept: Swept) -> None:
        """Sweep with every framework under the global amax of `swept`."""
        arguments = (weight, swept.global_amax, reports.batch_dims(tensor))
        expected = swept.code if self._numpy is None else self._numpy(*arguments).code
        agree = np.ones(expected.shape, bool)
        for name, engine in self._engines.items():
            code = engine(*arguments).code
            same = code == expected
            if self.first_difference is None and not same.all():
                index = tuple(int(i) for i in np.argwhere(~same)[0])
                self.first_difference = (
                    f"{tensor.name}, block {index}: code {expected[index]} by NumPy, {code[index]} by {name}"
                )
            agree &= same
        self.blocks += agree.size
        self.agreed += int(np.count_nonzero(agree))

    def sentence(self) -> str:
        *others, last = self._engines
        sentence = f"NumPy, {', '.join(others)} and {last} agree on {self.agreed:,} of {self.blocks:,} blocks"
        return sentence if self.first_difference is None else f"{sentence}; first: {self.first_difference}"
