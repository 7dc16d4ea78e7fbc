"""Ranks of torch.distributed for the tests: meshes of them, how DTensors are compared, and the launch."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # as DTensor does when it is first used: here, once for all ranks
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, DTensor, distribute_tensor, init_device_mesh

TIMEOUT = {"cpu": 120, "cuda": 900}  # seconds: kernels for CUDA may have to be compiled


@dataclasses.dataclass(frozen=True)
class Ranks:
    """All ranks, and meshes of `size` of them; this rank is in one mesh of each size."""

    device: str
    world: int

    def sizes(self) -> list[int]:
        return [size for size in (1, 2, 4, 8) if self.world % size == 0]

    def mesh(self, size: int) -> DeviceMesh:
        return _mesh(self.device, self.world // size, size)["shard"]

    def grid(self) -> DeviceMesh:
        """All ranks as [2, ...]."""
        return _mesh(self.device, 2, self.world // 2)

    def normal(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Of the same values on all ranks, and of another largest value in each part of it."""
        w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return w.to(dtype).to(self.device)

    def importance(self, *shape: int) -> torch.Tensor:
        return self.normal(*shape, seed=7).exp()

    def hessian(self, *blocks: int) -> torch.Tensor:
        x = self.normal(*blocks, 16, 32, seed=8)
        return x @ x.mT


_MESHES: dict[Any, DeviceMesh] = {}


def _mesh(device: str, *shape: int) -> DeviceMesh:
    if shape not in _MESHES:
        _MESHES[shape] = init_device_mesh(device, shape, mesh_dim_names=("copy", "shard"))
    return _MESHES[shape]


# --- comparisons --------------------------------------------------------------------------------------


def fields(result: Any) -> list[torch.Tensor]:
    if hasattr(result, "packed"):
        return [result.packed, result.scale, result.global_scale]
    return list(result) if isinstance(result, tuple) else [result]


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same shape, dtype and bytes."""
    assert found.dtype == expected.dtype, (found.dtype, expected.dtype)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert found.device == expected.device
    if found.dtype is torch.float8_e4m3fn:
        found, expected = found.view(torch.uint8), expected.view(torch.uint8)
    assert torch.equal(found, expected), (found, expected)


def lies(
    found: torch.Tensor, expected: torch.Tensor, mesh: DeviceMesh, placements: Any, gather: bool = False
) -> None:
    """A DTensor with these placements and parts; `gather`: and PyTorch makes of them what is expected."""
    assert isinstance(found, DTensor)
    assert (found.device_mesh, found.placements) == (mesh, tuple(placements)), found.placements
    assert found.shape == expected.shape
    assert found.stride() == expected.stride() or not expected.numel()
    assert not found.requires_grad
    same(found.to_local(), distribute_tensor(expected, mesh, placements, src_data_rank=None).to_local())
    if gather:
        same(found.full_tensor(), expected)


def raises(error: type[Exception], text: str, function: Any, *args: Any, **options: Any) -> Exception:
    """The exception; an AssertionError if there is none, which pytest.raises does not raise."""
    try:
        function(*args, **options)
    except error as caught:
        found = caught
    else:
        raise AssertionError(f"no {error.__name__} with {text!r}")
    assert text in str(found), found
    return found


def silent() -> Any:
    """No rank may tell the others anything here."""
    return mock.patch("torch.distributed.all_reduce", side_effect=AssertionError("an all-reduce"))


# --- the launch ---------------------------------------------------------------------------------------

Check = Callable[..., None]


def _calls(checks: Iterable[Check], ranks: Ranks) -> Iterator[functools.partial[None]]:
    for check in checks:
        sizes = ranks.sizes() if "size" in check.__annotations__ else ()
        for arguments in [(ranks, size) for size in sizes] or [(ranks,)]:
            yield functools.partial(check, *arguments)


def _work(rank: int, checks: list[Check], device: str, world: int, store: str) -> None:
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        {"cpu": "gloo", "cuda": "nccl"}[device],
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT[device] / 2),
        device_id=torch.device("cuda", rank) if device == "cuda" else None,
    )
    for call in _calls(checks, Ranks(device, world)):
        start = time.perf_counter()
        call()
        if rank == 0:
            print(f"{call.func.__name__}{call.args[1:]}: {time.perf_counter() - start:.2f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def run_on_ranks(checks: list[Check], device: str, world: int, store: str) -> None:
    """Raises the traceback of the first rank that fails, and SystemExit if they take too long."""
    method = {"cpu": "fork", "cuda": "spawn"}[device]
    arguments = (checks, device, world, store)
    context = torch.multiprocessing.start_processes(_work, arguments, world, join=False, start_method=method)
    deadline = time.monotonic() + TIMEOUT[device]
    try:
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                raise SystemExit(f"{world} ranks did not end in {TIMEOUT[device]} s")
    finally:
        for process in context.processes:
            process.kill()
