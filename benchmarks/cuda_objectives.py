"""CUDA: sweeps with importances and block Hessians, beside the plain sweep and ModelOpt's Hessian sweep.

    python -m benchmarks.cuda_objectives [--ledger FILE] [--no-peer]

The codes of every block are compared with the CPU engine's first, and those of some rows with the oracle's.
"""

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import nvfp4sweep
from benchmarks import cuda_gate, cuda_peers, gate, ledger
from benchmarks.cuda_timing import Call, device_times, rotated
from nvfp4sweep import formats
from nvfp4sweep_torch import calibrate, sweep

Array = npt.NDArray[Any]
Objective = dict[str, Any]  # the one keyword that names it, and its value

_DTYPES = (torch.bfloat16, torch.float32)
_COPIES = 4  # together several times the second-level cache
_REPEATS = 20
_TOKENS = {"tokens_512": 512, "tokens_8": 8}
_COMMON = {"common_0.5": 0.5, "common_0.9": 0.9, "rank_1": 1.0}
_SIGMAS = (0, 1, 2, 3)
_ORACLE_BLOCKS = 512
_AGAINST_PEER = ("tokens_512", "common_0.5")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_objectives")
    parser.add_argument("--ledger", type=Path, default=ledger.PATH)
    parser.add_argument("--no-peer", action="store_true", help="leave ModelOpt out")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    objectives = dict(_objectives())
    # A process of its own: it compiles while the device's kernels are compiled here.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        expected = {
            (dtype, name): process.submit(_expected, dtype is torch.bfloat16, objective)
            for dtype in _DTYPES
            for name, objective in objectives.items()
        }
        peer = None if arguments.no_peer else cuda_peers.load_hessian()
        measured = {_name(dtype): _one_dtype(dtype, objectives, expected, peer) for dtype in _DTYPES}
    entry = {
        **ledger.environment(torch.cuda.get_device_name()),
        "benchmark": "cuda_objectives",
        "host": ledger.processor(),
        "shape": list(gate.SHAPE),
        **measured,
    }
    ledger.append(entry, arguments.ledger)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _objectives() -> Iterator[tuple[str, Objective]]:
    rng = np.random.default_rng(1)
    n = gate.SHAPE[1]
    for sigma in _SIGMAS:
        yield (
            f"importance_sigma_{sigma}",
            {"importance": np.exp(sigma * rng.standard_normal(n)).astype(np.float32)},
        )
    for name, tokens in _TOKENS.items():
        x = rng.standard_normal((n // 16, tokens, 16))
        yield name, {"hessian": (x.swapaxes(1, 2) @ x / tokens).astype(np.float32)}
    for name, common in _COMMON.items():
        one = (1 - common) * np.eye(16) + common
        yield name, {"hessian": np.tile(one.astype(np.float32), (n // 16, 1, 1))}


def _weight(in_bfloat16: bool) -> torch.Tensor:
    weight = torch.from_numpy(gate.gaussian())
    return weight.bfloat16() if in_bfloat16 else weight


def _expected(in_bfloat16: bool, objective: Objective) -> Array:
    """The CPU engine's codes."""
    weight = _weight(in_bfloat16).float().numpy()
    code: Array = nvfp4sweep.sweep(weight, implementation="cpu", **objective).code
    return code


def _one_dtype(
    dtype: torch.dtype,
    objectives: dict[str, Objective],
    expected: dict[tuple[torch.dtype, str], Future[Array]],
    peer: Callable[..., torch.Tensor] | None,
) -> dict[str, Any]:
    host = _weight(dtype is torch.bfloat16)
    weights = [host.to("cuda", copy=True) for _ in range(_COPIES)]
    w = weights[0]
    amax = torch.linalg.vector_norm(w, torch.inf).float()
    alone: Any = partial(calibrate, global_amax=amax, check_finite=False)
    on_device: dict[str, Objective] = {
        name: {kind: torch.from_numpy(value).cuda() for kind, value in objective.items()}
        for name, objective in objectives.items()
    }
    calls: dict[str, Call] = {"plain": alone}
    calls |= {name: partial(alone, **objective) for name, objective in on_device.items()}
    blocks = 0
    for name, objective in on_device.items():
        # The codes that the sweep alone stands for, and those that it writes out.
        codes = expected[dtype, name].result()
        block_amax = nvfp4sweep.scale_candidates()[codes - 1] * np.float32(amax.item())
        got = alone(w, **objective).cpu().numpy()
        blocks = gate.require_equal(f"{dtype}, {name}", got, block_amax)
        found = sweep(w, **objective).code.cpu().numpy()
        gate.require_equal(f"{dtype}, {name}: codes", found, codes)
        cuda_gate.sample(f"{dtype}, {name}", w, amax, blocks=_ORACLE_BLOCKS, **objective)
    result: dict[str, Any] = {"blocks_equal_to_cpu": blocks, "objectives": len(objectives)}
    if peer is not None:
        for name in _AGAINST_PEER:
            hessian = on_device[name]["hessian"]
            calls[f"modelopt_{name}"] = partial(peer, global_amax=amax, hessian=hessian)
            theirs = cuda_peers.codes(peer(w, amax, hessian), amax)
            ours = expected[dtype, name].result().reshape(-1)
            result[f"against_modelopt_{name}"] = _compare(w, amax, hessian, ours, theirs)
    result["device"] = device_times(rotated(calls, weights), _REPEATS)
    return result


def _compare(
    w: torch.Tensor, amax: torch.Tensor, hessian: torch.Tensor, ours: Array, theirs: Array
) -> dict[str, Any]:
    """Where codes differ, how often either error is the larger in float64."""
    differ = np.flatnonzero(ours != theirs)
    index = torch.from_numpy(differ).cuda()
    blocks = w.reshape(-1, 16)[index].double()
    matrices = hessian[index % len(hessian)].double()
    scales = torch.from_numpy(formats.scale_by_code(np.float32(amax.item()))).cuda().double()
    errors = [
        _errors(blocks, scales[torch.from_numpy(codes[differ]).long().cuda()], matrices)
        for codes in (ours, theirs)
    ]
    return {
        "differ": len(differ),
        "ours_worse": int((errors[0] > errors[1]).sum()),
        "theirs_worse": int((errors[1] > errors[0]).sum()),
        "most_excess": float((errors[1] / errors[0] - 1).max()) if len(differ) else 0.0,
    }


def _errors(blocks: torch.Tensor, scales: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """r^T H r with the nearest points, in a tie those of even code; halves of scales are exact in float64."""
    values = torch.tensor(formats.E2M1_VALUES, device=blocks.device, dtype=torch.float64)
    middles = (values[1:] + values[:-1]) / 2 * scales[:, None]
    magnitudes = blocks.abs()[:, :, None]
    to_even = torch.arange(7, device=blocks.device) % 2 == 1
    reached = (magnitudes > middles[:, None]) | ((magnitudes == middles[:, None]) & to_even)
    residuals = blocks.sign() * (blocks.abs() - values[reached.sum(2)] * scales[:, None])
    return torch.einsum("ni,nij,nj->n", residuals, matrices, residuals)


if __name__ == "__main__":
    main()
