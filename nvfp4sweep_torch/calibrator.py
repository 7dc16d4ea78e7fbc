"""Drop-ins for the NVFP4 weight calibration of NVIDIA ModelOpt's pull request 1387."""

from collections.abc import Callable

import torch
from torch import Tensor

import nvfp4sweep
from nvfp4sweep import formats
from nvfp4sweep_torch._ops import Arrays, Options, run_calibrate
from nvfp4sweep_torch._tensors import as_weight

TensorFunction = Callable[[Tensor, Tensor], Tensor]


def fp8_scale_candidates(device: torch.device | str = "cpu") -> Tensor:
    """The 126 finite positive E4M3 values / 448, ascending: float32 [126] on `device`."""
    return torch.from_numpy(nvfp4sweep.scale_candidates()).to(device)


def nvfp4_fp8_scale_sweep(x: Tensor, global_amax: Tensor, block_size: int = formats.BLOCK_SIZE) -> Tensor:
    """The amax of each block of `x` at the E4M3 scale of least squared error.

    Args:
        x: tensor of any shape whose number of elements `block_size` divides, taken as
            [n_blocks, block_size] in C order.
        global_amax: one number: a tensor of one element, or a float.
        block_size: elements in a block.

    Returns:
        float32 [n_blocks] on the device of `x`.

    Raises:
        As nvfp4sweep_torch.calibrate; and ValueError where global_amax is more than one number.
    """
    flat = as_weight(x, "x").reshape(-1)
    return run_calibrate(Arrays(flat, _scalar(global_amax, flat)), _options(block_size))


def nvfp4_fp8_scale_sweep_hessian(
    x: Tensor, global_amax: Tensor, hessian: Tensor, block_size: int = formats.BLOCK_SIZE
) -> Tensor:
    """The amax of each block of `x` at the E4M3 scale of least r^T H r, r the block's residuals.

    Args:
        x: tensor of any shape, taken in C order as [rows, inputs / block_size, block_size].
        global_amax: one number: a tensor of one element, or a float.
        hessian: [inputs / block_size, block_size, block_size]: as nvfp4sweep_torch.calibrate takes it.
        block_size: elements in a block: 16.

    Returns:
        float32 [n_blocks] on the device of `x`.

    Raises:
        As nvfp4sweep_torch.calibrate; and ValueError where global_amax is more than one number, or rows of
        the Hessian's inputs do not make up `x`.
    """
    weight = as_weight(x, "x")
    shape = tuple(hessian.shape)
    inputs = shape[0] * block_size if shape else 0
    if not inputs or weight.numel() % inputs:
        raise ValueError(
            f"hessian has shape {shape}, of {inputs} inputs in blocks of block_size={block_size}: they must "
            f"divide the {weight.numel()} elements of x"
        )
    arrays = Arrays(weight.reshape(-1, inputs), _scalar(global_amax, weight), hessian=hessian)
    return run_calibrate(arrays, _options(block_size)).reshape(-1)


def _options(block_size: int) -> Options:
    return Options(-1, block_size, 0, formats.MIN_CODE, True, None)


class NVFP4MSECalibrator:
    """Finds each block's amax of least error from one `collect` of the blocked weight.

    Args:
        amax: the initial amax of each block, of any shape with n_blocks elements. Only its shape is
            used: `compute_amax` returns it.
        global_amax: the amax that all scales refer to: a tensor of one element.
        axis: None or 0: blocks lie along the first axis of what is collected.
        quant_func: quant_func(x, amax) -> fake-quantized x. Called only with an `error_func`, once
            for each candidate, with amax of the initial amax's shape.
        error_func: error_func(x, xq) -> the error of each element [n_blocks, block_size] or of each
            block [n_blocks]. With one and no `hessian`, all 126 candidates are tried by `quant_func`, and
            the lowest that minimises it wins; otherwise the exact sweep runs.
        hessian: [inputs / block_size, block_size, block_size], shared by all rows of the weight: minimise
            r^T H r. It takes precedence over `error_func`, as in ModelOpt.

    Raises:
        ValueError: another axis, or a global_amax of more than one element.
    """

    def __init__(
        self,
        amax: Tensor,
        global_amax: Tensor,
        axis: int | None = None,
        quant_func: TensorFunction | None = None,
        error_func: TensorFunction | None = None,
        hessian: Tensor | None = None,
    ) -> None:
        if axis not in (None, 0):
            raise ValueError(f"axis={axis!r} must be None or 0: blocks lie along the first axis")
        self._shape = amax.shape
        self._global_amax = _scalar(global_amax, amax)
        self._quant_func = quant_func
        self._error_func = error_func
        self._hessian = hessian
        self._best_amax: Tensor | None = None

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Find the amaxes of the weight `x` [n_blocks, block_size], n_blocks as in the initial amax.

        Raises:
            RuntimeError: a second call before reset(), or an error_func without a quant_func.
            ValueError: x of another shape.
        """
        if self._best_amax is not None:
            raise RuntimeError("collect() was called before: one call is final. Call reset() to start again")
        if x.ndim != 2 or x.shape[0] != self._shape.numel():
            raise ValueError(
                f"x has shape {tuple(x.shape)}: it must be [n_blocks, block_size] with "
                f"n_blocks={self._shape.numel()} as in the initial amax of shape {tuple(self._shape)}"
            )
        if self._hessian is not None:
            hessian = self._hessian.to(x.device)
            best = nvfp4_fp8_scale_sweep_hessian(x, self._global_amax, hessian, x.shape[1])
        elif self._error_func is None:
            best = nvfp4_fp8_scale_sweep(x, self._global_amax, x.shape[1])
        else:
            best = self._search(x.detach().float(), self._error_func)
        self._best_amax = best.reshape(self._shape)

    def compute_amax(self, verbose: bool = False) -> Tensor | None:
        """The amaxes that collect() found, float32 of the initial amax's shape; None before it."""
        if verbose and self._best_amax is not None:
            ratio = self._best_amax / self._global_amax
            print(f"block amax / global amax: mean {ratio.mean():.4f}, max {ratio.max():.4f}")
        return self._best_amax

    def reset(self) -> None:
        """Forget what was collected; the initial shape stays, so that collect() can run again."""
        self._best_amax = None

    def _search(self, x: Tensor, error_func: TensorFunction) -> Tensor:
        """The brute-force search by the caller's functions; two values a block are kept."""
        if self._quant_func is None:
            raise RuntimeError("error_func needs quant_func: it compares x with quant_func(x, amax)")
        global_amax = self._global_amax.to(x.device)
        least = torch.full((x.shape[0],), torch.inf, device=x.device)
        best = torch.zeros_like(least)
        for index, candidate in enumerate(fp8_scale_candidates(x.device)):
            amax = (candidate * global_amax).expand(x.shape[0])
            error = error_func(x, self._quant_func(x, amax.reshape(self._shape)))
            error = error.sum(dim=1) if error.ndim == 2 else error
            better = error < least if index else torch.ones_like(error, dtype=torch.bool)
            least = torch.where(better, error, least)
            best = torch.where(better, amax, best)
        return best


def _scalar(global_amax: Tensor, like: Tensor) -> Tensor:
    amax = torch.as_tensor(global_amax, dtype=torch.float32, device=like.device).detach()
    if amax.numel() != 1:
        raise ValueError(f"global_amax has shape {tuple(amax.shape)}: it must be one number")
    return amax.reshape(())
