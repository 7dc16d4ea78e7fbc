"""Tensors and what the tests of their second moments expect."""

from typing import Any

import torch

GENERATOR = torch.Generator().manual_seed(0)


def gaussian(*shape: int) -> Any:
    return torch.randn(shape, generator=GENERATOR)


def reference(x: Any) -> Any:
    """The mean of x_b x_b^T in float64: [K / 16, 16, 16] of [..., K]."""
    x = x.double().reshape(-1, x.shape[-1] // 16, 16)
    return torch.einsum("tbi,tbj->bij", x, x) / len(x)


def close(actual: Any, x: Any, rtol: float = 1e-6) -> None:
    expected = reference(x)
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert torch.equal(actual, actual.mT)
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()
