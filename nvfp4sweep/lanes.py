"""What Numba's kernels need beyond Python for a loop over lanes to become vector instructions."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.extending import intrinsic


def _digest_of_sources() -> str:
    """Of all files that kernels are made of."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for pattern in ("cpu_*.py", "formats.py", "lanes.py", "window.py"):
        for path in sorted(folder.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


_SOURCES = _digest_of_sources()


def jit(*arguments: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit with a cache on disk that an edit of any kernel's source makes void.

    Numba itself looks at the file of the function only, not at those that it calls: so what names the
    function there has a digest of them all.
    """
    compiled = numba.njit(*arguments, nogil=True, cache=bool(arguments), error_model="numpy", **options)

    def decorate(function: Callable[..., Any]) -> Any:
        function.__qualname__ += f"_{_SOURCES}"
        return compiled(function)

    return decorate


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c rounded once, whatever the compiler's flags."""

    def codegen(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def at(typingctx, array, index):
    """array.flat[index] of a C-contiguous array: unlike array[...] it has no negative indices.

    With them the compiler cannot see consecutive lanes, and the sweep takes four times as long.
    """

    def codegen(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load(builder.gep(data, [arguments[1]]))

    return array.dtype(array, types.intp), codegen


@intrinsic
def put(typingctx, array, index, value):
    """array.flat[index] = value, as at reads."""

    def codegen(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        builder.store(arguments[2], builder.gep(data, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), codegen


@intrinsic
def bits_of(typingctx, value):
    """The bits of a float32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), codegen


@intrinsic
def select(typingctx, condition, a, b):
    """a if condition else b, without the branch that keeps a loop from being vectorised."""

    def codegen(context, builder, signature, arguments):
        return builder.select(*arguments)

    return a(types.boolean, a, a), codegen


@jit(inline="always")
def smaller(a, b):
    return select(a < b, a, b)


@jit(inline="always")
def larger(a, b):
    return select(a > b, a, b)
