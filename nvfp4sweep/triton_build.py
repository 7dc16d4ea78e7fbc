"""A Triton kernel with its arguments: launched by Triton, or built for another launcher."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from nvfp4sweep.triton_arithmetic import INTERPRETED

# Triton writes for its own assembler; another launcher may have an older one: this is CUDA 12.7's.
_PTX_VERSION = 86

Buffer = tuple[str, tuple[int, ...], str]  # name, shape, dtype


class Built(NamedTuple):
    """A kernel compiled for an architecture. Its parameters are the buffers of a Launch, then numbers."""

    name: str
    ptx: str
    warps: int
    shared_bytes: int
    numbers: tuple[tuple[str, int | float], ...]  # Triton's name of the type, and the value


class Launch:
    """A kernel and all its arguments but the buffers, which come first: those read, then those written.

    A buffer that is not wanted has no name. `allocates` are those that this launch is the first to use.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        reads: tuple[str | None, ...],
        writes: tuple[str | None, ...],
        allocates: tuple[Buffer, ...],
        numbers: tuple[int | float, ...],
        constants: tuple[Any, ...],
        warps: int,
        **options: Any,
    ):
        self.grid = (*grid, 1)
        self.reads = reads
        self.writes = writes
        self.buffers = (*reads, *writes)
        self.allocates = allocates
        self._kernel = kernel
        self._numbers = numbers
        self._constants = constants
        self._rest = (*numbers, *constants)
        # Fused multiply-adds are written out where they are meant: Triton's default changes in 3.10.
        self._options = {"num_warps": warps, "enable_fp_fusion": False, **options}
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *buffers: Any) -> None:
        """Triton's own way to a compiled kernel takes longer than a small sweep. What it specializes a
        kernel by is all in the key, or in this object; the numbers are exempt (do_not_specialize)."""
        if INTERPRETED.value:
            self._kernel[self.grid](*buffers, *self._rest, num_warps=self._options["num_warps"])
            return
        active = driver.active
        device = active.get_current_device()
        addresses = [None if buffer is None else buffer.data_ptr() for buffer in buffers]
        key = (device, buffers[0].dtype, *[a and a % 16 for a in addresses])
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._kernel[self.grid](*buffers, *self._rest, **self._options)
            return
        stream = active.get_current_stream(device)
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if enter.calls or leave.calls:  # a profiler's
            compiled[self.grid](*addresses, *self._rest, stream=stream)
        else:
            compiled.run(
                *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
                *addresses, *self._rest,
            )  # fmt: skip

    def build(self, capability: int, elements: Sequence[str | None]) -> Built:
        """Compile without a device, for buffers aligned to 16 bytes.

        Args:
            capability: the architecture, as 90 for 9.0.
            elements: Triton's name of each buffer's dtype ("bf16", "fp32", "u8"), None for one not wanted.
        """
        names = self._kernel.arg_names
        numbers = tuple(zip(map(self._type_of, self._numbered()), self._numbers, strict=True))
        pointers = {n: f"*{e}" for n, e in zip(names, elements, strict=False) if e is not None}
        typed = {n: t for n, (t, _) in zip(self._numbered(), numbers, strict=True)}
        signature = {name: pointers.get(name, typed.get(name, "constexpr")) for name in names}
        unwanted = {n: None for n, e in zip(names, elements, strict=False) if e is None}
        constants = unwanted | dict(zip(names[-len(self._constants) :], self._constants, strict=True))
        source = ASTSource(
            fn=self._kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
        )
        options = {name: value for name, value in self._options.items() if name != "launch_pdl"}
        options["ptx_version"] = _PTX_VERSION
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        metadata = compiled.metadata
        ptx = _without_line_numbers(compiled.asm["ptx"])
        return Built(metadata.name, ptx, metadata.num_warps, metadata.shared, numbers)

    def _numbered(self) -> list[str]:
        start = len(self.buffers)
        return self._kernel.arg_names[start : start + len(self._numbers)]  # type: ignore[no-any-return]

    def _type_of(self, name: str) -> str:
        index = self._kernel.arg_names.index(name)
        value = self._numbers[index - len(self.buffers)]
        if isinstance(value, float):
            return "fp32"
        annotated = self._kernel.params[index].annotation_type
        return annotated or ("i32" if -(2**31) <= value < 2**31 else "i64")


def _without_line_numbers(ptx: str) -> str:
    """Less than half of it is code, and a launcher may carry and compare the text at every call."""
    code = ptx.partition("\t.section\t.debug")[0]
    lines = (line.partition("//")[0].strip() for line in code.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith((".loc", ".file")))
