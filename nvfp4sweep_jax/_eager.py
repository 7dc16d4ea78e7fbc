"""The core's engines on the host, for concrete arrays; and what is wrong with an array."""

from typing import Any

import jax
import numpy as np
import numpy.typing as npt

import nvfp4sweep
from nvfp4sweep.problem import Problem, nonfinite_error
from nvfp4sweep_jax._amax import as_float32
from nvfp4sweep_jax._operands import Found


def on_host(
    function: str,
    weight: jax.Array,
    problem: Problem,
    global_amax: npt.NDArray[np.float32] | None,
    check_finite: bool,
    implementation: str,
    *,
    importance: Any = None,
    hessian: Any = None,
) -> Found:
    """nvfp4sweep's function of this name, on the weight's own memory where that is the host's."""
    result = getattr(nvfp4sweep, function)(
        np.asarray(weight),
        global_amax=global_amax,
        axis=problem.axis,
        block_size=problem.block_size,
        batch_dims=problem.batch_dims,
        importance=None if importance is None else np.asarray(importance),
        hessian=None if hessian is None else np.asarray(hessian),
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
