"""torch.distributed: process groups and DTensors. What ranks must answer is in distributed_checks.py."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")
dist = pytest.importorskip("torch.distributed")
if not dist.is_available():
    pytest.skip("PyTorch is built without torch.distributed", allow_module_level=True)

import nvfp4sweep_torch as nt  # noqa: E402

CHECKS = Path(__file__).with_name("distributed_checks.py")


PARTS_ON_CUDA = 10


def run_checks(device: str, world: int, store: Path, part: int = 0, parts: int = 1) -> None:
    command = [sys.executable, str(CHECKS), device, str(world), str(store), str(part), str(parts)]
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process with more is not forked
    environment = {**os.environ, **one_thread}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(process.stdout)
    assert process.returncode == 0, process.stderr


def test_ranks_on_the_cpu(tmp_path: Path) -> None:
    run_checks("cpu", 8, tmp_path / "store")


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(PARTS_ON_CUDA))
def test_ranks_on_cuda(part: int, tmp_path: Path) -> None:
    devices = torch.cuda.device_count()
    if devices < 2:
        pytest.skip("one CUDA device")
    run_checks("cuda", 1 << (devices.bit_length() - 1), tmp_path / "store", part, PARTS_ON_CUDA)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[object]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_compiled_code_leaves_the_graph(group: object) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    sharded = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)])
    expected = nt.calibrate(weight)

    def grouped(w):  # type: ignore[no-untyped-def]
        return nt.calibrate(w * 1, process_group=group)

    for function, argument in ((grouped, weight), (nt.calibrate, sharded)):
        torch._dynamo.reset()  # else what was compiled for one serves the other
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match="process_group and DTensors are served outside"
        ):
            torch.compile(function, backend="eager", fullgraph=True)(argument)
        torch._dynamo.reset()
        found = torch.compile(function, backend="eager")(argument)
        assert torch.equal(getattr(found, "to_local", lambda found=found: found)(), expected)


def test_dtensors_are_not_loaded() -> None:
    program = """
import sys, torch, nvfp4sweep_torch
nvfp4sweep_torch.quantize(torch.ones(2, 16)).dequantize()
assert "torch.distributed.tensor" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
