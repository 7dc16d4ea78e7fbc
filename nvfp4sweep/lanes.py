"""What Numba's kernels need beyond Python for a loop over lanes to become vector instructions."""

from collections.abc import Callable
from typing import Any

import numba
from numba import types
from numba.extending import intrinsic


def jit(*arguments: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    return numba.njit(*arguments, nogil=True, cache=True, error_model="numpy", **options)


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
