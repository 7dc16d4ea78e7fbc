"""The three sweeps as functions of tensors, and as operators that torch.compile can trace through."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import nvfp4sweep
from nvfp4sweep.problem import Problem, check_packable, make_problem
from nvfp4sweep_torch import _device
from nvfp4sweep_torch._tensors import as_weight, check_same_device, choose_engine, host_amax, to_numpy


class Options(NamedTuple):
    """The arguments of a call that are not arrays."""

    axis: int
    block_size: int
    batch_dims: int
    min_code: int
    check_finite: bool
    implementation: str | None

    def problem(self, weight: Tensor) -> Problem:
        return make_problem(
            weight.shape,
            axis=self.axis,
            block_size=self.block_size,
            batch_dims=self.batch_dims,
            min_code=self.min_code,
        )


def run_calibrate(weight: Any, global_amax: Any, options: Options) -> Tensor:
    call = _Call(weight, global_amax, options)
    if call.engine == "triton":
        return call.on_device("amax")[0]
    return call.back(call.on_host(nvfp4sweep.calibrate))


def run_sweep(weight: Any, global_amax: Any, options: Options) -> tuple[Tensor, ...]:
    """(amax, code, error, global_amax)"""
    call = _Call(weight, global_amax, options)
    if call.engine == "triton":
        return tuple(call.on_device("amax", "code", "error", "global_amax"))
    return tuple(map(call.back, call.on_host(nvfp4sweep.sweep)))


def run_quantize(weight: Any, global_amax: Any, options: Options) -> tuple[Tensor, ...]:
    """(packed, E4M3 codes as uint8, global scale)"""
    call = _Call(weight, global_amax, options)
    check_packable(call.problem)
    if call.engine == "triton":
        return tuple(call.on_device("packed", "code", "global_scale"))
    quantized = call.on_host(nvfp4sweep.quantize)
    code = quantized.scale.view("uint8")
    return call.back(quantized.packed), call.back(code), call.back(quantized.global_scale)


class _Call:
    """A checked call and the two ways to serve it."""

    def __init__(self, weight: Any, global_amax: Any, options: Options):
        self.weight = as_weight(weight)
        self.global_amax = global_amax
        self.options = options
        self.problem = options.problem(self.weight)
        self.engine = choose_engine(self.weight, options.implementation)
        check_same_device(global_amax, self.weight)

    def on_device(self, *outputs: str) -> list[Tensor]:
        return _device.run(
            self.weight, self.problem, self.global_amax, outputs, check_finite=self.options.check_finite
        )

    def on_host(self, function: Any) -> Any:
        amax = self.global_amax
        if amax is not None:
            amax = host_amax(amax, self.problem).reshape(self.problem.batch_shape)
        return function(
            to_numpy(self.weight),
            global_amax=amax,
            **{**self.options._asdict(), "implementation": self.engine},
        )

    def back(self, array: Any) -> Tensor:
        return torch.from_numpy(array).to(self.weight.device)


def _operator(run: Any, name: str) -> Any:
    """Register `run` as torch.ops.nvfp4sweep.<name>: the weight, the amax, and the options spelled out."""
    outputs = {"calibrate": 1, "sweep": 4, "quantize": 3}[name]
    returns = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    schema = (
        "(Tensor weight, Tensor? global_amax, int axis, int block_size, int batch_dims, int min_code, "
        f"bool check_finite, str? implementation) -> {returns}"
    )

    def implementation(weight: Tensor, global_amax: Tensor | None, *options: Any) -> Any:
        return run(weight, global_amax, Options(*options))

    return torch.library.custom_op(f"nvfp4sweep::{name}", implementation, mutates_args=(), schema=schema)


calibrate_op = _operator(run_calibrate, "calibrate")
sweep_op = _operator(run_sweep, "sweep")
quantize_op = _operator(run_quantize, "quantize")


@calibrate_op.register_fake
def _(weight: Tensor, global_amax: Tensor | None, *options: Any) -> Tensor:
    asked = Options(*options).problem(weight)
    return weight.new_empty(asked.block_shape, dtype=torch.float32)


@sweep_op.register_fake
def _(weight: Tensor, global_amax: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    asked = Options(*options).problem(weight)
    amax = weight.new_empty(asked.block_shape, dtype=torch.float32)
    code = weight.new_empty(asked.block_shape, dtype=torch.uint8)
    shared = weight.new_empty(asked.batch_shape, dtype=torch.float32)
    return amax, code, torch.empty_like(amax), shared


@quantize_op.register_fake
def _(weight: Tensor, global_amax: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    asked = Options(*options).problem(weight)
    packed = weight.new_empty(asked.packed_shape, dtype=torch.uint8)
    code = weight.new_empty(asked.block_shape, dtype=torch.uint8)
    return packed, code, weight.new_empty(asked.batch_shape, dtype=torch.float32)
