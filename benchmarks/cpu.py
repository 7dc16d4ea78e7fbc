"""CPU: calibrate against np.abs(x).max() and the oracle; importances and Hessians; extra memory; import time.

python -m benchmarks.cpu [ledger]
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

import nvfp4sweep
from benchmarks import gate, ledger


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ledger.PATH
    entry: dict[str, Any] = {
        "benchmark": "cpu",
        "shape": list(gate.SHAPE),
        "import_s": _import_seconds(),
        "extra_memory_fraction": _extra_memory_fraction(),
    }
    for name, dtype in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        weight = gate.gaussian(dtype)
        result = nvfp4sweep.sweep(weight)
        start = time.perf_counter()
        expected = nvfp4sweep.sweep(weight, implementation="oracle") if name == "float32" else None
        oracle_seconds = time.perf_counter() - start
        codes = expected.code if expected else gate.oracle_codes(weight, result.global_amax)
        blocks = gate.require_equal(name, result.code, codes.reshape(-1))
        times = ledger.interleaved(
            {
                "calibrate": lambda weight=weight: nvfp4sweep.calibrate(weight),  # type: ignore[misc]
                "abs_max": lambda weight=weight: np.abs(weight).max(),  # type: ignore[misc]
                "sweep": lambda weight=weight: nvfp4sweep.sweep(weight),  # type: ignore[misc]
                "quantize": lambda weight=weight: nvfp4sweep.quantize(weight),  # type: ignore[misc]
            },
            repeats=15,
        )
        entry[name] = {"blocks_equal_to_oracle": blocks, **times}
        if expected:
            entry[name]["oracle_s"] = round(oracle_seconds, 2)
            entry[name]["oracle_over_calibrate"] = round(
                oracle_seconds * 1e3 / times["calibrate"]["p50_ms"], 1
            )
            entry[name]["calibrate_over_abs_max"] = round(
                times["calibrate"]["p50_ms"] / times["abs_max"]["p50_ms"], 2
            )
    entry["objectives"] = _objectives()
    ledger.append({**ledger.environment(ledger.processor()), **entry}, path)


def _objectives() -> dict[str, Any]:
    """calibrate with importances and Hessians, in turn with plain calibrate, of a float32 weight."""
    weight = gate.gaussian()
    length, amax = weight.shape[1], np.float32(nvfp4sweep.global_amax(weight))
    rng = np.random.default_rng(1)
    weights: dict[str, dict[str, Any]] = {
        "importance": {"importance": np.asarray(rng.lognormal(0, 1, length), np.float32)},
        "hessian_512_tokens": {"hessian": _moments(rng.standard_normal((512, length)))},
        "hessian_common_0.5": {"hessian": _common_factor(0.5, length)},
        "hessian_common_0.9": {"hessian": _common_factor(0.9, length)},
        "hessian_rank_1": {"hessian": _moments(rng.standard_normal((1, length)))},
    }
    calls = {"calibrate": lambda: nvfp4sweep.calibrate(weight)}
    blocks = {}
    for name, options in weights.items():
        # Hessians on a sample, one row in 32: the oracle takes minutes for all.
        part = slice(None) if name == "importance" else slice(None, None, 32)
        code = nvfp4sweep.sweep(weight, **options).code[part]
        blocks[name] = gate.require_equal(name, code, gate.oracle_codes(weight[part], amax, **options))
        calls[name] = lambda options=options: nvfp4sweep.calibrate(weight, **options)  # type: ignore[misc]
    times = ledger.interleaved(calls, repeats=7)
    plain = times["calibrate"]["p50_ms"]
    return {"calibrate": times.pop("calibrate")} | {
        name: {
            "blocks_equal_to_oracle": blocks[name],
            **row,
            "over_calibrate": round(row["p50_ms"] / plain, 2),
        }
        for name, row in times.items()
    }


def _moments(activations: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """The block Hessians of [tokens, length]."""
    x = activations.reshape(len(activations), -1, 16).transpose(1, 0, 2)
    return np.asarray((x.swapaxes(1, 2) @ x / len(activations)).astype(np.float32))


def _common_factor(rho: float, length: int) -> npt.NDArray[np.float32]:
    block = ((1 - rho) * np.eye(16) + rho).astype(np.float32)
    return np.tile(block, (length // 16, 1, 1))


def _import_seconds() -> float:
    """The median time that `import nvfp4sweep` adds to an interpreter's start."""

    def run(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    run("import nvfp4sweep")
    added = [run("import nvfp4sweep") - run("pass") for _ in range(7)]
    return round(float(np.median(added)), 3)


_MEMORY_PROGRAM = """
import resource, sys
import numpy as np
import nvfp4sweep
weight = np.random.default_rng(0).standard_normal((8192, 4096), np.float32)
nvfp4sweep.calibrate(weight[:64])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
amax = nvfp4sweep.calibrate(weight)
print((peak() - before - amax.nbytes) / weight.nbytes)
"""


def _extra_memory_fraction() -> float:
    """Growth of the peak resident memory over a call, less its output, in weights."""
    output = subprocess.run(
        [sys.executable, "-c", _MEMORY_PROGRAM], check=True, capture_output=True, text=True
    ).stdout
    return round(float(output), 4)


if __name__ == "__main__":
    main()
