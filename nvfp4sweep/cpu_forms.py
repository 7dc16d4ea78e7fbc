"""Quadratic forms of a tile of residuals with one 16x16 matrix, as straight-line vector code.

Numba's loops would leave each residual in memory, or each of the 136 coefficients in a register of its
own: they take 1.4 times as long and more. Here the residuals of 16 lanes stay in registers.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from nvfp4sweep.formats import BLOCK_SIZE

#: float32 lanes that are taken at a time: a vector register of AVX-512. Others take them in parts.
VECTOR = 16
#: Coefficients of a form: H[i, i], and 2 H[i, j] for j < i, row by row.
COEFFICIENTS = BLOCK_SIZE * (BLOCK_SIZE + 1) // 2

_VECTOR_TYPE = ir.VectorType(ir.FloatType(), VECTOR)
_UNDEFINED = ir.Constant(_VECTOR_TYPE, ir.Undefined)
_FIRST_LANE = ir.Constant(ir.VectorType(ir.IntType(32), VECTOR), [0] * VECTOR)
_FMA = f"llvm.fma.v{VECTOR}f32"


@intrinsic
def quadratic_forms(typingctx, residuals, coefficients, width, start, forms, form):
    """forms.flat[form + k] = r^T H r for k < VECTOR, where r[i] = residuals.flat[start + i width + k].

    Sums over j < i, then over i, each in order, by fma.
    """

    def codegen(context, builder, signature, arguments):
        def data(argument):
            return context.make_array(signature.args[argument])(context, builder, arguments[argument]).data

        def vector_at(array, index):
            return builder.bitcast(builder.gep(array, [index]), _VECTOR_TYPE.as_pointer())

        def broadcast(index):
            scalar = builder.load(builder.gep(data(1), [ir.Constant(ir.IntType(64), index)]))
            vector = builder.insert_element(_UNDEFINED, scalar, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(vector, _UNDEFINED, _FIRST_LANE)

        fma = builder.module.globals.get(_FMA)
        if fma is None:
            fma = ir.Function(builder.module, ir.FunctionType(_VECTOR_TYPE, [_VECTOR_TYPE] * 3), _FMA)

        def add_product(a, b, total):
            return builder.fmul(a, b) if total is None else builder.call(fma, [a, b, total])

        index, residual = arguments[3], []
        for _ in range(BLOCK_SIZE):
            residual.append(builder.load(vector_at(data(0), index)))
            residual[-1].align = 4
            index = builder.add(index, arguments[2])
        total, coefficient = None, 0
        for i in range(BLOCK_SIZE):
            row = None
            for j in range(i + 1):
                row = add_product(broadcast(coefficient), residual[j], row)
                coefficient += 1
            total = add_product(row, residual[i], total)
        builder.store(total, vector_at(data(4), arguments[5])).align = 4
        return context.get_dummy_value()

    return types.void(residuals, coefficients, types.intp, types.intp, forms, types.intp), codegen
