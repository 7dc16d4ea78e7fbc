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
from nvfp4sweep import triton_kernels as kernels

FLAGS = {"ROWS": True, "FLAT": True, "VECTOR": 8, "BLOCK_SIZE": 16, "CANDIDATES": 10, "T": 128,
         "SCREENED": True, "HAS_CODE": True, "SIZE": 4096, "HAS_PARTIALS": True, "HAS_AMAX": False,
         "PARTIALS": 256}
POINTERS = {"tables": "fp32", "codes": "u8", "amax": "fp32", "code_out": "u8", "partials": "fp32",
            "given_amax": "fp32", "errors": "fp32", "packed": "u8"}
FLOATS = {"relative_margin", "absolute_margin", "lower", "upper"}

def build(kernel, weight, target, **flags):
    constants = {n: {**FLAGS, **flags}[n] for n in kernel.arg_names if n in FLAGS}
    pointers = {**POINTERS, "weight": weight, **({"codes": "fp32"} if kernel is kernels.screen else {})}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = "*" + pointers[name]
        else:
            signature[name] = "fp32" if name in FLOATS else "i64" if name == "stride_matrix" else "i32"
    indices = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
               if n in pointers or n.startswith("stride_") or n in ("n_blocks", "n_elements")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=indices, attrs=aligned)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]

target = GPUTarget("cuda", int(sys.argv[1]), 32)
for weight in ("bf16", "fp32", "fp16"):
    vector = 4 if weight == "fp32" else 8
    ptx = build(kernels.screen, weight, target, VECTOR=vector)
    assert "ld.global.v4" in ptx  # 16 bytes a load
    pairs = ptx.count("fma.rn.f32x2")  # from compute capability 10.0 on
    assert ptx.count("fma.rn.f32 ") + 2 * pairs == 4 * 16 * 10  # four an element and candidate
    assert ".shared" not in ptx  # a block stays within its thread
build(kernels.screen, "fp32", target, VECTOR=4, BLOCK_SIZE=32, CANDIDATES=12)
build(kernels.screen, "bf16", target, ROWS=False, FLAT=False)
for kernel in (kernels.settle, kernels.residual, kernels.pack, kernels.largest, kernels.tabulate):
    ptx = build(kernel, "bf16", target)
    assert ".ftz.f64" not in ptx
build(kernels.settle, "bf16", target, SCREENED=False, HAS_CODE=False)
build(kernels.tabulate, "bf16", target, HAS_PARTIALS=False, HAS_AMAX=True)
print("compiled")
"""


@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_kernels_compile(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", PROGRAM, capability],
                            capture_output=True, text=True)  # fmt: skip
    assert result.stdout == "compiled\n", result.stderr[-3000:]
