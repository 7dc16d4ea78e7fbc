"""The ledger: one JSON line a measurement, with the machine, the versions and the commit it ran on."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_name("ledger.jsonl")
_PACKAGES = ("numpy", "numba", "torch", "triton", "jax", "nvidia-modelopt")


def commit() -> str:
    """The commit measured: NVFP4SWEEP_COMMIT where there is no git, and "+" for uncommitted changes."""
    given = os.environ.get("NVFP4SWEEP_COMMIT")
    if given:
        return given
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    root = Path(__file__).parent.parent
    return subprocess.run(
        ["git", *arguments], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


def environment(device: str) -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "commit": commit(),
        "versions": versions,
    }


def processor() -> str:
    """The CPU and how many of its cores this process may use."""
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """Milliseconds at p20, p50 and p80."""
    p20, p50, p80 = np.percentile(list(seconds), [20, 50, 80]) * 1e3
    return {"p20_ms": round(p20, 4), "p50_ms": round(p50, 4), "p80_ms": round(p80, 4)}


def interleaved(
    calls: dict[str, Callable[[], Any]], repeats: int, before: Callable[[], Any] = lambda: None
) -> dict[str, dict[str, float]]:
    """Wall times of each call, taken in turn so that a slow spell of the machine meets all of them.

    `before` runs before each call and is not timed.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            before()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: percentiles(times) for name, times in seconds.items()}


def append(entry: dict[str, Any], path: Path = PATH) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    print(json.dumps(entry, indent=2))


def entries(path: Path = PATH) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
