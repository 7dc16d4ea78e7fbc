"""HessianAccumulator for PyTorch, against float64."""

import copy
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch_helpers import close, gaussian  # noqa: E402

from nvfp4sweep_torch import HessianAccumulator, _hessian  # noqa: E402

# --- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("leading", [(), (7,), (3, 5), (2, 3, 4)])
def test_mean_over_tokens(dtype: Any, leading: tuple[int, ...]) -> None:
    x = gaussian(*leading, 64).to(dtype)
    accumulator = HessianAccumulator((8, 64))
    assert accumulator.add(x) is accumulator
    close(accumulator.hessian(), x.float())
    assert accumulator.tokens == int(np.prod(leading))
    assert accumulator.importance().shape == (64,)
    assert torch.equal(accumulator.importance(), accumulator.hessian().diagonal(dim1=1, dim2=2).flatten())


def test_batches_chunks_and_strides_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(50, 96)
    whole = HessianAccumulator((8, 96)).add(x)
    parts = HessianAccumulator((8, 96))
    for part in (x[:1], x[1:20], x[20:20], x[20:]):
        parts.add(part)
    close(parts.hessian(), x)
    close(HessianAccumulator((8, 96)).add(x.t().contiguous().t()).hessian(), x)
    for elements in (1, 96 * 7, 96 * 50):
        monkeypatch.setattr(_hessian, "_CHUNK", {"cpu": elements})
        assert torch.equal(HessianAccumulator((8, 96)).add(x).total, whole.total)


def test_no_more_memory_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wider than the batch has at most the elements of a chunk."""
    monkeypatch.setattr(_hessian, "_CHUNK", {"cpu": 640})
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                sizes.append(result.numel())
            return result

    x = gaussian(1000, 64)
    with Sizes():
        HessianAccumulator((8, 64)).add(x)
    assert max(sizes) == max(640, 4 * 16 * 16)


def test_symmetric_whatever_the_matmul_gives() -> None:
    accumulator = HessianAccumulator((8, 64)).add(gaussian(7, 64))
    accumulator.total += 1e-3 * gaussian(4, 16, 16)
    hessian = accumulator.hessian()
    assert torch.equal(hessian, hessian.mT)
    torch.testing.assert_close(hessian, accumulator.total / 7, atol=1e-2, rtol=0)


def test_many_small_batches_keep_their_precision() -> None:
    x = gaussian(4000, 16)
    accumulator = HessianAccumulator((8, 16))
    for token in x:
        accumulator.add(token)
    close(accumulator.hessian(), x, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_matmul_precision_do_not_matter(dtype: Any) -> None:
    x = gaussian(32, 64)
    expected = HessianAccumulator((8, 64)).add(x).total
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype):
            assert (x @ x.t()).dtype == dtype  # it is at work
            assert torch.equal(HessianAccumulator((8, 64)).add(x).total, expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_is_not_affected_by_tf32(dtype: Any) -> None:
    x = gaussian(5000, 256).to(dtype)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cuda", torch.float16):
            accumulator = HessianAccumulator((8, 256), device="cuda").add(x.cuda())
    finally:
        torch.set_float32_matmul_precision(before)
    close(accumulator.hessian().cpu(), x.float(), rtol=3e-7)
    close(HessianAccumulator((8, 256)).add(x.cuda()).hessian(), x.float(), rtol=3e-7)


def test_no_gradient_and_no_inference_tensor() -> None:
    x = gaussian(9, 32).requires_grad_()
    accumulator = HessianAccumulator((8, 32)).add(x)
    assert not accumulator.total.requires_grad
    assert not accumulator.hessian().requires_grad
    with torch.inference_mode():
        inside = HessianAccumulator((8, 32)).add(x)
        accumulator.add(x * 2)
    inside.add(x * 2)  # not allowed where the sums are tensors of the inference mode
    inside.total.add_(0)
    assert torch.equal(inside.total, accumulator.total)


# --- weights of any layout ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis", "batch_dims", "expected"),
    [
        ((8, 32), -1, 0, (32,)),
        ((32, 8), 0, 0, (32, 1)),
        ((32,), 0, 0, (32,)),
        ((4, 8, 32), 2, 0, (32,)),
        ((4, 32, 8), 1, 0, (32, 1)),
        ((4, 8, 32), -1, 1, (4, 1, 32)),
        ((4, 32, 8), 1, 1, (4, 32, 1)),
        ((2, 4, 8, 32), 3, 2, (2, 4, 1, 32)),
        ((2, 4, 8, 32), 3, 1, (2, 1, 1, 32)),
    ],
)
def test_importance_broadcasts_to_the_weight(
    shape: tuple[int, ...], axis: int, batch_dims: int, expected: tuple[int, ...]
) -> None:
    accumulator = HessianAccumulator(shape, axis=axis, batch_dims=batch_dims)
    x = gaussian(*shape[:batch_dims], 5, 32)
    importance = accumulator.add(x).importance()
    assert importance.shape == expected
    assert torch.broadcast_shapes(shape, expected) == shape
    squares = x.double().square().mean(-2)
    torch.testing.assert_close(importance.flatten(), squares.flatten().float())
    assert accumulator.hessian().shape == (*shape[:batch_dims], 2, 16, 16)


def test_experts_one_at_a_time_and_all_together() -> None:
    x = gaussian(3, 7, 32)
    together = HessianAccumulator((3, 8, 32), batch_dims=1).add(x)
    apart = HessianAccumulator((3, 8, 32), batch_dims=1)
    for expert in (2, 0, 1):
        apart.add(x[expert, :4], expert).add(x[expert, 4:], expert=torch.tensor(expert))
    assert apart.tokens.tolist() == together.tokens.tolist() == [7, 7, 7]
    for expert in range(3):
        close(together.hessian()[expert], x[expert])
        close(apart.hessian()[expert], x[expert])
    nested = HessianAccumulator((2, 3, 8, 32), batch_dims=2).add(x[1], (1, 2))
    assert nested.tokens.tolist() == [[0, 0, 0], [0, 0, 7]]
    assert torch.equal(nested.total[1, 2], together.total[1])


def test_what_was_never_seen_is_zero() -> None:
    accumulator = HessianAccumulator((3, 8, 32), batch_dims=1).add(gaussian(7, 32), 1)
    assert not accumulator.hessian()[[0, 2]].any()
    assert accumulator.hessian()[1].any()
    assert not HessianAccumulator((8, 32)).hessian().any()
    assert not HessianAccumulator((8, 32)).add(gaussian(0, 32)).importance().any()
    assert HessianAccumulator((8, 0)).add(gaussian(3, 0)).hessian().shape == (0, 16, 16)


def test_merge_is_the_sum() -> None:
    x = gaussian(3, 7, 32)
    first = HessianAccumulator((3, 8, 32), batch_dims=1).add(x[0], 0)
    second = HessianAccumulator((3, 8, 32), batch_dims=1).add(x[1], 0).add(x[2], 2)
    kept = copy.deepcopy(second)
    assert first.merge(second) is first
    assert first.tokens.tolist() == [14, 0, 7]
    close(first.hessian()[0], x[:2])
    close(first.hessian()[2], x[2])
    assert torch.equal(second.total, kept.total)
    for other in (HessianAccumulator((3, 32, 8), axis=1, batch_dims=1), HessianAccumulator((8, 32))):
        with pytest.raises(ValueError, match=r"other is for a weight of shape .* it must be .*\(3, 8, 32\)"):
            first.merge(other)
    with pytest.raises(TypeError, match="other is a Tensor"):
        first.merge(first.total)  # type: ignore[arg-type]


# --- errors ---------------------------------------------------------------------------------------


def test_layouts_are_checked() -> None:
    with pytest.raises(ValueError, match="length 40, which block_size=16 does not divide"):
        HessianAccumulator((8, 40))
    with pytest.raises(ValueError, match="axis=2 is out of range"):
        HessianAccumulator((8, 32), axis=2)
    with pytest.raises(ValueError, match="axis=0 is one of the batch_dims=1 leading axes"):
        HessianAccumulator((16, 8, 32), axis=0, batch_dims=1)
    with pytest.raises(TypeError, match=r"axis=1\.0 is a float"):
        HessianAccumulator((8, 32), axis=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (16,), (3, 31), (32, 3)])
def test_activations_of_another_shape(shape: tuple[int, ...]) -> None:
    accumulator = HessianAccumulator((8, 32))
    with pytest.raises(ValueError, match=r"activations has shape .* it must be \[\.\.\., 32\]"):
        accumulator.add(gaussian(*shape))
    assert accumulator.tokens == 0


@pytest.mark.parametrize("shape", [(32,), (7, 32), (4, 7, 32)])
def test_activations_without_an_expert(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"it must be \[3, \.\.\., 32\].*expert must say"):
        HessianAccumulator((3, 8, 32), batch_dims=1).add(gaussian(*shape))


@pytest.mark.parametrize("expert", [-1, 3, (0, 1), ()])
def test_expert_out_of_range(expert: Any) -> None:
    with pytest.raises(ValueError, match=r"is out of range: the weight's leading batch_dims=1 axes"):
        HessianAccumulator((3, 8, 32), batch_dims=1).add(gaussian(7, 32), expert)


def test_expert_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"expert=1\.0 is a float"):
        HessianAccumulator((3, 8, 32), batch_dims=1).add(gaussian(7, 32), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expert=0 is given for a weight .* with batch_dims=0"):
        HessianAccumulator((8, 32)).add(gaussian(7, 32), 0)


def test_activations_of_another_kind() -> None:
    accumulator = HessianAccumulator((8, 32))
    with pytest.raises(TypeError, match="activations is a NumPy array"):
        accumulator.add(np.zeros((7, 32), np.float32))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="activations has dtype int64"):
        accumulator.add(torch.zeros(7, 32, dtype=torch.int64))
    with pytest.raises(ValueError, match="activations is on device meta"):
        accumulator.add(torch.zeros(7, 32, device="meta"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_nonfinite_activations_are_found_in_the_end(value: float) -> None:
    x = gaussian(7, 64)
    x[3, 40] = value
    accumulator = HessianAccumulator((8, 64)).add(x).add(gaussian(7, 64))
    for result in (accumulator.hessian, accumulator.importance):
        with pytest.raises(ValueError, match=r"inputs 32 \.\. 47 are not finite"):
            result()
    stacked = HessianAccumulator((3, 8, 64), batch_dims=1).add(x, 2)
    with pytest.raises(ValueError, match=r"inputs 32 \.\. 47 of expert 2 are not finite"):
        stacked.hessian()
