"""Every CUDA kernel compiles, without a GPU, for the architectures that people have."""

import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: with TRITON_INTERPRET set the kernels are not compilable functions.
PROGRAM = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nvfp4sweep.triton_kernels import sweep
from nvfp4sweep.triton_tables import largest, tabulate

CONSTANTS = {"ROWS": 1, "VECTOR": 8, "INNER": False, "BLOCK_SIZE": 16, "CANDIDATES": 9, "BELOW": 1, "T": 32,
             "OVERLAP": False, "DENSE": True, "SIZE": 1024}
POINTERS = {"tables": "fp32", "code": "u8", "amax": "fp32", "partials": "fp32", "given_amax": "fp32",
            "error": "fp32", "packed": "u8", "global_amax": "fp32", "global_scale": "fp32",
            "checked": "fp32"}
FLOATS = {"relative_margin", "absolute_margin", "lowest_ratio", "lower", "upper"}

def build(kernel, weight, without=(), partials="fp32", **constants):
    types = {**POINTERS, "weight": weight, "partials": partials}
    chosen = {**CONSTANTS, **constants, **dict.fromkeys(without)}
    signature = {}
    for name in kernel.arg_names:
        if name in chosen:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = "*" + types[name]
        else:
            annotated = kernel.params[kernel.arg_names.index(name)].annotation_type
            signature[name] = "fp32" if name in FLOATS else annotated or "i32"
    indices = {(kernel.arg_names.index(n),): v for n, v in chosen.items() if n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
               if signature[n].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=indices, attrs=aligned)
    options = {"enable_fp_fusion": False, "num_warps": chosen["T"] // 32 if kernel is sweep else 8}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]

capability = int(sys.argv[1])
target = GPUTarget("cuda", capability, 32)
overlap = {"OVERLAP": True} if capability >= 90 else {}
outputs = ("amax", "code", "error", "packed")
full = capability == 90  # one architecture for every variant, the others for what they may lack
for weight in ("bf16", "fp32", "fp16") if full else ("bf16",):
    ptx = build(sweep, weight, outputs[1:], VECTOR=4 if weight == "fp32" else 8, **overlap)
    assert "ld.global.v4" in ptx  # 16 bytes a load
    assert ".shared" not in ptx  # a block stays within its thread
    assert ".local" not in ptx
    pairs = ptx.count("fma.rn.f32x2")  # from compute capability 10.0 on
    # Three an element and candidate, of which the 9 and the one below them are built twice; the first
    # of each of a candidate's two sums may be a product.
    assert abs(ptx.count("fma.rn.f32 ") + 2 * pairs - 3 * 16 * 10 * 2) <= 2 * 2 * 10 * 2
build(sweep, "bf16", (), VECTOR=1, ROWS=2, INNER=True)
if full:
    build(sweep, "fp32", outputs[1:], VECTOR=4, BLOCK_SIZE=32, CANDIDATES=12, BELOW=0)
    build(sweep, "bf16", outputs[2:], VECTOR=1, ROWS=0, INNER=True)
    build(sweep, "bf16", ("amax",), VECTOR=1, BLOCK_SIZE=6, CANDIDATES=0, BELOW=0)
    build(largest, "bf16", DENSE=False)
    build(tabulate, "bf16", ("checked", "global_amax", "global_scale"), SIZE=0)
    build(tabulate, "bf16", ("given_amax", "global_scale", "tables"))
    build(tabulate, "bf16", ("given_amax",), partials="bf16")
build(largest, "bf16", **overlap)
assert ".ftz.f64" not in build(tabulate, "bf16", ("given_amax",), **overlap)
print("compiled")
"""


@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_kernels_compile(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", PROGRAM, capability],
                            capture_output=True, text=True)  # fmt: skip
    assert result.stdout == "compiled\n", result.stderr[-3000:]
