"""Every CUDA kernel compiles, without a GPU, for the architectures that people have."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

# In a process of its own: with TRITON_INTERPRET set the kernels are not compilable functions.
PROGRAM = """
import math, sys
from nvfp4sweep.problem import make_problem
from nvfp4sweep.triton_launch import plan

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
ELEMENTS = {"code": "u8", "packed": "u8", "starts": "i64"}
OUTPUTS = ("amax", "code", "error", "packed", "global_amax", "global_scale")
build_of = sys.argv[1]
capability = int(build_of.partition("-")[0])

def contiguous(shape):
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))

def build(
    shape, dtype="bf16", outputs=("amax",), strides=None, given=False, checked=False, scattered=False,
    importance=None, hessians=0, **options,
):
    # The PTX of all kernels of a call, by kernel. An importance is given by its strides.
    problem = make_problem(shape, importance=importance, hessian=hessians or None, **options)
    launches = plan(
        problem, outputs, strides or contiguous(problem.view_shape), SIZES[dtype], capability,
        given=given, checked=checked, scattered=scattered,
        importance_strides=importance, hessian_matrices=hessians,
    )
    elements = {"weight": dtype, **ELEMENTS}
    found = {}
    for launch in launches:
        names = [name and elements.get(name, "fp32") for name in launch.buffers]
        built = launch.build(capability, names)
        assert built.ptx.count(".param .u64 .ptr") >= sum(name is not None for name in names)
        found[built.name] = built
    return {name: built.ptx for name, built in found.items()}

def within_a_thread(ptx):
    # 16 bytes a load, and a block stays within its thread.
    assert "ld.global.v4" in ptx and ".shared" not in ptx, "loads"

ROWS = (64, 4096)
SHARED = (0, 0, 1, 0)  # the strides of one importance an input
FEW = ("code", "global_scale")

def plain(dtype):
    built = build(ROWS, dtype)
    assert list(built) == ["largest", "tabulate", "sweep"], list(built)
    ptx = built["sweep"]
    within_a_thread(ptx)
    assert ".local" not in ptx  # nothing spills
    pairs = ptx.count("fma.rn.f32x2")  # from compute capability 10.0 on
    # Three an element and candidate, of which the 9 and the one below them are built twice; the first
    # of each of a candidate's two sums may be a product.
    assert abs(ptx.count("fma.rn.f32 ") + 2 * pairs - 3 * 16 * 10 * 2) <= 2 * 2 * 10 * 2
    assert ".ftz.f64" not in built["tabulate"]

def importances(dtype):
    # Those that rows share, so that a program loads them once.
    ptx = build(ROWS, dtype, importance=SHARED, given=True)["sweep_importance"]
    within_a_thread(ptx)
    assert "fma.rn.f64" in ptx or "mul.rn.f64" in ptx  # what float32 cannot separate

def hessians(shape, **options):
    built = build(shape, **options)
    assert list(built) == ["largest", "prepare", "tabulate", "sweep_hessian"], list(built)
    assert "ld.global.v" in built["sweep_hessian"]
    assert ".ftz.f64" not in "".join(built.values())

# A sweep takes up to 20 seconds: not each dtype and option for each architecture.
if build_of == "80":
    plain("fp32")
    importances("fp32")
    hessians((128, 64), hessians=1)
elif build_of == "90-plain":
    plain("bf16")
    few = build((3, 96), outputs=OUTPUTS, checked=True, axis=0, block_size=3)
    assert set(few) == {"tabulate", "sweep"}
    build((4, 64, 96), outputs=OUTPUTS, batch_dims=1, axis=1, given=True)  # stacked
    build((4, 64), "fp32", FEW, block_size=32)
    build((5, 12), "fp16", OUTPUTS, block_size=6, strides=(0, 2 * 12 + 3, 2, 0))  # odd strides
    assert list(build(ROWS, outputs=("global_amax",), strides=(0, 5000, 1, 0))) == ["largest", "tabulate"]
elif build_of == "90-weighted":
    importances("bf16")
    build((4096, 64), axis=0, importance=SHARED, outputs=FEW, checked=True)
    build((64, 96), importance=contiguous((1, 64, 96, 1)), outputs=OUTPUTS)
    build((5, 12), outputs=FEW, block_size=6, importance=SHARED)
    build((4, 64), outputs=FEW, block_size=32, importance=SHARED)
    stacked = dict(batch_dims=1, axis=1, hessians=4, checked=True)
    hessians((4, 64, 96), dtype="fp32", outputs=("code", "error", "global_scale"), **stacked)
else:
    plain("bf16")
    importances("bf16")
    within_a_thread(build((4, 64, 4096), batch_dims=1, scattered=True)["sweep"])
print("compiled")
"""


BUILDS = ("80", "90-plain", "90-weighted", "100")


@pytest.fixture(scope="module")
def compilers() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """One process each, at the same time: each takes half a minute of one core or more."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = {
        build: subprocess.Popen(
            [sys.executable, "-W", "error::SyntaxWarning", "-c", PROGRAM, build],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for build in BUILDS
    }  # fmt: skip
    yield processes
    for process in processes.values():
        if process.returncode is None:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("build", BUILDS)
def test_kernels_compile(build: str, compilers: dict[str, subprocess.Popen[str]]) -> None:
    output, errors = compilers[build].communicate()
    assert output == "compiled\n", errors[-3000:]
