"""No kernel touches memory outside its buffers: each lies against a page that may not be read."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

# In a process of its own, which a stray access ends.
PROGRAM = """
import ctypes, math, mmap, os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(sys.argv[2])
import torch
import triton_interpreter
from nvfp4sweep import triton_launch
from nvfp4sweep.problem import make_problem

triton_interpreter.hasten()
PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
maps = []

def guarded(elements, dtype, at_end):
    size = max(1, math.prod(elements)) * dtype.itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    maps.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(start + page * PAGE), PAGE, 0) == 0
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    values = torch.frombuffer(memory, dtype=dtype, count=math.prod(elements), offset=offset)
    return values.reshape(elements)

def objective_of(name, problem, at_end):
    # One importance an input, by strides of 0, or one Hessian a block of inputs.
    length = problem.view_shape[2]
    if name == "importance":
        importance = guarded((1, 1, length, 1), torch.float32, at_end)
        return importance.copy_(torch.arange(length).reshape(importance.shape) % 7).expand(problem.view_shape)
    hessian = guarded((length // 16, 16, 16), torch.float32, at_end)
    return hessian.copy_(torch.eye(16) + 0.5)

def run(shape, at_end, scale, objective=None, **options):
    problem = make_problem(shape, **options, **({objective: True} if objective else {}))
    given = {objective: objective_of(objective, problem, at_end)} if objective else {}
    weight = guarded(shape, torch.bfloat16, at_end)
    weight.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale)
    view = weight.reshape(problem.view_shape)
    outputs = ("amax", "code", "error", "packed", "global_amax", "global_scale")
    found = triton_launch.run(
        view, problem, outputs, lambda shape, dtype: guarded(shape, getattr(torch, dtype), at_end),
        checked=guarded((len(view), triton_launch.CHECKED), torch.float32, at_end), **given,
    )
    assert torch.equal(found["global_amax"].flatten(), view.abs().amax(dim=(1, 2, 3)).float())

if sys.argv[1] == "stray":  # the guard works
    ctypes.c_float.from_address(guarded((PAGE // 4,), torch.float32, True).data_ptr() + PAGE).value
run((3, 80), True, 0.0)
run((5, 6), True, 0.0, block_size=6)
for at_end in (False, True):
    run((3, 80), at_end, 1.0)
    run((86, 48), at_end, 1.0)  # more than tabulate searches itself
    run((2, 1, 48), at_end, 1.0, batch_dims=1)
    run((48, 5), at_end, 1.0, axis=0)
    run((2, 64), at_end, 1.0, block_size=32)
    run((5, 6), at_end, 1.0, block_size=6)
    run((3, 80), at_end, 1.0, "importance")
    run((1, 512), at_end, 1.0, "importance")  # a whole tile
    run((16, 5), at_end, 1.0, "importance", axis=0)
    run((2, 1, 48), at_end, 1.0, "importance", batch_dims=1)
    run((5, 6), at_end, 1.0, "importance", block_size=6)
    run((3, 32), at_end, 1.0, "hessian")
    run((16, 5), at_end, 1.0, "hessian", axis=0)
print("within bounds", flush=True)
os._exit(0)  # the mappings may not be closed while tensors point into them
"""


@pytest.mark.skipif(sys.platform != "linux", reason="guards pages by mprotect")
@pytest.mark.parametrize(("argument", "output"), [("run", "within bounds\n"), ("stray", "")])
def test_no_access_out_of_bounds(argument: str, output: str) -> None:
    command = [sys.executable, "-c", PROGRAM, argument, str(Path(__file__).parent)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == output, result.stderr[-3000:]
