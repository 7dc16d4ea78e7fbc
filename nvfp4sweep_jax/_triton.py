"""The Triton engine: the core's CUDA kernels as part of an XLA program.

Each launch is a custom call that jaxlib registers for Triton kernels, so neither PyTorch nor a copy nor a
wait comes between: XLA allocates, orders and frees. The kernels are compiled when the program is lowered.

On a sharded weight every device searches its own blocks, as the partitioner is told here; only global
amaxes cross devices.
"""

import functools
import itertools
import math
import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from nvfp4sweep.problem import Problem, make_problem
from nvfp4sweep_jax import _amax
from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax._operands import Found, Operands

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
    weight, *given = (x for x in operands if x is not None)
    results = _partitioned(problem, outputs, len(given))(_amax.as_float32(weight), *given)
    # Within shard_map they vary as the weight does.
    varying = tuple(sorted(jax.typeof(weight).manual_axis_type.varying))
    return Found(**dict(zip(outputs, lax.pcast(results, varying, to="varying"), strict=True)))


# --- on a sharded weight ----------------------------------------------------------------------------


@functools.cache
def _partitioned(
    problem: Problem, outputs: tuple[str, ...], n_given: int
) -> Callable[..., tuple[Array, ...]]:
    def search(*operands: Array) -> tuple[Array, ...]:
        return tuple(_search_p.bind(*operands, problem=problem, outputs=outputs))

    def partition(mesh: Mesh, operands: Any, results: Any) -> Any:
        axes = _axes_of(operands[0].sharding, mesh, problem)
        pieces = [math.prod(mesh.shape[name] for name in names) for names in axes]
        local = make_problem(
            [size // n for size, n in zip(problem.shape, pieces, strict=True)],
            axis=problem.axis, block_size=problem.block_size, batch_dims=problem.batch_dims,
            min_code=problem.min_code,
        )  # fmt: skip
        across = tuple(name for names in axes[problem.batch_dims :] for name in names)
        blockwise = NamedSharding(mesh, PartitionSpec(*axes))
        per_matrix = NamedSharding(mesh, PartitionSpec(*axes[: problem.batch_dims]))
        return (
            mesh,
            functools.partial(_search_shard, problem=local, outputs=outputs, across=across),
            tuple(per_matrix if name in _PER_MATRIX else blockwise for name in outputs),
            (blockwise, *[per_matrix] * n_given),
        )

    partitioned = custom_partitioning(search)
    rule, sizes = _sharding_rule(problem, outputs, n_given)
    partitioned.def_partition(partition, decode_shardings=False, sharding_rule=rule, **sizes)
    return partitioned


_PER_MATRIX = ("global_amax", "global_scale", "largest")


def _axes_of(sharding: Sharding, mesh: Mesh, problem: Problem) -> list[tuple[str, ...]]:
    """The axes of the mesh that split each axis of the weight; none anywhere if that would cut blocks."""
    n_axes = len(problem.shape)
    for names in itertools.permutations(name for name, size in mesh.shape.items() if size > 1):
        for places in itertools.product(range(-1, n_axes), repeat=len(names)):
            axes = [
                tuple(name for name, place in zip(names, places, strict=True) if place == i)
                for i in range(n_axes)
            ]
            if NamedSharding(mesh, PartitionSpec(*axes)).is_equivalent_to(sharding, n_axes):
                pieces = math.prod(mesh.shape[name] for name in axes[problem.axis])
                if problem.shape[problem.axis] // problem.block_size % pieces == 0:
                    return axes
    return [()] * n_axes


def _sharding_rule(problem: Problem, outputs: tuple[str, ...], n_given: int) -> tuple[str, dict[str, int]]:
    """Which axes of operands and results correspond, and the sizes of those that only some have."""
    axes = [f"a{i}" for i in range(len(problem.shape))]
    sizes = {"element": problem.block_size}

    def along(factor: str) -> str:
        return " ".join([*axes[: problem.axis], factor, *axes[problem.axis + 1 :]])

    batch = " ".join(axes[: problem.batch_dims])
    blocks = axes[problem.axis]
    rule_of = {name: batch if name in _PER_MATRIX else along(blocks) for name in outputs}
    if "packed" in outputs:
        rule_of["packed"] = along(f"({blocks} byte)")
        sizes["byte"] = problem.block_size // 2
    operands = [along(f"({blocks} element)"), *[batch] * n_given]
    return f"{', '.join(operands)} -> {', '.join(rule_of.values())}", sizes


def _search_shard(
    weight: Array, *given: Array, problem: Problem, outputs: tuple[str, ...], across: tuple[str, ...]
) -> tuple[Array, ...]:
    """A device's part: blocks are its own, the largest magnitude is that of all parts `across` the mesh."""
    known = {}
    if across and (not given or "largest" in outputs):
        (own,) = _search_p.bind(weight, problem=problem, outputs=("global_amax",))
        # As bits, whose order keeps NaN the largest.
        known["largest"] = exact.from_bits(lax.pmax(exact.float32_bits(own), across))
        given = given or (known["largest"],)
    wanted = tuple(name for name in outputs if name not in known)
    known |= dict(zip(wanted, _search_p.bind(weight, *given, problem=problem, outputs=wanted), strict=True))
    return tuple(known[name] for name in outputs)


# --- the primitive: a weight and perhaps its global amaxes to the outputs of these names ------------

_search_p = Primitive("nvfp4sweep")
_search_p.multiple_results = True


@_search_p.def_abstract_eval
def _(weight: Any, *given: Any, problem: Problem, outputs: tuple[str, ...]) -> list[Any]:
    return [jax.core.ShapedArray(s.shape, s.dtype) for s in _shapes(problem, outputs)]


def _shapes(problem: Problem, outputs: Sequence[str]) -> list[jax.ShapeDtypeStruct]:
    from nvfp4sweep.triton_sweeps import output_buffers

    shapes = {"largest": jax.ShapeDtypeStruct(problem.batch_shape, np.float32)}
    for name, shape, dtype in output_buffers(problem, [name for name in outputs if name != "largest"]):
        shapes[name] = jax.ShapeDtypeStruct(shape, np.dtype(dtype))
    return [shapes[name] for name in outputs]


def _as_custom_calls(weight: Array, *given: Array, problem: Problem, outputs: tuple[str, ...]) -> list[Array]:
    """The launches of triton_launch.plan, each a function of what it reads."""
    from nvfp4sweep.triton_launch import CHECKED, plan

    matrices, outer, length, inner = problem.view_shape
    checked = "largest" in outputs
    launches = plan(
        problem, tuple(name for name in outputs if name != "largest"),
        (outer * length * inner, length * inner, inner, 1), weight.dtype.itemsize, capability(),
        given=bool(given), checked=checked,
    )  # fmt: skip
    buffers = {"weight": weight, **dict(zip(["given_amax"], given, strict=False))}
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


def _as_callback(weight: Array, *given: Array, problem: Problem, outputs: tuple[str, ...]) -> Any:
    shapes = _shapes(problem, outputs)
    interpret = functools.partial(_interpret, problem=problem, outputs=outputs)
    return jax.pure_callback(interpret, shapes, weight, *given)


def _interpret(
    weight: Any, *given: Any, problem: Problem, outputs: tuple[str, ...]
) -> list[np.ndarray[Any, Any]]:
    import torch

    from nvfp4sweep import triton_launch

    def tensor(array: Any) -> torch.Tensor:
        host = np.array(array)
        if host.dtype.name == "bfloat16":
            return torch.from_numpy(host.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(host)

    checked = torch.empty(problem.view_shape[0], triton_launch.CHECKED) if "largest" in outputs else None
    with _interpreter, np.errstate(all="ignore"):  # it computes with NumPy, overflow included
        found = triton_launch.run(
            tensor(weight).reshape(problem.view_shape),
            problem,
            tuple(name for name in outputs if name != "largest"),
            lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype)),
            *map(tensor, given),
            checked=checked,
        )
    if checked is not None:
        found["largest"] = checked[:, 0].reshape(problem.batch_shape)
    return [found[name].numpy() for name in outputs]


mlir.register_lowering(_search_p, mlir.lower_fun(_as_callback, multiple_results=True), platform="cpu")
