"""Engines outside XLA, for concrete arrays on one device: the core's on the host and on CUDA."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import nvfp4sweep
from nvfp4sweep.problem import Problem, nonfinite_error
from nvfp4sweep_jax._amax import as_float32
from nvfp4sweep_jax._xla import Found


def on_host(
    function: str,
    weight: jax.Array,
    problem: Problem,
    global_amax: npt.NDArray[np.float32] | None,
    check_finite: bool,
    implementation: str,
) -> Found:
    """nvfp4sweep's function of this name, on the weight's own memory where that is the host's."""
    result = getattr(nvfp4sweep, function)(
        np.asarray(weight),
        global_amax=global_amax,
        axis=problem.axis,
        block_size=problem.block_size,
        batch_dims=problem.batch_dims,
        min_code=problem.min_code,
        check_finite=check_finite,
        implementation=implementation,
    )
    devices = weight.devices()
    device = next(iter(devices)) if len(devices) == 1 else None
    if function == "calibrate":
        return Found(amax=jax.device_put(result, device))
    if function == "sweep":
        return Found(**{name: jax.device_put(x, device) for name, x in result._asdict().items()})
    return Found(
        packed=jax.device_put(result.packed, device),
        code=jax.device_put(result.scale.view(np.uint8), device),
        global_scale=jax.device_put(result.global_scale, device),
    )


def why_not_triton(device: jax.Device) -> str:
    """Empty if Triton's kernels can run on this device's arrays, else why they cannot."""
    if device.platform not in ("gpu", "cuda", "cpu") or "rocm" in device.client.platform_version.lower():
        return "it needs a CUDA device"
    try:
        import torch
        import triton
    except ImportError as error:
        return f"it needs PyTorch and Triton: {error}"
    if device.platform == "cpu":
        return "" if triton.knobs.runtime.interpret else "it needs a CUDA device"
    return "" if torch.version.cuda and torch.cuda.is_available() else "it needs PyTorch for CUDA"


def through_torch(
    weight: jax.Array,
    problem: Problem,
    outputs: tuple[str, ...],
    global_amax: npt.NDArray[np.float32] | None,
    check_finite: bool,
) -> Found:
    """The core's Triton kernels on a tensor that shares the array's memory.

    DLPack orders the streams both ways, but neither framework knows when the other is done with
    memory that it frees. So the results are copied to memory of JAX, and both streams are waited for.
    """
    import torch
    import torch.utils.dlpack

    from nvfp4sweep import triton_launch

    weight = jax.jit(as_float32)(weight) if weight.dtype == np.float64 else weight
    tensor = torch.utils.dlpack.from_dlpack(weight)
    device = tensor.device
    with torch.cuda.device(device) if tensor.is_cuda else contextlib.nullcontext():
        view = tensor.reshape(problem.view_shape)
        given = None if global_amax is None else torch.from_numpy(global_amax.reshape(-1)).to(device)

        def empty(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
            return torch.empty(shape, dtype=getattr(torch, dtype), device=device)

        checked = empty((len(view), 2), "float32") if check_finite else None
        found = triton_launch.run(view, problem, outputs, empty, given, checked=checked)
        copies = {name: jnp.copy(jax.dlpack.from_dlpack(x)) for name, x in found.items()}
        for copy in copies.values():
            copy.block_until_ready()
        finite = checked is None or bool(checked[:, 0].isfinite().all())
        if tensor.is_cuda:
            torch.cuda.current_stream().synchronize()
    if not finite:
        raise first_nonfinite(weight)
    return Found(**copies)


def first_nonfinite(weight: jax.Array) -> ValueError:
    """The exception for a weight that has an element which is not finite as float32."""
    weight = jax.jit(as_float32)(weight)
    found = []
    for shard in weight.addressable_shards:
        part = np.asarray(shard.data)
        bad = ~np.isfinite(part)
        if bad.any():
            local = np.unravel_index(np.argmax(bad), part.shape)
            start = (piece.start or 0 for piece in shard.index)
            index = tuple(int(i) + first for i, first in zip(local, start, strict=True))
            found.append((index, part[local]))
    return nonfinite_error("weight", *min(found, key=lambda item: item[0]))
