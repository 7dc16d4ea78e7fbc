"""Weights over several ranks of torch.distributed: shards with a process group, and DTensors.

Ranks tell each other the largest |w| of each matrix and nothing else: one all-reduce over each group. No
block lies on two ranks, so that all other work is local and its results do not depend on the layout.

Up to that all-reduce no rank raises what the others do not raise with it: they would wait for it. What is
wrong with one rank's shard alone reaches the others as an infinite amax.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nvfp4sweep import objectives
from nvfp4sweep import problem as problems
from nvfp4sweep.problem import make_problem
from nvfp4sweep_torch import _device
from nvfp4sweep_torch._layout import is_dtensor, layout_of, local_part
from nvfp4sweep_torch._ops import Arrays, Options, run_calibrate, run_quantize, run_sweep
from nvfp4sweep_torch._tensors import as_weight, to_numpy

Function = Callable[[Arrays, Options], Any]

#: The shapes of what these return, as Problem has them.
_SHAPES: dict[Function, tuple[str, ...]] = {
    run_calibrate: ("block_shape",),
    run_sweep: ("block_shape", "block_shape", "block_shape", "batch_shape"),
    run_quantize: ("packed_shape", "block_shape", "batch_shape"),
}
_FLOAT32_MAX = torch.finfo(torch.float32).max


def compiles(weight: Any, process_group: Any) -> bool:
    """Whether torch.compile traces a call that an operator can serve."""
    return torch.compiler.is_compiling() and process_group is None and not is_dtensor(weight)


def run(function: Function, arrays: Arrays, options: Options, process_group: Any) -> Any:
    """A function of _ops on this rank's part of the weight, with the largest |w| of all ranks."""
    if process_group is None and not any(map(is_dtensor, arrays)):
        return function(arrays, options)
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(msg="process_group and DTensors are served outside of graphs")
        served = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]
        return served(function, arrays, options, process_group)
    return _run(function, arrays, options, process_group)


def _run(function: Function, arrays: Arrays, options: Options, process_group: Any) -> Any:
    groups = _groups(process_group, arrays)
    if is_dtensor(arrays.weight):
        return _run_on_mesh(function, arrays, options)
    for name, value in arrays._asdict().items():
        if is_dtensor(value):
            raise TypeError(f"{name} is a DTensor and weight is not: both must be, or neither")
    return _run_local(function, arrays, options, groups)


def global_amax(weights: Sequence[Any], batch_dims: int, process_group: Any) -> Tensor:
    """The largest |w| of all weights and ranks; a DTensor if the weights are."""
    groups = _groups(process_group, weights)
    on_mesh = [is_dtensor(weight) for weight in weights]
    if not any(on_mesh):
        return _SharedAmax([as_weight(weight) for weight in weights], batch_dims, groups).checked()
    if not all(on_mesh):
        raise TypeError("some weights are DTensors and others are not: all must be, or none")
    layouts = [layout_of(w, make_problem(w.shape, block_size=1, batch_dims=batch_dims)) for w in weights]
    problems.check_same_batch([layout.problem.batch_shape for layout in layouts], batch_dims)
    first = layouts[0]
    for layout in layouts:
        if (layout.mesh, layout.placed(layout.batch_axes)) != (first.mesh, first.placed(first.batch_axes)):
            raise ValueError(
                f"weights lie on different meshes, or their batch axes differently: {first.placements} on "
                f"{first.mesh}, and {layout.placements} on {layout.mesh}"
            )
    dims = sorted({dim for layout in layouts for dim in layout.reduced_dims})
    groups = [first.mesh.get_group(dim) for dim in dims]
    amax = _SharedAmax([as_weight(local_part(weight)) for weight in weights], batch_dims, groups)
    return first.whole(amax.checked(), first.problem.batch_shape, first.batch_axes)


def dequantize(quantized: Any, dtype: torch.dtype) -> Tensor:
    """QuantizedTensor.dequantize where its fields are DTensors."""
    packed, axis = quantized.packed, quantized.axis
    shape = [*packed.shape[:axis], 2 * packed.shape[axis], *packed.shape[axis + 1 :]]
    batch_dims = quantized.global_scale.ndim
    asked = make_problem(shape, axis=axis, block_size=quantized.block_size, batch_dims=batch_dims)
    layout = layout_of(packed, asked)
    local = dataclasses.replace(
        quantized,
        packed=local_part(packed),
        scale=layout.part("scale", quantized.scale, layout.axes),
        global_scale=layout.part("global_scale", quantized.global_scale, layout.batch_axes),
    )
    return layout.whole(local.dequantize(dtype), asked.shape, layout.axes)


# --- a group of ranks ---------------------------------------------------------------------------------


def _groups(process_group: Any, values: Sequence[Any]) -> list[Any]:
    if process_group is None:
        return []
    if any(map(is_dtensor, values)):
        raise ValueError("process_group is given with a DTensor, whose mesh says which ranks share it")
    if not dist.is_available():
        raise RuntimeError("process_group is given, and this PyTorch is built without torch.distributed")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group is a {type(process_group).__name__}: it must be a torch.distributed.ProcessGroup "
            f"that this rank belongs to"
        )
    return [process_group]


def _run_local(function: Function, arrays: Arrays, options: Options, groups: Sequence[Any]) -> Any:
    groups = [group for group in groups if dist.get_world_size(group) > 1]
    if arrays.global_amax is not None or not groups:
        return function(arrays, options)
    weight = as_weight(arrays.weight)
    refusal = None
    try:
        options.problem(weight, arrays.importance, arrays.hessian)
    except ValueError as error:
        refusal = error
    amax = _SharedAmax([weight], options.batch_dims, groups, options.check_finite, refusal)
    plain = arrays.importance is None and arrays.hessian is None
    if not (plain and weight.is_cuda):
        amax.checked()
    found = function(
        arrays._replace(weight=weight, global_amax=amax.value),
        # The weight is checked with its amax: what may be left is an importance or a hessian.
        options._replace(check_finite=options.check_finite and not plain),
    )
    amax.checked()  # while a device is at work on the sweep
    return found


class _SharedAmax:
    """The largest |w| over the weights of all ranks, float32 of the batch axes' shape.

    Args:
        check_finite: `checked` raises on all ranks where an element is not finite on one.
        refusal: what is wrong with this rank's weight: raised once the other ranks do not wait any more.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        batch_dims: int,
        groups: Sequence[Any],
        check_finite: bool = True,
        refusal: ValueError | None = None,
    ) -> None:
        worst = math.inf if check_finite else _FLOAT32_MAX
        amaxes = [_largest(weight, batch_dims) for weight in weights]
        problems.check_same_batch([tuple(amax.shape) for amax in amaxes], batch_dims)
        self.value = amaxes[0] if len(amaxes) == 1 else torch.stack(amaxes).amax(dim=0)
        self.value.nan_to_num_(nan=worst, posinf=worst)
        if refusal is not None:
            self.value.fill_(math.inf)
        for group in groups:
            dist.all_reduce(self.value, op=dist.ReduceOp.MAX, group=group)
        if refusal is not None:
            raise refusal
        self._weights = weights
        self._seen = self._event = None
        if check_finite:
            self._seen = self.value.to("cpu", non_blocking=True)
            if self.value.is_cuda:
                self._event = torch.cuda.current_stream(self.value.device).record_event()

    def checked(self) -> Tensor:
        """The value, after a wait for it but not for what was launched since."""
        if self._event is not None:
            self._event.synchronize()
        if self._seen is None or self._seen.isfinite().all():
            return self.value
        for weight in self._weights:
            for bad in weight.isfinite().logical_not().nonzero()[:1].tolist():
                raise problems.nonfinite_error("weight", bad, weight[tuple(bad)].item())
        raise ValueError(
            "another rank's weight has NaN or infinity, or is refused there: that rank's error says which"
        )


def _largest(weight: Tensor, batch_dims: int) -> Tensor:
    """float32 of the batch axes' shape; infinite or NaN where an element is."""
    asked = make_problem(weight.shape, block_size=1, batch_dims=batch_dims)
    if weight.is_cuda:
        return _device.run(weight, asked, ("global_amax",), check_finite=False)[0]
    from nvfp4sweep import cpu

    matrices = to_numpy(weight).reshape(asked.view_shape)
    amax = np.array([cpu.absolute_maximum(matrix) for matrix in matrices], np.float32)
    return torch.from_numpy(amax).reshape(asked.batch_shape)


# --- a mesh of ranks ----------------------------------------------------------------------------------


def _run_on_mesh(function: Function, arrays: Arrays, options: Options) -> Any:
    weight, amax, importance, hessian = arrays
    asked = options.problem(weight, importance, hessian)
    layout = layout_of(weight, asked)
    if amax is not None:
        amax = _array(amax)
        problems.check_global_amax_shape(tuple(amax.shape), asked)
        amax = layout.part("global_amax", amax, _broadcast(amax.shape, asked.batch_dims))
    if importance is not None:
        importance = _array(importance)
        objectives.check_importance_shape(tuple(importance.shape), asked)
        importance = layout.part("importance", importance, _broadcast(importance.shape, weight.ndim))
    if hessian is not None:
        hessian = _array(hessian)
        objectives.check_hessian_shape(tuple(hessian.shape), asked)
        batch_axes = layout.batch_axes if hessian.ndim > 3 else {}
        hessian = layout.part("hessian", hessian, {**batch_axes, asked.axis: hessian.ndim - 3})
    groups = [layout.mesh.get_group(dim) for dim in layout.reduced_dims]
    try:
        found = _run_local(function, Arrays(local_part(weight), amax, importance, hessian), options, groups)
    except ValueError as error:
        error.add_note(
            f"This rank's shard begins at {layout.begin()} of the weight: indices count from there."
        )
        raise
    shapes = _SHAPES[function]
    results = tuple(
        layout.whole(
            part, getattr(asked, shape), layout.batch_axes if shape == "batch_shape" else layout.axes
        )
        for part, shape in zip([found] if len(shapes) == 1 else found, shapes, strict=True)
    )
    return results[0] if len(shapes) == 1 else results


def _broadcast(shape: Sequence[int], ndim: int) -> dict[int, int]:
    """The axes that an array of this shape has of one with `ndim` axes that it broadcasts to."""
    return {ndim - len(shape) + axis: axis for axis, length in enumerate(shape) if length != 1}


def _array(value: Any) -> Any:
    return value if isinstance(value, Tensor) else np.asarray(value)
