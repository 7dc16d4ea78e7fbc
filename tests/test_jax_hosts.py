"""Several JAX processes: each has a part of a weight, and the result is that of one process."""

import os
import socket
import subprocess
import sys

import pytest

pytest.importorskip("jax", reason="JAX is not installed")

PROGRAM = """
import sys
import jax, numpy as np, nvfp4sweep, nvfp4sweep_jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

rank = int(sys.argv[1])
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, rank)
assert jax.process_count() == 2 and len(jax.local_devices()) == 2 and len(jax.devices()) == 4
w = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
w[3, 5], w[31, 250] = 7, -9  # the largest of each process
small = {"block_size": 4}  # compiles in half the time
expected, packed = nvfp4sweep.sweep(w, **small), nvfp4sweep.quantize(w, **small).packed
mesh = jax.make_mesh((2, 2), ("host", "device"), axis_types=(AxisType.Auto,) * 2)

def same(found, whole):
    assert not found.is_fully_addressable
    for shard in found.addressable_shards:
        assert np.array_equal(shard.data, whole[shard.index])

for spec in (P("host", "device"), P(None, ("host", "device"))):
    x = jax.make_array_from_callback(w.shape, NamedSharding(mesh, spec), lambda index: w[index])
    found = nvfp4sweep_jax.sweep(x, **small)
    same(found.amax, expected.amax)
    same(found.code, expected.code)
    same(found.error, expected.error)
    assert np.asarray(found.global_amax.addressable_shards[0].data) == 9
same(jax.jit(lambda x: nvfp4sweep_jax.quantize(x, **small))(x).packed, packed)
jax.distributed.shutdown()
print("done", rank)
"""


def test_two_processes() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), port],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for rank, (process, text) in enumerate(zip(processes, printed, strict=True)):
        assert process.returncode == 0, text
        assert f"done {rank}" in text
