"""The Triton engine: the core's CUDA kernels as part of an XLA program.

Each launch is a custom call that jaxlib registers for Triton kernels, so neither PyTorch nor a copy nor a
wait comes between: XLA allocates, orders and frees. The kernels are compiled when the program is lowered.
"""

import functools
import math
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import mlir

from nvfp4sweep.problem import Problem
from nvfp4sweep_jax import _amax, _partition
from nvfp4sweep_jax._operands import Found, Operands, shape_of

Array = jax.Array

_TARGET = "triton_kernel_call_ffi"  # of jaxlib's CUDA plugin
_ELEMENTS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "u8"}


def why_not(platform: str) -> str:
    """Empty if the kernels can be part of a program for this platform, else why they cannot.

    Of a traced array the platform is not known yet, and is "".
    """
    try:
        from nvfp4sweep.triton_arithmetic import INTERPRETED

        if INTERPRETED.value:
            import torch  # noqa: F401
    except ImportError as error:
        return f"it needs Triton 3.6 or later, and in Triton's interpreter PyTorch: {error}"
    if INTERPRETED.value:
        return "" if platform in ("cpu", "") else "TRITON_INTERPRET is set: it needs an array on the CPU"
    return "" if platform in ("gpu", "cuda", "") and capability() else "it needs a CUDA device"


@functools.cache
def capability() -> int:
    """Of the CUDA devices, as 90 for 9.0; 0 where there is none."""
    try:
        (version, *others) = {device.compute_capability for device in jax.devices("cuda")}
    except RuntimeError:
        return 0
    if others:
        raise RuntimeError(
            f"CUDA devices of several kinds, {sorted([version, *others])}: make one kind visible"
        )
    return round(10 * float(version))


@functools.partial(jax.jit, static_argnames=("problem", "outputs"))
def run(operands: Operands, problem: Problem, outputs: tuple[str, ...]) -> Found:
    """Compute the fields of Found named in `outputs`."""
    operands = operands._replace(weight=_amax.as_float32(operands.weight))
    return _partition.on_shards(_search, operands, problem, outputs)


def _search(operands: Operands, problem: Problem, outputs: tuple[str, ...]) -> Found:
    arrays = {name: x for name, x in operands._asdict().items() if x is not None}
    found = _search_p.bind(*arrays.values(), given=tuple(arrays), problem=problem, outputs=outputs)
    return Found(**dict(zip(outputs, found, strict=True)))


def _viewed(
    arrays: Sequence[Array], given: tuple[str, ...], problem: Problem
) -> tuple[Operands, tuple[int, ...] | None]:
    """The operands, and the strides of an importance as Problem.view_shape.

    It stays small, unless it repeats along some but not all of the axes that one of those four merges.
    """
    operands = Operands(**dict(zip(given, arrays, strict=True)))
    importance = operands.importance
    if importance is None:
        return operands, None
    axis, rank = problem.axis, len(problem.shape)
    merged = (range(problem.batch_dims), range(problem.batch_dims, axis), (axis,), range(axis + 1, rank))
    shape = list(importance.shape)
    for group in merged:
        if any(shape[i] > 1 for i in group):
            for i in group:
                shape[i] = problem.shape[i]
    sizes = [math.prod(shape[i] for i in group) for group in merged]
    strides = [math.prod(sizes[i + 1 :]) if size > 1 else 0 for i, size in enumerate(sizes)]
    return operands._replace(importance=jnp.broadcast_to(importance, shape).reshape(sizes)), tuple(strides)


# --- the primitive: the given fields of Operands to the outputs of these names ----------------------

_search_p = Primitive("nvfp4sweep")
_search_p.multiple_results = True


@_search_p.def_abstract_eval
def _(*arrays: Any, given: tuple[str, ...], problem: Problem, outputs: tuple[str, ...]) -> list[Any]:
    return [jax.core.ShapedArray(*shape_of(name, problem)) for name in outputs]


def _shapes(problem: Problem, outputs: tuple[str, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(*shape_of(name, problem)) for name in outputs]


def _as_custom_calls(
    *arrays: Array, given: tuple[str, ...], problem: Problem, outputs: tuple[str, ...]
) -> list[Array]:
    """The launches of triton_launch.plan, each a function of what it reads."""
    from nvfp4sweep.triton_launch import CHECKED, plan

    (weight, global_amax, importance, hessian), importance_strides = _viewed(arrays, given, problem)
    matrices, outer, length, inner = problem.view_shape
    checked = "largest" in outputs
    launches = plan(
        problem, tuple(name for name in outputs if name != "largest"),
        (outer * length * inner, length * inner, inner, 1), weight.dtype.itemsize, capability(),
        given=global_amax is not None, checked=checked, importance_strides=importance_strides,
        hessian_matrices=0 if hessian is None else math.prod(hessian.shape[:-3]),
    )  # fmt: skip
    buffers = {"weight": weight, "given_amax": global_amax, "importance": importance, "hessian": hessian}
    for launch in launches:
        buffers |= _custom_call(
            launch, buffers, {"checked": ((matrices, CHECKED), "float32")} if checked else {}
        )
    if "checked" in buffers:
        buffers["largest"] = buffers["checked"][:, 0].reshape(problem.batch_shape)
    # What no launch writes has no elements.
    return [
        buffers[name] if name in buffers else jnp.zeros(s.shape, s.dtype)
        for name, s in zip(outputs, _shapes(problem, outputs), strict=True)
    ]


def _custom_call(launch: Any, buffers: dict[str, Array], given: dict[str, Any]) -> dict[str, Array]:
    shapes = {name: (shape, dtype) for name, shape, dtype in launch.allocates} | given
    written = [name for name in launch.writes if name is not None]
    results = [jax.ShapeDtypeStruct(shapes[name][0], np.dtype(shapes[name][1])) for name in written]
    read = [name for name in launch.reads if name is not None]
    dtypes = {name: buffers[name].dtype for name in read}
    dtypes |= {name: result.dtype for name, result in zip(written, results, strict=True)}
    elements = [None if name is None else _ELEMENTS[dtypes[name].name] for name in launch.buffers]
    call = jax.ffi.ffi_call(_TARGET, results)
    found = call(*[buffers[name] for name in read], opaque=_call_of(launch, tuple(elements)))
    return dict(zip(written, found, strict=True))


@functools.lru_cache(maxsize=4096)
def _call_of(launch: Any, elements: tuple[str | None, ...]) -> bytes:
    """The launch as jaxlib's handler reads it."""
    from jaxlib import gpu_triton

    built = launch.build(capability(), elements)
    kernel = gpu_triton.TritonKernel(
        built.name, built.warps, 1, built.shared_bytes, built.ptx, "", capability()
    )
    arrays = [gpu_triton.create_array_parameter(0, 16) for element in elements if element is not None]
    numbers = [gpu_triton.create_scalar_parameter(value, type_) for type_, value in built.numbers]
    call = gpu_triton.TritonKernelCall(kernel, *launch.grid, [*arrays, *numbers])
    return zlib.compress(call.to_proto(built.name, b""))


mlir.register_lowering(_search_p, mlir.lower_fun(_as_custom_calls, multiple_results=True), platform="cuda")


# --- in Triton's interpreter, for tests without a GPU -----------------------------------------------

_interpreter = threading.Lock()  # it changes Triton's own functions while it runs


def _as_callback(*arrays: Array, given: tuple[str, ...], problem: Problem, outputs: tuple[str, ...]) -> Any:
    operands, strides = _viewed(arrays, given, problem)
    interpret = functools.partial(_interpret, strides=strides, problem=problem, outputs=outputs)
    return jax.pure_callback(interpret, _shapes(problem, outputs), operands)


def _interpret(
    operands: Operands, *, strides: Any, problem: Problem, outputs: tuple[str, ...]
) -> list[np.ndarray[Any, Any]]:
    import torch

    from nvfp4sweep import triton_launch

    def tensor(array: Any) -> torch.Tensor:
        host = np.array(array)
        if host.dtype.name == "bfloat16":
            return torch.from_numpy(host.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(host)

    weight = tensor(operands.weight)
    global_amax, importance, hessian = (None if x is None else tensor(x) for x in operands[1:])
    checked = torch.empty(problem.view_shape[0], triton_launch.CHECKED) if "largest" in outputs else None
    with _interpreter, np.errstate(all="ignore"):  # it computes with NumPy, overflow included
        found = triton_launch.run(
            weight.reshape(problem.view_shape),
            problem,
            tuple(name for name in outputs if name != "largest"),
            lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype)),
            global_amax,
            importance=None if importance is None else importance.as_strided(problem.view_shape, strides),
            hessian=hessian,
            checked=checked,
        )
    if checked is not None:
        found["largest"] = checked[:, 0].reshape(problem.batch_shape)
    return [found[name].numpy() for name in outputs]


mlir.register_lowering(_search_p, mlir.lower_fun(_as_callback, multiple_results=True), platform="cpu")
