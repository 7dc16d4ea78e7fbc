"""Watching a model run: for each linear weight a HessianAccumulator of what the weight multiplies."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from torch.overrides import TorchFunctionMode

from nvfp4sweep import formats
from nvfp4sweep_torch._hessian import HessianAccumulator

Rule = Callable[[str, Tensor], Any]  # of a parameter's name, as in state_dict, and the parameter


@contextlib.contextmanager
def accumulate_hessians(
    model: Module, *, where: Rule | None = None, device: torch.device | str | None = None
) -> Iterator[dict[str, HessianAccumulator]]:
    """Gather the block Hessian of each linear layer of a model while it runs in the `with` block.

        with accumulate_hessians(model) as accumulators:
            for batch in batches:
                model(batch)
        hessian = accumulators["layers.0.mlp.down_proj.weight"].hessian()

    Watched are:

    - every torch.nn.Linear that is called, experts among them;
    - experts in one parameter [E, N, K] or [E, K, N] that is multiplied by torch.nn.functional.linear,
      matmul (@), mm, bmm or torch.nn.functional.grouped_mm: whole, transposed, or a slice of it at a time.
      These are the "eager" and "grouped_mm" experts of the transformers library. Its "batched_mm",
      "deepgemm" and "sonicmoe" cannot be seen: call model.set_experts_implementation("eager") before.

    Not watched: einsum; other code that uses a Linear's weight without calling the Linear, as
    torch.nn.MultiheadAttention does with its out_proj (its accumulator stays empty: zero `tokens`).

    Layers that share an input, as q, k and v do, have an accumulator each. One costs 64 bytes for each
    input (and expert), and a layer N outputs wide about 16 / N of the layer's own operations, in float64.
    Padding counts like any token: run sequences without it.

    Args:
        model: any module. In the block compiled models run eagerly, in the whole process, as
            torch.compiler.set_stance("force_eager") makes them.
        where: where(name, weight) tells whether to watch a weight. None watches all of them.
        device: where the sums are kept. None: where the weight lives, or on the CPU if it has no memory.

    Yields:
        Accumulators by the name of the weight in state_dict. Those of Linear layers whose in_features is a
        multiple of 16 are there at once; those of stacked experts once the model has used one of them.
    """
    accumulators: dict[str, HessianAccumulator] = {}
    with contextlib.ExitStack() as stack:
        for accumulator, module, names in _linears(model, where, device):
            accumulators.update(dict.fromkeys(names, accumulator))
            hook = module.register_forward_hook(_adds_to(accumulator), with_kwargs=True)
            stack.callback(hook.remove)
        stacked = _stacked(model, where)
        if stacked:
            stack.enter_context(_Products(stacked, accumulators, device))
        if "torch._dynamo" in sys.modules:  # a model can only be compiled if it is imported already
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield accumulators


def _linears(
    model: Module, where: Rule | None, device: Any
) -> Iterator[tuple[HessianAccumulator, Linear, list[str]]]:
    """Each layer once, with all names that its weight has."""
    names: dict[Linear, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Linear) and module.in_features and not module.in_features % formats.BLOCK_SIZE:
            names.setdefault(module, []).append(f"{prefix}.weight" if prefix else "weight")
    for module, aliases in names.items():
        watched = [name for name in aliases if where is None or where(name, module.weight)]
        if watched:
            # Not the weight's own shape: it may be packed or sharded.
            shape = (module.out_features, module.in_features)
            yield HessianAccumulator(shape, device=_home(module.weight, device)), module, watched


def _home(weight: Tensor, device: Any) -> Any:
    if device is not None:
        return device
    return "cpu" if weight.is_meta else weight.device


def _adds_to(accumulator: HessianAccumulator) -> Callable[..., None]:
    def hook(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        accumulator.add(args[0] if args else kwargs["input"])

    return hook


class _Stacked(NamedTuple):
    """Experts in one parameter."""

    name: str
    parameter: Parameter


def _stacked(model: Module, where: Rule | None) -> dict[int, list[_Stacked]]:
    """The parameters that may be stacked experts, by the address of their storage."""
    found: dict[int, list[_Stacked]] = {}
    for name, parameter in model.named_parameters():
        if (
            type(parameter) is Parameter
            and parameter.ndim == 3
            and parameter.is_floating_point()
            and not parameter.is_meta
            and parameter.numel()
            and 0 not in parameter.stride()
            and (where is None or where(name, parameter))
        ):
            address = parameter.untyped_storage().data_ptr()
            found.setdefault(address, []).append(_Stacked(name, parameter))
    return found


#: The functions that multiply activations by a weight, and the axis of the weight that they sum over.
_SUMMED_AXIS: dict[Any, int] = {torch.nn.functional.linear: -1} | dict.fromkeys(
    [
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.Tensor.mm,
        torch.Tensor.bmm,
        torch.nn.functional.grouped_mm,
        getattr(torch, "_grouped_mm", None),  # what a mode sees of grouped_mm as long as that is plain Python
    ],
    -2,
)


class _Products(TorchFunctionMode):
    """Sees every product with stacked experts and adds its left side to their accumulator."""

    def __init__(
        self,
        stacked: dict[int, list[_Stacked]],
        accumulators: dict[str, HessianAccumulator],
        device: Any,
    ) -> None:
        super().__init__()
        self._stacked = stacked
        self._accumulators = accumulators
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)  # first, so that errors are the model's own
        summed = _SUMMED_AXIS.get(func)
        if summed is not None:
            left, right = _operands(args, kwargs)
            if type(right) in (Tensor, Parameter) and right.ndim in (2, 3) and not right.is_meta:
                self._see(left, right, summed, kwargs.get("offs"))
        return result

    def _see(self, left: Tensor, right: Tensor, summed: int, offs: Any) -> None:
        for name, parameter in self._stacked.get(right.untyped_storage().data_ptr(), ()):
            place = _place(right, summed, parameter)
            if place is None:
                continue
            axis, expert = place
            accumulator = self._accumulator(name, parameter, axis)
            if expert is not None:
                accumulator.add(left, expert)
            elif left.ndim == 2 and offs is not None:
                start = 0
                for expert, end in enumerate(offs.tolist()):
                    accumulator.add(left[start:end], expert)
                    start = end
            else:
                accumulator.add(_by_expert(left, len(parameter)))
            return

    def _accumulator(self, name: str, parameter: Parameter, axis: int) -> HessianAccumulator:
        if name not in self._accumulators:
            self._accumulators[name] = HessianAccumulator(
                parameter.shape, axis=axis, batch_dims=1, device=_home(parameter, self._device)
            )
        return self._accumulators[name]


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The two sides of a product, by position or by any of the names that PyTorch gives them."""
    sides = list(args[:2])
    for names in (("input", "mat_a"), ("weight", "other", "mat2", "mat_b"))[len(sides) :]:
        sides += [kwargs[name] for name in names if name in kwargs]
    left, right = sides if len(sides) == 2 else (None, None)
    return left, right


def _place(right: Tensor, summed: int, parameter: Parameter) -> tuple[int, int | None] | None:
    """(the parameter's axis that is summed over, the expert or None for all); None if `right` is neither.

    `right` may have fewer outputs than an expert, as a gate sliced from gate and up, but all of its inputs.
    """
    outputs = -3 - summed
    for axis in (1, 2):
        length, stride = parameter.shape[axis], parameter.stride(axis)
        if length % formats.BLOCK_SIZE or (right.shape[summed], right.stride(summed)) != (length, stride):
            continue
        expert, first = divmod(int(right.storage_offset() - parameter.storage_offset()), parameter.stride(0))
        last = first + (right.shape[outputs] - 1) * right.stride(outputs)
        step = parameter.stride(3 - axis)
        within = 0 <= expert < len(parameter) and not first % step and last < step * parameter.shape[3 - axis]
        if within and right.ndim == 2:
            return axis, expert
        if within and (len(right), right.stride(0)) == (len(parameter), parameter.stride(0)):
            return axis, None
    return None


def _by_expert(left: Tensor, experts: int) -> Tensor:
    """The left side of a product with all experts as [E, ..., K]."""
    left = left if left.ndim > 1 else left[None]
    batch = torch.broadcast_shapes(left.shape[:-2], (experts,))  # type: ignore[no-untyped-call]
    return left.expand(*batch, *left.shape[-2:]).movedim(-3, 0)
