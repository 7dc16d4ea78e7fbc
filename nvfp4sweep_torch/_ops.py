"""The three sweeps as functions of tensors, and as operators that torch.compile can trace through."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import nvfp4sweep
from nvfp4sweep.problem import Problem, check_packable, global_amax_per_matrix, make_problem
from nvfp4sweep_torch import _device
from nvfp4sweep_torch._tensors import (
    as_weight,
    check_same_device,
    choose_engine,
    to_numpy,
    to_numpy_if_tensor,
)

_N_ARRAYS = 4


class Arrays(NamedTuple):
    """The arguments of a call that are arrays, as a caller gives them."""

    weight: Any
    global_amax: Any = None
    importance: Any = None
    hessian: Any = None

    def as_tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What an operator takes: it knows tensors only, and without their autograd history."""
        others = (
            x if x is None else x.detach() if isinstance(x, Tensor) else _as_tensor(x, self.weight)
            for x in self[1:]
        )
        return self.weight.detach(), *others


def _as_tensor(values: Any, weight: Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(values, np.float32), device=weight.device)


class Options(NamedTuple):
    """The arguments of a call that are not arrays."""

    axis: int
    block_size: int
    batch_dims: int
    min_code: int
    check_finite: bool
    implementation: str | None

    def problem(self, weight: Tensor, importance: Any = None, hessian: Any = None) -> Problem:
        return make_problem(
            weight.shape,
            axis=self.axis,
            block_size=self.block_size,
            batch_dims=self.batch_dims,
            min_code=self.min_code,
            importance=importance,
            hessian=hessian,
        )


def run_calibrate(arrays: Arrays, options: Options) -> Tensor:
    call = Call(arrays, options)
    if call.engine == "triton":
        return call.on_device("amax")[0]
    return call.back(call.on_host(nvfp4sweep.calibrate))


def run_sweep(arrays: Arrays, options: Options) -> tuple[Tensor, ...]:
    """(amax, code, error, global_amax)"""
    call = Call(arrays, options)
    if call.engine == "triton":
        return tuple(call.on_device("amax", "code", "error", "global_amax"))
    return tuple(map(call.back, call.on_host(nvfp4sweep.sweep)))


def run_quantize(arrays: Arrays, options: Options) -> tuple[Tensor, ...]:
    """(packed, E4M3 codes as uint8, global scale)"""
    call = Call(arrays, options)
    check_packable(call.problem)
    if call.engine == "triton":
        return tuple(call.on_device("packed", "code", "global_scale"))
    quantized = call.on_host(nvfp4sweep.quantize)
    code = quantized.scale.view("uint8")
    return call.back(quantized.packed), call.back(code), call.back(quantized.global_scale)


class Call:
    """A checked call and the two ways to serve it."""

    def __init__(self, arrays: Arrays, options: Options):
        self.weight = as_weight(arrays.weight)
        self.arrays = arrays
        self.options = options
        self.problem = options.problem(self.weight, arrays.importance, arrays.hessian)
        self.engine = choose_engine(self.weight, options.implementation)
        for name, value in arrays._asdict().items():
            check_same_device(name, value, self.weight)

    def on_device(self, *outputs: str) -> list[Tensor]:
        _, *others = self.arrays
        return _device.run(
            self.weight, self.problem, outputs, *others, check_finite=self.options.check_finite
        )

    def on_host(self, function: Any) -> Any:
        amax, importance, hessian = map(to_numpy_if_tensor, self.arrays[1:])
        if amax is not None:
            amax = global_amax_per_matrix(amax, self.problem).reshape(self.problem.batch_shape)
        return function(
            to_numpy(self.weight),
            global_amax=amax,
            importance=importance,
            hessian=hessian,
            **{**self.options._asdict(), "implementation": self.engine},
        )

    def back(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.weight.device)


def _operator(run: Any, name: str) -> Any:
    """Register `run` as torch.ops.nvfp4sweep.<name>: the arrays, and the options spelled out."""
    outputs = {"calibrate": 1, "sweep": 4, "quantize": 3}[name]
    returns = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    schema = (
        "(Tensor weight, Tensor? global_amax, Tensor? importance, Tensor? hessian, int axis, int block_size, "
        f"int batch_dims, int min_code, bool check_finite, str? implementation) -> {returns}"
    )

    def implementation(*arguments: Any) -> Any:
        return run(Arrays(*arguments[:_N_ARRAYS]), Options(*arguments[_N_ARRAYS:]))

    return torch.library.custom_op(f"nvfp4sweep::{name}", implementation, mutates_args=(), schema=schema)


calibrate_op = _operator(run_calibrate, "calibrate")
sweep_op = _operator(run_sweep, "sweep")
quantize_op = _operator(run_quantize, "quantize")


def _asked(weight: Tensor, *arguments: Any) -> Problem:
    _, *objective = arguments[: _N_ARRAYS - 1]
    return Options(*arguments[_N_ARRAYS - 1 :]).problem(weight, *objective)


@calibrate_op.register_fake
def _(weight: Tensor, *arguments: Any) -> Tensor:
    asked = _asked(weight, *arguments)
    return weight.new_empty(asked.block_shape, dtype=torch.float32)


@sweep_op.register_fake
def _(weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    asked = _asked(weight, *arguments)
    amax = weight.new_empty(asked.block_shape, dtype=torch.float32)
    code = weight.new_empty(asked.block_shape, dtype=torch.uint8)
    shared = weight.new_empty(asked.batch_shape, dtype=torch.float32)
    return amax, code, torch.empty_like(amax), shared


@quantize_op.register_fake
def _(weight: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    asked = _asked(weight, *arguments)
    packed = weight.new_empty(asked.packed_shape, dtype=torch.uint8)
    code = weight.new_empty(asked.block_shape, dtype=torch.uint8)
    return packed, code, weight.new_empty(asked.batch_shape, dtype=torch.float32)
