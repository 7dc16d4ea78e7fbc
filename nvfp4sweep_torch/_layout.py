"""How a DTensor lies on its mesh, and how all that has some of its axes lies beside it."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nvfp4sweep.problem import Problem


def is_dtensor(value: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # takes a second to import, and makes all DTensors
    return module is not None and isinstance(value, module.DTensor)


def local_part(tensor: Any) -> Tensor:
    """This rank's part, without its autograd history, once it has arrived."""
    part = tensor.to_local().detach()
    return part.wait() if hasattr(part, "wait") else part  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a weight lies on a mesh, and with it all that has its axes. `problem` is that of the whole weight.

    Which of the weight's axes another array has is a mapping from the weight's axes to the array's.
    """

    problem: Problem
    mesh: Any
    placements: tuple[Any, ...]

    @property
    def axes(self) -> dict[int, int]:
        return {axis: axis for axis in range(len(self.problem.shape))}

    @property
    def batch_axes(self) -> dict[int, int]:
        return {axis: axis for axis in range(self.problem.batch_dims)}

    @property
    def reduced_dims(self) -> list[int]:
        """The dimensions of the mesh over which matrices are spread."""
        axes = map(_sharded_axis, self.placements)
        return [dim for dim, axis in enumerate(axes) if axis is not None and axis >= self.problem.batch_dims]

    def placed(self, axes: Mapping[int, int]) -> tuple[Any, ...]:
        """Placements of an array: sharded as the weight along the axes that it has, else replicated."""
        from torch.distributed.tensor import Replicate

        def along(placement: Any) -> Any:
            axis = axes.get(placement.dim) if _sharded_axis(placement) is not None else None
            if axis is None:
                return Replicate()
            is_strided = hasattr(placement, "split_factor")  # PyTorch 2.11 wants it, also where it is 1
            options = {"split_factor": placement.split_factor} if is_strided else {}
            return type(placement)(axis, **options)

        return tuple(map(along, self.placements))

    def part(self, name: str, value: Any, axes: Mapping[int, int]) -> Any:
        """This rank's part of a whole array, or of a DTensor that must lie as the weight does."""
        if not is_dtensor(value):
            for axis, its_axis in axes.items():
                index = self._positions(axis, value.shape[its_axis])
                value = value[(slice(None),) * its_axis + (_slice(index),)]
            return value
        placements = self.placed(axes)
        if value.device_mesh != self.mesh or tuple(value.placements) != placements:
            raise ValueError(
                f"{name} has placements {tuple(value.placements)} on {value.device_mesh}: beside this weight "
                f"they must be {placements} on {self.mesh}"
            )
        return local_part(value)

    def whole(self, part: Tensor, shape: Sequence[int], axes: Mapping[int, int]) -> Tensor:
        """The DTensor of this shape whose part on this rank is `part`."""
        from torch.distributed.tensor import DTensor

        size, stride = torch.Size(shape), torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part, self.mesh, self.placed(axes), run_check=False, shape=size, stride=stride
        )

    def begin(self) -> list[int]:
        """Where this rank's shard begins, along each axis."""
        shape = self.problem.shape
        return [next(iter(self._positions(axis, length)), length) for axis, length in enumerate(shape)]

    def _positions(self, axis: int, length: int) -> Sequence[int]:
        """Which of so many positions along an axis this rank has: what placements do, from left to right."""
        positions: Sequence[int] = range(length)
        for dim, placement in enumerate(self.placements):
            if _sharded_axis(placement) == axis:
                ranks, rank = self.mesh.size(dim), self.mesh.get_local_rank(dim)
                factor = _split_factor(placement)
                pieces = [_chunk(_chunk(positions, factor, i), ranks, rank) for i in range(factor)]
                positions = pieces[0] if factor == 1 else [i for piece in pieces for i in piece]
        return positions


def layout_of(weight: Any, asked: Problem) -> Layout:
    """Of a DTensor that is no sum and whose blocks are whole. What this raises it raises on all its ranks."""
    mesh, placements = weight.device_mesh, tuple(weight.placements)
    if mesh.get_coordinate() is None:
        raise ValueError(f"this rank is not in the weight's mesh, {mesh}")
    ranks, lengths = 1, {asked.shape[asked.axis]}
    for placement, size in zip(placements, mesh.shape, strict=True):
        if placement.is_partial():
            raise ValueError(
                f"weight has placements {placements}: Partial ranks hold terms of a sum, and each must hold "
                f"elements, by Shard or Replicate: call weight.redistribute before"
            )
        if _sharded_axis(placement) != asked.axis or asked.block_size == 1:
            continue
        if _split_factor(placement) > 1:
            raise ValueError(
                f"weight has placements {placements}: axis {asked.axis}, along which blocks run, must not be "
                f"sharded by _StridedShard: shard it over one dimension of the mesh, or another axis"
            )
        ranks *= size
        lengths = {len(_chunk(range(length), size, rank)) for length in lengths for rank in range(size)}
    cut = [length for length in lengths if length % asked.block_size]
    if cut:
        raise ValueError(
            f"axis {asked.axis} of a weight of shape {asked.shape} is sharded over {ranks} ranks, which "
            f"gives a rank {max(cut)} of its {asked.shape[asked.axis]} elements and cuts a block: "
            f"block_size={asked.block_size} must divide that"
        )
    return Layout(asked, mesh, placements)


def _sharded_axis(placement: Any) -> int | None:
    """Of Shard and _StridedShard."""
    return getattr(placement, "dim", None)


def _split_factor(placement: Any) -> int:
    """Into how many pieces an axis is cut before each of them is sharded: 1 but for _StridedShard."""
    return int(getattr(placement, "split_factor", 1))


def _chunk(positions: Sequence[int], ranks: int, rank: int) -> Sequence[int]:
    """As torch.chunk, whose last chunks are smaller; then empty ones, so that all ranks have one."""
    step = -(-len(positions) // ranks)
    return positions[rank * step : (rank + 1) * step]


def _slice(positions: Sequence[int]) -> Any:
    return slice(positions.start, positions.stop) if isinstance(positions, range) else positions
