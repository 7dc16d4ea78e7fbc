"""CPU: calibrate against np.abs(x).max() and the oracle; extra memory; import time.

python -m benchmarks.cpu
"""

import subprocess
import sys
import time
from typing import Any

import ml_dtypes
import numpy as np

import nvfp4sweep
from benchmarks import gate, ledger


def main() -> None:
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
    ledger.append({**ledger.environment(ledger.processor()), **entry})


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
