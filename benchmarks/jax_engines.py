"""JAX: eager and traced calls, on CUDA beside the PyTorch adapter, on a CPU beside the Numba engine.

    python -m benchmarks.jax_engines [--ledger FILE]

The newest JAX device decides. Every engine's codes for every block of the weight are compared with the
oracle's first, and one difference stops the run.
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nvfp4sweep_jax
from benchmarks import gate, ledger
from nvfp4sweep_jax import calibrate, global_amax

Call = Callable[[], Any]  # gives what to wait for

_SMALL_SHAPE = (1, 1024)
_ROUNDS = 30
_IN_A_ROW = {"gpu": 20, "cpu": 1}
_SMALL_IN_A_ROW = 100


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jax_engines")
    parser.add_argument("--ledger", type=Path, default=ledger.PATH)
    arguments = parser.parse_args()
    device = jax.devices()[0]
    on_gpu = device.platform == "gpu"
    host = gate.gaussian(jnp.bfloat16 if on_gpu else np.float32)
    weight = jax.device_put(host, device)
    amax = global_amax(weight)
    codes = gate.oracle_codes(host, np.float32(amax))
    traced = _traced("xla", "triton") if on_gpu else _traced("xla")
    for name, function in {"eager": _eager, **traced}.items():
        for given in (amax, None):
            found = jax.tree.leaves(function(weight, given))[0]
            expected = nvfp4sweep_jax.scale_candidates()[codes - 1] * amax
            gate.require_equal(f"{name}, global amax {given}", np.asarray(found), np.asarray(expected))
    calls = _calls(weight, amax, traced, on_gpu)
    small = jnp.ones(_SMALL_SHAPE, jnp.bfloat16)
    small_calls = _calls(small, global_amax(small), {}, on_gpu)
    entry: dict[str, Any] = {
        **ledger.environment(_name(device)),
        "benchmark": "jax_cuda" if on_gpu else "jax_cpu",
        "host": ledger.processor(),
        "shape": list(gate.SHAPE),
        "dtype": weight.dtype.name,
        "blocks_equal_to_oracle": codes.size,
        "in_a_row": _IN_A_ROW[device.platform],
        "times": _times(calls, _IN_A_ROW[device.platform], wait_in_time=True),
        "small": {
            "shape": list(_SMALL_SHAPE),
            "in_a_row": _SMALL_IN_A_ROW,
            "times": _times(small_calls, _SMALL_IN_A_ROW, wait_in_time=False),
        },
    }
    ledger.append(entry, arguments.ledger)


def _name(device: Any) -> str:
    return str(device.device_kind) if device.platform == "gpu" else ledger.processor()


def _eager(weight: jax.Array, amax: Any) -> jax.Array:
    return calibrate(weight, global_amax=amax, check_finite=False)


def _traced(*engines: str) -> dict[str, Callable[..., jax.Array]]:
    return {
        f"jit_{name}": jax.jit(
            lambda weight, amax, name=name: calibrate(weight, global_amax=amax, implementation=name)
        )
        for name in engines
    }


def _calls(
    weight: jax.Array, amax: Any, traced: dict[str, Callable[..., jax.Array]], on_gpu: bool
) -> dict[str, Call]:
    calls: dict[str, Call] = {
        "eager": lambda: _eager(weight, amax),
        "eager_own_amax": lambda: _eager(weight, None),
        "eager_checked": lambda: calibrate(weight),
    }
    for name, function in traced.items():
        calls[name] = functools.partial(function, weight, amax)
        calls[f"{name}_own_amax"] = functools.partial(function, weight, None)
    return calls | (_torch_calls(weight, amax) if on_gpu else {})


def _torch_calls(weight: jax.Array, amax: Any) -> dict[str, Call]:
    import torch

    import nvfp4sweep_torch

    values = np.asarray(weight).view(np.int16)
    tensor = torch.from_numpy(values.copy()).view(torch.bfloat16).cuda()
    given = torch.tensor(float(amax), device="cuda")
    return {
        "torch": lambda: nvfp4sweep_torch.calibrate(tensor, global_amax=given, check_finite=False),
        "torch_own_amax": lambda: nvfp4sweep_torch.calibrate(tensor, check_finite=False),
        "torch_checked": lambda: nvfp4sweep_torch.calibrate(tensor),
    }


def _times(calls: dict[str, Call], in_a_row: int, *, wait_in_time: bool) -> dict[str, dict[str, float]]:
    """Of one call, from so many in a row, by turns; the wait for the last one counts or it does not."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        _wait(call())
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(in_a_row):
                result = call()
            if not wait_in_time:
                seconds[name].append((time.perf_counter() - begin) / in_a_row)
            _wait(result)
            if wait_in_time:
                seconds[name].append((time.perf_counter() - begin) / in_a_row)
    return {name: ledger.percentiles(times) for name, times in seconds.items()}


def _wait(result: Any) -> None:
    if isinstance(result, jax.Array):
        result.block_until_ready()
    else:
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
