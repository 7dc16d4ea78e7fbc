"""Second moments of a linear layer's input activations, block by block."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from nvfp4sweep import moments
from nvfp4sweep_torch._tensors import as_weight

#: Elements that are float64 at a time: 8 MiB suit a CPU's caches, 128 MiB keep a GPU busy.
_CHUNK = {"cpu": 2**20, "cuda": 2**24}


class HessianAccumulator:
    """Gathers the block Hessian of a linear layer's squared output error from its input activations.

    For each block b of 16 inputs it sums x_b x_b^T over all tokens x. `hessian()` and `importance()`
    are what the arguments of these names take in calibrate, sweep and quantize.

        accumulator = HessianAccumulator(weight.shape)
        for x in batches:
            accumulator.add(x)
        amax = calibrate(weight, hessian=accumulator.hessian())

    It keeps 64 bytes for each input (and expert), never a matrix of all inputs by all inputs. The
    products are float64: unlike float32 ones, no setting of TF32 and no autocast makes them less precise.

    To combine those of several processes, sum both attributes: torch.distributed.all_reduce(a.total)
    and all_reduce(a.tokens). Or `merge` them.

    Attributes:
        total: float32 [K / 16, 16, 16], or [E, K / 16, 16, 16] for stacked experts: the sums.
        tokens: int64 [] or [E]: how many tokens were added.

    Args:
        weight_shape: the shape of the layer's weight: [N, K], [K, N], or stacked experts [E, N, K].
        axis: the weight's input axis, whose length K is a multiple of 16.
        batch_dims: leading axes that stack matrices, each with inputs of its own: 1 for experts.
        device: where the sums are kept; None is PyTorch's default device.

    Raises:
        TypeError: an argument that should be an integer is not one.
        ValueError: an axis out of range, or one that blocks of 16 do not divide.
    """

    def __init__(
        self,
        weight_shape: Sequence[int],
        *,
        axis: int = -1,
        batch_dims: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self._problem = moments.moments_problem(weight_shape, axis, batch_dims)
        shape = moments.hessian_shape(self._problem)
        with torch.inference_mode(False):  # so that they can be changed outside inference mode too
            self.total = torch.zeros(shape, dtype=torch.float32, device=device)
            self.tokens = torch.zeros(self._problem.batch_shape, dtype=torch.int64, device=device)

    def add(self, activations: Tensor, expert: int | tuple[int, ...] | None = None) -> Self:
        """Add a batch of tokens. Padding counts like any token: leave it out.

        Args:
            activations: float32, float16, bfloat16 or float64 (rounded to float32 first), [..., K] with
                any leading axes. For a weight with batch_dims, [E, ..., K] unless `expert` is given. They
                may live on another device than the sums; only their sums are moved then.
            expert: whose activations these are, for a weight with batch_dims: an integer, or a tuple of
                them for batch_dims > 1. None: each expert has its own, in the leading axes.

        Returns:
            This accumulator.

        Raises:
            TypeError: `activations` is not a tensor of these dtypes, or `expert` is not an integer.
            ValueError: activations of another shape, or an expert out of range. NaN and infinity are not
                looked for here, which would wait for the device: `hessian` and `importance` raise.
        """
        x = as_weight(activations, "activations")  # without its autograd history
        index = moments.expert_index(expert, self._problem)
        tokens = moments.count_tokens(x.shape, self._problem, one_expert=expert is not None)
        target = self.total[index]
        x = x.reshape(target.shape[:-3].numel(), tokens, x.shape[-1])
        target += _second_moments(x, self._problem.block_size).view(target.shape).to(target.device)
        self.tokens[index] += tokens
        return self

    def merge(self, other: "HessianAccumulator") -> Self:
        """Add what another accumulator for the same shape, axis and batch_dims has gathered.

        Returns:
            This accumulator; `other` is not changed.

        Raises:
            TypeError: `other` is not a HessianAccumulator.
            ValueError: it is for another layout of the weight.
        """
        if not isinstance(other, HessianAccumulator):
            raise TypeError(f"other is a {type(other).__name__}: it must be a HessianAccumulator")
        moments.check_same_layout(other._problem, self._problem)
        self.total += other.total.to(self.total.device)
        self.tokens += other.tokens.to(self.tokens.device)
        return self

    def hessian(self) -> Tensor:
        """The mean of x_b x_b^T over the tokens, exactly symmetric; zeros where there were no tokens.

        Returns:
            float32 [K / 16, 16, 16] or [E, K / 16, 16, 16], a new tensor on the device of the sums.

        Raises:
            ValueError: activations were NaN, infinite, or so large that their squares exceed float32. The
                message names the first block. This waits for the device.
        """
        finite = self.total.isfinite().flatten(-2).all(-1)
        if not finite.all():
            raise moments.nonfinite_moments_error(finite.logical_not().nonzero()[0].tolist(), self._problem)
        mean = self.total / self.tokens.clamp(min=1)[..., None, None, None]
        return mean.tril() + mean.tril(-1).mT

    def importance(self) -> Tensor:
        """The mean of x^2 of each input over the tokens: the diagonal of `hessian()`; the same errors.

        Returns:
            float32 of a shape that broadcasts to the weight's: [K] for a weight [N, K], [K, 1] for [K, N],
            [E, 1, K] for experts [E, N, K].
        """
        diagonal = self.hessian().diagonal(dim1=-2, dim2=-1)
        return diagonal.reshape(moments.importance_shape(self._problem))


def _second_moments(x: Tensor, block_size: int) -> Tensor:
    """float64 [experts * blocks, block_size, block_size] of x [experts, tokens, K], a chunk at a time."""
    experts, _, inputs = x.shape
    blocks = experts * inputs // block_size
    sums = torch.zeros(blocks, block_size, block_size, dtype=torch.float64, device=x.device)
    rows = max(1, _CHUNK[x.device.type] // max(1, experts * inputs))
    for chunk in x.split(rows, dim=1):  # type: ignore[no-untyped-call]
        wide: Any = chunk.transpose(0, 1).to(torch.float64, memory_format=torch.contiguous_format)
        by_block = wide.view(chunk.shape[1], blocks, block_size)
        sums.baddbmm_(by_block.permute(1, 2, 0), by_block.transpose(0, 1))
    return sums
