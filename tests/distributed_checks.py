"""What ranks of torch.distributed must answer: the bytes of one process, whatever the layout.

    python distributed_checks.py DEVICE RANKS STORE PART PARTS

Each check runs on all ranks; one that takes a `size`, on meshes of 1, 2, 4 .. ranks side by side. Every
PARTS-th check is run, from PART on: kernels for CUDA are compiled at the same time by several parts.
"""

import dataclasses
import sys
import warnings
from typing import Any

import numpy as np
import torch
from distributed_ranks import Ranks, fields, lies, raises, run_on_ranks, same, silent
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import nvfp4sweep_torch as nt
from nvfp4sweep_torch._layout import local_part

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FUNCTIONS = (nt.calibrate, nt.sweep, nt.quantize)
#: What is cut as the weight is, of the fields of what each of them returns.
BLOCKWISE = {nt.calibrate: 1, nt.sweep: 3, nt.quantize: 2}


# --- process groups -----------------------------------------------------------------------------------


def check_shards(ranks: Ranks, size: int) -> None:
    """Rows and columns; of each dtype one, and of each function."""
    mesh = ranks.mesh(size)
    group, rank = mesh.get_group(), mesh.get_local_rank()
    for i, dtype in enumerate(DTYPES):
        weight = ranks.normal(128, 128, seed=i, dtype=dtype)
        for dim, axis in ((0, 1), (1, 1), (0, 0), (1, 0))[: 4 if dtype is torch.bfloat16 else 2]:
            local = weight.chunk(size, dim)[rank]
            same(nt.global_amax(local, process_group=group), nt.global_amax(weight))
            for function in FUNCTIONS:
                found = function(local, axis=axis, process_group=group)
                expected = fields(function(weight, axis=axis))
                for j, (ours, whole) in enumerate(zip(fields(found), expected, strict=True)):
                    cut = j < BLOCKWISE[function]
                    same(ours, whole.chunk(size, dim)[rank] if cut else whole)


def check_uneven_and_empty_shards(ranks: Ranks, size: int) -> None:
    mesh = ranks.mesh(size)
    rank = mesh.get_local_rank()
    rows = [0 if i % 3 == 1 else 3 + i for i in range(size)]
    weight = ranks.normal(sum(rows), 32)
    local = weight.split(rows)[rank]
    found = nt.sweep(local, process_group=mesh.get_group())
    expected = nt.sweep(weight)
    same(found.code, expected.code.split(rows)[rank])
    same(found.global_amax, expected.global_amax)


def check_given_amax(ranks: Ranks, size: int) -> None:
    mesh = ranks.mesh(size)
    local = ranks.normal(64, 32).chunk(size)[mesh.get_local_rank()]
    with silent():
        found = nt.sweep(local, global_amax=5.0, process_group=mesh.get_group())
        raises(TypeError, "process_group is a int", nt.sweep, local, process_group=-100)
        raises(TypeError, "process_group is a DeviceMesh", nt.global_amax, local, process_group=mesh)
    same(found.code, nt.sweep(local, global_amax=5.0).code)


def check_experts(ranks: Ranks, size: int) -> None:
    """Every rank has rows of each expert; an amax an expert."""
    mesh = ranks.mesh(size)
    group, rank = mesh.get_group(), mesh.get_local_rank()
    weight = ranks.normal(3, 16, 32) * torch.tensor([1.0, 8.0, 0.3], device=ranks.device)[:, None, None]
    local = weight.chunk(size, 1)[rank]
    importance, hessian = ranks.importance(3, 1, 32), ranks.hessian(3, 2)
    for options in ({}, {"importance": importance}, {"hessian": hessian}):
        found = nt.sweep(local, batch_dims=1, process_group=group, **options)
        expected = nt.sweep(weight, batch_dims=1, **options)
        same(found.error, expected.error.chunk(size, 1)[rank])
        same(found.global_amax, expected.global_amax)
    same(nt.global_amax(local, local / 2, batch_dims=1, process_group=group), expected.global_amax)


def check_bad_weights(ranks: Ranks, size: int) -> None:
    """One rank names its element, the others say that it is another's; none is left waiting."""
    mesh = ranks.mesh(size)
    group, rank = mesh.get_group(), mesh.get_local_rank()
    weight = ranks.normal(8, 32)
    for bad, value in ((size - 1, "nan"), (0, "-inf")):
        local = weight.clone()
        if rank == bad:
            local[2, 5] = float(value)
        text = f"weight[2, 5] is {value}" if rank == bad else "another rank's weight has NaN or infinity"
        for function in (*FUNCTIONS, nt.global_amax):
            raises(ValueError, text, function, local, process_group=group)
        options = {"importance": ranks.importance(32), "batch_dims": 1}
        raises(ValueError, text, nt.sweep, local, process_group=group, **options)
        with np.errstate(all="ignore"):  # a single rank computes with infinity
            nt.sweep(local, check_finite=False, process_group=group)
        if rank != bad:
            nt.sweep(local, global_amax=1.0, process_group=group)
        else:
            raises(ValueError, text, nt.sweep, local, global_amax=1.0, process_group=group)
    if size > 1:  # a shard that cuts a block
        text = "has length 24, which block_size=16 does not divide" if rank == 0 else "another rank's weight"
        raises(ValueError, text, nt.sweep, weight[:, : 24 if rank == 0 else 32], process_group=group)
    same(nt.calibrate(weight, process_group=group), nt.calibrate(weight))


# --- DTensors -----------------------------------------------------------------------------------------


def check_dtensors(ranks: Ranks, size: int) -> None:
    mesh = ranks.mesh(size)
    for placement in (Shard(0), Shard(1), Replicate()):
        for axis in (-1, 0):
            _check_layout(ranks.normal(128, 256, dtype=torch.bfloat16), mesh, [placement], axis=axis)
    weight = ranks.normal(128, 256)
    objectives = (
        {"importance": ranks.importance(256)},
        {"importance": ranks.importance(128, 1).cpu().numpy(), "axis": 0},
        {"importance": ranks.importance(128, 256)},
        {"hessian": ranks.hessian(16)},
        {"hessian": ranks.hessian(8).cpu().numpy(), "axis": 0},
    )
    for options in objectives:
        for placement in (Shard(0), Shard(1)):
            _check_layout(weight, mesh, [placement], (nt.sweep,), **options)


def _check_layout(
    weight: torch.Tensor, mesh: DeviceMesh, placements: Any, functions: Any = FUNCTIONS, **options: Any
) -> None:
    batch_dims = options.get("batch_dims", 0)
    shared = [p if getattr(p, "dim", batch_dims) < batch_dims else Replicate() for p in placements]
    sharded = distribute_tensor(weight, mesh, placements, src_data_rank=None)
    amax = nt.global_amax(sharded, batch_dims=batch_dims)
    lies(amax, nt.global_amax(weight, batch_dims=batch_dims), mesh, shared)
    for function in functions:
        found, expected = function(sharded, **options), function(weight, **options)
        for i, (ours, whole) in enumerate(zip(fields(found), fields(expected), strict=True)):
            lies(ours, whole, mesh, placements if i < BLOCKWISE[function] else shared, gather=i == 0)
        if function is nt.quantize:
            assert found.axis == expected.axis
            lies(found.dequantize(torch.float16), expected.dequantize(torch.float16), mesh, placements)


def check_grids(ranks: Ranks) -> None:
    """Meshes of two dimensions: rows and columns, copies, one axis twice, and FSDP2 over tensor parallel."""
    grid = ranks.grid()
    tensor_parallel = grid.size(1)
    weight = ranks.normal(128, 256, dtype=torch.float16)
    strided = [_StridedShard(0, split_factor=tensor_parallel), Shard(0)]
    crossed = ([Shard(0), Shard(1)], [Shard(1), Shard(0)])
    for placements in (*crossed, [Replicate(), Shard(0)], [Shard(1), Shard(1)], strided):
        _check_layout(weight, grid, placements)
    for options in ({"importance": ranks.importance(128, 1)}, {"hessian": ranks.hessian(16)}):
        _check_layout(weight, grid, strided, (nt.sweep,), **options)
        _check_layout(weight, grid, [Shard(0), Shard(1)], (nt.sweep,), **options)
    if tensor_parallel > 1:
        sharded = distribute_tensor(weight, grid, strided, src_data_rank=None)
        raises(ValueError, "must not be sharded by _StridedShard", nt.sweep, sharded, axis=0)


def check_sharded_experts(ranks: Ranks) -> None:
    grid = ranks.grid()
    scale = torch.arange(1, 7, device=ranks.device)[:, None, None]
    weight = ranks.normal(6, 16, 128) * scale
    layouts = ([Shard(0), Replicate()], [Shard(0), Shard(1)], [Shard(2), Shard(0)], [Shard(0), Shard(0)])
    given = {"global_amax": np.arange(1, 7)}
    objectives = ({"hessian": ranks.hessian(6, 8)}, {"hessian": ranks.hessian(8)})
    for placements in layouts:
        _check_layout(weight, grid, placements, batch_dims=1)
        for options in (given, *objectives, {"importance": ranks.importance(6, 1, 128)}):
            _check_layout(weight, grid, placements, (nt.sweep,), batch_dims=1, **options)
    _check_layout(weight[:1], grid, layouts[1], (nt.quantize,), batch_dims=1)  # half the ranks have none
    sharded = distribute_tensor(weight, grid, [Shard(0), Replicate()], src_data_rank=None)
    with silent():  # each rank has its experts whole
        nt.sweep(sharded, batch_dims=1)


def check_uneven_dtensors(ranks: Ranks, size: int) -> None:
    """torch.chunk gives the last ranks less, or nothing."""
    mesh = ranks.mesh(size)
    for rows in (size + 1, 2 * size - 1, 1, 0):
        _check_layout(ranks.normal(rows, 32), mesh, [Shard(0)], (nt.quantize,))
    importance = ranks.importance(size + 1, 1)
    _check_layout(ranks.normal(size + 1, 32), mesh, [Shard(0)], (nt.sweep,), importance=importance)
    _check_layout(ranks.normal(size + 1, 2, 16), mesh, [Shard(0)], (nt.sweep,), batch_dims=1)
    for blocks in (size, 2 * size - 1, size - 1):  # of 2: blocks of 16 are cut where they are not even
        length = -(-2 * blocks // size)
        if length % 2 == 0:
            _check_layout(ranks.normal(3, 2 * blocks), mesh, [Shard(1)], (nt.quantize,), block_size=2)
    _check_layout(ranks.normal(7, 32), ranks.grid(), [Shard(0), Shard(0)], (nt.quantize,))


def check_cut_blocks(ranks: Ranks, size: int) -> None:
    mesh = ranks.mesh(size)
    with silent():
        for length in (16, 16 * size + 16) if size > 1 else ():
            weight = distribute_tensor(ranks.normal(4, length), mesh, [Shard(1)], src_data_rank=None)
            local = -(-length // size)
            text = (
                f"axis 1 of a weight of shape (4, {length}) is sharded over {size} ranks, which gives a rank "
                f"{local} of its {length} elements and cuts a block: block_size=16 must divide that"
            )
            for function in FUNCTIONS:
                raises(ValueError, text, function, weight)
        weight = distribute_tensor(ranks.normal(32 * size, 16), mesh, [Shard(0)], src_data_rank=None)
    nt.sweep(weight, axis=0)


def check_refusals(ranks: Ranks) -> None:
    mesh = ranks.mesh(ranks.world)
    whole = ranks.normal(16 * ranks.world, 32)
    weight = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    partial = DTensor.from_local(whole, mesh, [Partial()])
    columns = distribute_tensor(ranks.importance(16 * ranks.world, 32), mesh, [Shard(1)], src_data_rank=None)
    with silent():
        for function in (nt.sweep, nt.global_amax):
            raises(ValueError, "Partial ranks hold terms of a sum", function, partial)
            group = {"process_group": mesh.get_group()}
            raises(ValueError, "process_group is given with a DTensor", function, weight, **group)
        raises(TypeError, "importance is a DTensor and weight is not", nt.sweep, whole, importance=columns)
        raises(ValueError, "importance has placements (Shard(dim=1),)", nt.sweep, weight, importance=columns)
        raises(ValueError, "importance has shape (31,)", nt.sweep, weight, importance=torch.ones(31))
        raises(ValueError, "hessian has shape", nt.sweep, weight, hessian=ranks.hessian(3))
        raises(ValueError, "global_amax has shape (2,)", nt.sweep, weight, global_amax=[1, 2])
        raises(TypeError, "some weights are DTensors", nt.global_amax, weight, whole)
        raises(ValueError, "weights is empty", nt.global_amax, **group)
        stored = nt.quantize(weight, global_amax=9.0)
        stored = dataclasses.replace(stored, scale=DTensor.from_local(stored.scale.to_local(), mesh))
        raises(ValueError, "scale has placements (Replicate(),)", stored.dequantize)


def check_bad_dtensors(ranks: Ranks, size: int) -> None:
    mesh = ranks.mesh(size)
    whole = ranks.normal(4 * size, 32)
    whole[-1, 9] = float("nan")
    weight = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    mine = mesh.get_local_rank() == size - 1
    for function in FUNCTIONS:
        text = "weight[3, 9] is nan" if mine else "another rank's weight has NaN or infinity"
        error = raises(ValueError, text, function, weight)
        assert f"begins at [{4 * mesh.get_local_rank()}, 0]" in error.__notes__[0]
    raises(ValueError, text, nt.global_amax, weight)
    replicated = distribute_tensor(whole, mesh, [Replicate()], src_data_rank=None)
    raises(ValueError, f"weight[{4 * size - 1}, 9] is nan", nt.sweep, replicated)
    with np.errstate(all="ignore"):
        nt.sweep(weight, check_finite=False)

    weight = distribute_tensor(ranks.normal(4 * size, 32), mesh, [Shard(0)], src_data_rank=None)
    importance = ranks.importance(4 * size, 1)
    importance[-1] = -1
    if mine:
        raises(ValueError, "importance[3, 0] is -1", nt.sweep, weight, importance=importance)
    else:
        nt.sweep(weight, importance=importance)


def check_arguments_as_dtensors(ranks: Ranks) -> None:
    """Those that lie as the weight does are taken where they are."""
    grid = ranks.grid()
    weight = ranks.normal(2, 64, 128)
    placements = [Shard(0), Shard(2)]
    sharded = distribute_tensor(weight, grid, placements, src_data_rank=None)
    arguments = (
        ("importance", ranks.importance(2, 64, 128), placements),
        ("importance", ranks.importance(128), [Replicate(), Shard(0)]),
        ("hessian", ranks.hessian(2, 8), [Shard(0), Shard(1)]),
        ("hessian", ranks.hessian(8), [Replicate(), Shard(0)]),
        ("global_amax", torch.tensor([7.0, 5.0], device=ranks.device), [Shard(0), Replicate()]),
        ("global_amax", torch.tensor(7.0, device=ranks.device), [Replicate(), Replicate()]),
    )
    for name, value, its in arguments:
        given = distribute_tensor(value, grid, its, src_data_rank=None)
        found = nt.sweep(sharded, batch_dims=1, **{name: given})
        lies(found.error, nt.sweep(weight, batch_dims=1, **{name: value}).error, grid, placements)
    # What one function returns another takes.
    amax = nt.global_amax(sharded, batch_dims=1)
    with silent():
        found = nt.calibrate(sharded, global_amax=amax, batch_dims=1)
    lies(found, nt.calibrate(weight, batch_dims=1), grid, placements)


def check_fused_weights(ranks: Ranks) -> None:
    """q, k and v share an amax, however each of them lies."""
    mesh = ranks.mesh(ranks.world)
    weights = [ranks.normal(64, 128, seed=seed) for seed in range(3)]
    placements = (Replicate(), Shard(0), Shard(1))
    sharded = [
        distribute_tensor(w, mesh, [p], src_data_rank=None) for w, p in zip(weights, placements, strict=True)
    ]
    lies(nt.global_amax(*sharded), nt.global_amax(*weights), mesh, [Replicate()])
    experts = distribute_tensor(ranks.normal(8, 16, 16), mesh, [Shard(0)], src_data_rank=None)
    moved = distribute_tensor(ranks.normal(8, 16, 16), mesh, [Shard(1)], src_data_rank=None)
    raises(ValueError, "weights lie on different meshes", nt.global_amax, experts, moved, batch_dims=1)


def check_models(ranks: Ranks) -> None:
    """The parameters that FSDP2 and tensor parallelism make."""
    grid = ranks.grid()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 34, bias=False), torch.nn.Linear(34, 128, bias=False))
    model = model.to(ranks.device)
    whole = [parameter.detach().clone() for parameter in model.parameters()]
    fully_shard(model, mesh=ranks.mesh(ranks.world))
    for parameter, weight, axis in zip(model.parameters(), whole, (-1, 0), strict=True):
        found, expected = nt.calibrate(parameter, axis=axis), nt.calibrate(weight, axis=axis)
        lies(found, expected, parameter.device_mesh, [Shard(0)])

    model = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False), torch.nn.Linear(64, 128, bias=False))
    model = model.to(ranks.device)
    whole = [parameter.detach().clone() for parameter in model.parameters()]
    parallelize_module(model, grid["shard"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=grid["copy"])
    for parameter, weight in zip(model.parameters(), whole, strict=True):
        assert isinstance(parameter, DTensor)
        assert parameter.device_mesh.ndim == 2
        if weight.shape[1] // grid.size(1) % 16 == 0:
            found, expected = nt.sweep(parameter), nt.sweep(weight)
            lies(found.error, expected.error, parameter.device_mesh, parameter.placements)


def check_results_on_their_way(ranks: Ranks) -> None:
    mesh = ranks.mesh(ranks.world)
    whole = ranks.normal(64, 32)
    weight = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    gathered = weight.redistribute(placements=[Replicate()], async_op=True)
    assert type(local_part(gathered)) is torch.Tensor
    lies(nt.calibrate(gathered), nt.calibrate(whole), mesh, [Replicate()])


def load_kernels() -> None:
    """The compiled ones, once for all ranks."""
    for dtype in DTYPES:
        nt.quantize(torch.ones(2, 16, dtype=dtype)).dequantize()
    nt.sweep(torch.ones(2, 16), importance=torch.ones(16))
    nt.sweep(torch.ones(2, 16), hessian=torch.eye(16)[None])


if __name__ == "__main__":
    warnings.simplefilter("error")
    device, world, store, part, parts = sys.argv[1:]
    if device == "cpu":
        load_kernels()
    checks = [value for name, value in globals().items() if name.startswith("check_")]
    run_on_ranks(checks[int(part) :: int(parts)], device, int(world), store)
