"""Tensors in, NumPy views out, and the choice of an engine for where a tensor lives."""

from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from nvfp4sweep import problem as problems

_WEIGHT_DTYPES = {getattr(torch, name) for name in problems.WEIGHT_DTYPES}

_SERVED: dict[str, tuple[str, ...]] = {"cuda": ("triton", "oracle"), "cpu": ("cpu", "oracle")}


def as_weight(weight: Any, name: str = "weight") -> Tensor:
    """The tensor without its autograd history, or the exception that says what is wrong with it."""
    if not isinstance(weight, Tensor):
        raise problems.foreign_array_error(name, weight, "a PyTorch tensor")
    if weight.layout is not torch.strided:
        raise TypeError(f"{name} has layout {weight.layout}: it must be dense (torch.strided)")
    if weight.dtype not in _WEIGHT_DTYPES:
        problems.check_dtype(name, str(weight.dtype).removeprefix("torch."))
    if not (weight.is_cuda or weight.is_cpu):
        raise ValueError(f"{name} is on device {weight.device}: it must be on the CPU or a CUDA device")
    plain: Tensor = weight.detach().resolve_neg() if weight.requires_grad or weight.is_neg() else weight
    return plain.float() if plain.dtype is torch.float64 else plain


def choose_engine(weight: Tensor, implementation: str | None) -> str:
    place = "cuda" if weight.is_cuda else "cpu"
    served = _SERVED[place]
    if place == "cpu" and interpreting():
        served = (*served, "triton")
    return problems.choose_engine(
        implementation, default=served[0], served=served, where=f"a tensor on {place}"
    )


def interpreting() -> bool:
    """Whether TRITON_INTERPRET makes Triton run its kernels on the CPU."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The values of a tensor; for one on the CPU its own memory, strides included."""
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:  # NumPy knows it through ml_dtypes only
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_numpy_if_tensor(values: Any) -> Any:
    """A tensor's values, which waits for one on a device; anything else as it is."""
    return to_numpy(values) if isinstance(values, Tensor) else values


def check_same_device(name: str, values: Any, weight: Tensor) -> None:
    if isinstance(values, Tensor) and values.device != weight.device:
        raise ValueError(
            f"{name} is on device {values.device} and weight on {weight.device}: move one of them"
        )
