"""Many weights in few launches: on CUDA those of one kind are swept together, a chunk at a time."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import nvfp4sweep_torch
from nvfp4sweep import formats
from nvfp4sweep import problem as problems
from nvfp4sweep_torch import _device
from nvfp4sweep_torch._findings import Findings
from nvfp4sweep_torch._layout import is_dtensor
from nvfp4sweep_torch._ops import Arrays, Call, Options
from nvfp4sweep_torch._tensors import as_weight

# Of a chunk: enough to do for its launches not to matter, and few enough for the device to begin early.
_MOST_BYTES = 2**29
_MOST_WEIGHTS = 512


def calibrate_many(
    weights: Iterable[Tensor],
    *,
    global_amax: Any = None,
    axis: int = -1,
    block_size: int = formats.BLOCK_SIZE,
    min_code: int = formats.MIN_CODE,
    check_finite: bool = True,
    implementation: str | None = None,
) -> list[Tensor]:
    """[calibrate(weight) for weight in weights], in few launches for those on CUDA devices.

    There weights of one shape, dtype and layout are swept together: as many as take 512 MiB, at most 512; a
    larger one is swept alone. They are read where they lie. Copied are only float64 weights, those whose axes
    before or after `axis` no view can merge, those that lie differently within 16 bytes, and all during the
    capture of a CUDA graph: one chunk of them at a time, two of float64. Beyond that and the results a call
    holds a few MiB. Results are views: those of weights swept together share their memory.

    Args:
        weights: tensors as calibrate takes them, of any shapes, dtypes and devices.
        global_amax: None for each weight's own, one number for all, or one for each weight, as calibrate
            takes them, in a sequence or an array of one dimension.
        check_finite: on CUDA this waits when everything is launched, and not for the last sweeps.

    The other arguments are those of calibrate.

    Returns:
        What calibrate returns for each weight, in their order.

    Raises:
        As calibrate, with the place of the weight ahead of the message, as "weights[7]: "; of the weights
        with NaN or infinity the first. ValueError if there are more or fewer global amaxes than weights.
    """
    options = Options(axis, block_size, 0, min_code, check_finite, implementation)
    return _run(nvfp4sweep_torch.calibrate, ("amax",), lambda amax: amax, weights, global_amax, options)


def quantize_many(
    weights: Iterable[Tensor],
    *,
    global_amax: Any = None,
    axis: int = -1,
    block_size: int = formats.BLOCK_SIZE,
    min_code: int = formats.MIN_CODE,
    check_finite: bool = True,
    implementation: str | None = None,
) -> list["nvfp4sweep_torch.QuantizedTensor"]:
    """[quantize(weight) for weight in weights], as calibrate_many does it; the same arguments and errors."""
    options = Options(axis, block_size, 0, min_code, check_finite, implementation)

    def finish(packed: Tensor, code: Tensor, global_scale: Tensor) -> nvfp4sweep_torch.QuantizedTensor:
        scale = code.view(torch.float8_e4m3fn)
        return nvfp4sweep_torch.QuantizedTensor(packed, scale, global_scale, axis % packed.ndim, block_size)

    outputs = ("packed", "code", "global_scale")
    return _run(nvfp4sweep_torch.quantize, outputs, finish, weights, global_amax, options)


class _Group(NamedTuple):
    """Weights of one kind, and the places of those that wait until they make up a chunk."""

    problem: problems.Problem  # of one of them
    size: int  # of a chunk; 0 where each is swept alone
    waiting: list[int]


def _run(
    alone: Callable[..., Any],
    outputs: tuple[str, ...],
    finish: Callable[..., Any],
    weights: Iterable[Any],
    global_amax: Any,
    options: Options,
) -> list[Any]:
    """What `alone` gives for each weight: from itself, or `finish` makes it of these outputs of a sweep."""
    weights = list(weights)
    amaxes = _one_each(global_amax, len(weights))
    if torch.compiler.is_compiling():  # into operators, which take one weight
        return [alone(w, global_amax=a, **options._asdict()) for w, a in zip(weights, amaxes, strict=True)]
    amaxes = _checked_numbers(amaxes)
    found: list[Any] = [None] * len(weights)
    groups: dict[Any, _Group] = {}
    with contextlib.ExitStack() as waits:
        launched: list[tuple[list[int], Findings]] = []

        def launch(group: _Group) -> None:
            chunk = group.waiting.copy()
            group.waiting.clear()
            parts = [as_weight(weights[i]) for i in chunk]
            left = None
            if options.check_finite:
                left = waits.enter_context(_device.findings(len(parts), parts[0].device))
                launched.append((chunk, left))
            results = _sweep(parts, [amaxes[i] for i in chunk], group.problem, outputs, left)
            for i, result in zip(chunk, results, strict=True):
                found[i] = finish(*result)

        for i, (weight, amax) in enumerate(zip(weights, amaxes, strict=True)):
            kind = _kind(weight, amax)
            group = groups.get(kind)
            if group is None:
                with _naming(i):
                    group = groups[kind] = _group(weight, amax, options, outputs)
            group.waiting.append(i)
            if len(group.waiting) == group.size:  # the device is at work while the host goes on
                launch(group)
        for group in groups.values():
            if group.size and group.waiting:
                launch(group)
        for chunk, left in launched:
            for i in np.array(chunk)[_device.bad_matrices(left)]:
                found[i] = None
    # Those that are swept alone, and those that are not as they must be: a call of their own says how.
    for i, result in enumerate(found):
        if result is None:
            with _naming(i):
                found[i] = alone(weights[i], global_amax=amaxes[i], **options._asdict())
    return found


def _one_each(global_amax: Any, n: int) -> list[Any]:
    several = isinstance(global_amax, Iterable) and getattr(global_amax, "ndim", 1) > 0
    amaxes = list(global_amax) if several else [global_amax] * n
    if len(amaxes) != n:
        raise ValueError(
            f"global_amax has {len(amaxes)} values for {n} weights: it must have one for each, or be a number"
        )
    return amaxes


def _checked_numbers(amaxes: list[Any]) -> list[Any]:
    """What is neither None nor a tensor as float32."""
    given = [amax is None or isinstance(amax, Tensor) for amax in amaxes]
    if all(given):
        return amaxes
    values = np.asarray([0.0 if skip else amax for amax, skip in zip(amaxes, given, strict=True)])
    one_each = problems.make_problem((len(amaxes), 1), block_size=1, batch_dims=1)
    numbers = problems.global_amax_per_matrix(values, one_each)
    return [amax if skip else number for amax, skip, number in zip(amaxes, given, numbers, strict=True)]


def _kind(weight: Any, amax: Any) -> Any:
    """Equal for weights that can be swept together. Quick: it is asked of each."""
    if not isinstance(weight, Tensor):
        return type(weight)
    given = (amax.dtype, amax.device, amax.shape) if isinstance(amax, Tensor) else None
    strides = weight.stride() if weight.layout is torch.strided else None
    return type(weight), strides, weight.dtype, weight.device, weight.shape, type(amax), given


def _group(weight: Any, amax: Any, options: Options, outputs: tuple[str, ...]) -> _Group:
    """For the first weight of its kind, or the exception that says what is wrong with all of them."""
    call = Call(Arrays(weight, amax), options)
    if "packed" in outputs:
        problems.check_packable(call.problem)
    if isinstance(amax, Tensor):
        problems.check_global_amax_shape(tuple(amax.shape), call.problem)
    if call.engine != "triton" or is_dtensor(weight) or is_dtensor(amax):
        return _Group(call.problem, 0, [])
    fits = _MOST_BYTES // max(call.weight.nbytes, 1)
    return _Group(call.problem, min(max(fits, 1), _MOST_WEIGHTS), [])


def _sweep(
    parts: list[Tensor],
    amaxes: list[Any],
    problem: problems.Problem,
    outputs: tuple[str, ...],
    left: Findings | None,
) -> Iterator[tuple[Tensor, ...]]:
    """The outputs of each part. Does not wait for the device."""
    if len(parts) == 1:
        weight: Tensor | list[Tensor] = parts[0][None]
    else:
        # The copy's memory is free for the next chunk's once this one is launched: both are of one stream.
        weight = parts if _device.fit_together(parts, problem) else torch.stack(parts)
    device = parts[0].device
    amax = None
    if isinstance(amaxes[0], Tensor):
        amax = torch.stack(amaxes)
    elif amaxes[0] is not None:
        # A CUDA graph would keep the address of these numbers: a copy that waits is refused there.
        waits = _device.is_capturing(parts[0])
        amax = torch.from_numpy(np.array(amaxes, np.float32)).to(device, non_blocking=not waits)
    shape = (len(parts), *problem.shape)
    batch = dataclasses.replace(problem, shape=shape, axis=problem.axis + 1, batch_dims=1)
    found = _device.run(weight, batch, outputs, amax, check_finite=False, left=left)
    return zip(*(output.unbind() for output in found), strict=True)


@contextlib.contextmanager
def _naming(i: int) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"weights[{i}]: {error}") from error
