"""What quantize returns."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4sweep import formats
from nvfp4sweep_jax import _arithmetic as exact

_DATA = ["packed", "scale", "global_scale"]


@partial(jax.tree_util.register_dataclass, data_fields=_DATA, meta_fields=["axis", "block_size"])
@dataclass(frozen=True)
class QuantizedTensor:
    """An NVFP4 tensor: value = E2M1 value * (block scale * global scale). A pytree.

    Attributes:
        packed: uint8, the weight's shape with `axis` halved. The low nibble is the even index.
        scale: float8_e4m3fn, the weight's shape with `axis` divided by `block_size`.
        global_scale: float32, one for each matrix (shape of the batch axes): global amax / 2688.
        axis: the axis along which blocks run, >= 0.
        block_size: elements in a block.
    """

    packed: jax.Array
    scale: jax.Array
    global_scale: jax.Array
    axis: int
    block_size: int

    def unpack(self) -> jax.Array:
        """float4_e2m1fn of the weight's shape, as jax.nn.scaled_matmul and qwix take it."""
        elements: jax.Array = _unpack(self.packed, self.axis)
        return elements

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The weight that a runtime computes with: products in float32, then rounded to `dtype`."""
        weight: jax.Array = _dequantize(self, jnp.dtype(dtype))
        return weight


@partial(jax.jit, static_argnames="axis")
def _unpack(packed: jax.Array, axis: int) -> jax.Array:
    nibble = _nibbles(packed, axis).reshape(*packed.shape[:axis], -1, *packed.shape[axis + 1 :])
    return lax.bitcast_convert_type(nibble.astype(jnp.uint4), jnp.float4_e2m1fn)


def _nibbles(packed: jax.Array, axis: int) -> jax.Array:
    """uint8 [..., bytes, 2, ...]: the even and the odd element of each byte."""
    return jnp.stack([packed & 15, packed >> 4], axis + 1)


@partial(jax.jit, static_argnames="dtype")
def _dequantize(tensor: QuantizedTensor, dtype: Any) -> jax.Array:
    axis, pairs = tensor.axis, tensor.block_size // 2
    shape = tensor.packed.shape
    blocks = tensor.packed.reshape(*shape[:axis], -1, pairs, *shape[axis + 1 :])
    nibble = _nibbles(blocks, axis + 1).astype(jnp.int32)
    magnitude = nibble & ~formats.E2M1_SIGN_BIT
    padding = (1,) * (tensor.scale.ndim - tensor.global_scale.ndim)
    global_bits = exact.float32_bits(tensor.global_scale.reshape(tensor.global_scale.shape + padding))
    code = lax.bitcast_convert_type(tensor.scale, jnp.uint8).astype(jnp.int32)
    with jax.enable_x64(True):
        scale = exact.round_to_float32(exact.e4m3_float64(code) * exact.widen(global_bits))
        product = exact.e2m1_float64(magnitude) * jnp.expand_dims(scale, (axis + 1, axis + 2))
        bits = exact.narrow_bits(exact.round_to_float32(product))
    values = exact.from_bits(jnp.where(nibble == magnitude, bits, bits | ~exact.MAGNITUDE_MASK))
    return values.reshape(*shape[:axis], -1, *shape[axis + 1 :]).astype(dtype)
