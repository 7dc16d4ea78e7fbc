"""What only a CUDA device can show: streams, graphs, threads, devices, memory and sizes."""

import threading

import numpy as np
import pytest
from conftest import CUDA

import nvfp4sweep

pytestmark = pytest.mark.gpu

if CUDA:
    import torch

    import nvfp4sweep_torch as nt


@pytest.fixture(scope="module")
def weight():  # type: ignore[no-untyped-def]
    return torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)).cuda()


@pytest.fixture(scope="module")
def expected(weight):  # type: ignore[no-untyped-def]
    return torch.from_numpy(nvfp4sweep.sweep(weight.cpu().numpy(), implementation="oracle").code).cuda()


def test_result_lives_with_the_weight(weight, expected) -> None:  # type: ignore[no-untyped-def]
    found = nt.sweep(weight)
    assert all(t.device == weight.device for t in found)
    assert torch.equal(found.code, expected)
    assert torch.equal(nt.sweep(weight, implementation="oracle").code, expected)


def test_unaligned_view(weight) -> None:  # type: ignore[no-untyped-def]
    view = weight.reshape(-1)[1:-15].reshape(-1, 16)
    assert torch.equal(nt.sweep(view).code, nt.sweep(view.clone()).code)


def test_side_stream(weight, expected) -> None:  # type: ignore[no-untyped-def]
    """The launches follow what the current stream holds: here a slow fill of the weight."""
    target = torch.full_like(weight, 1.0)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        target.copy_(weight)
        found = nt.sweep(target, check_finite=False)
        code = found.code.clone()
    stream.synchronize()
    assert torch.equal(code, expected)


def test_graph_capture(weight, expected) -> None:  # type: ignore[no-untyped-def]
    static = torch.zeros_like(weight)
    nt.sweep(static, check_finite=False)  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = nt.sweep(static, check_finite=False)
    static.copy_(weight)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found.code, expected)
    assert found.global_amax == weight.abs().max()


def test_two_threads(weight, expected) -> None:  # type: ignore[no-untyped-def]
    results = {}

    def work(name: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            results[name] = [nt.sweep(weight).code for _ in range(20)]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(code, expected) for codes in results.values() for code in codes)


def test_second_device(weight, expected) -> None:  # type: ignore[no-untyped-def]
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    here, there = torch.cuda.current_device(), torch.device("cuda", 1)
    for options in ({}, OBJECTIVES["lognormal-1"](weight), OBJECTIVES["tokens"](weight)):
        wanted = nt.sweep(weight, **options).code if options else expected
        found = nt.sweep(weight.to(there), **{name: value.to(there) for name, value in options.items()})
        assert found.code.device == there
        assert torch.equal(found.code.cpu(), wanted.cpu())
        assert torch.cuda.current_device() == here


def test_extra_memory(weight) -> None:  # type: ignore[no-untyped-def]
    nt.calibrate(weight)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    amax = nt.calibrate(weight)
    assert torch.cuda.max_memory_allocated() - before - amax.nbytes < 1 << 20


def test_not_finite(weight) -> None:  # type: ignore[no-untyped-def]
    bad = weight.clone()
    bad[3, 7] = float("nan")
    for options in ({}, {"global_amax": 1.0}):
        with pytest.raises(ValueError, match=r"weight\[3, 7\] is nan"):
            nt.calibrate(bad, **options)
    with pytest.raises(ValueError, match=r"weight\[3, 7\] is nan"):
        nt.global_amax(bad)
    nt.calibrate(bad, check_finite=False)


def test_bad_amax(weight) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="global_amax is -1"):
        nt.calibrate(weight, global_amax=torch.tensor(-1.0, device="cuda"))
    with pytest.raises(ValueError, match="global_amax is on device cpu"):
        nt.calibrate(weight, global_amax=torch.tensor(1.0))
    with pytest.raises(ValueError, match="cannot serve a tensor on cuda"):
        nt.calibrate(weight, implementation="cpu")


def test_compile(weight, expected) -> None:  # type: ignore[no-untyped-def]
    compiled = torch.compile(lambda w: nt.sweep(w).code, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), expected)


def test_calibrator_and_drop_ins(weight, expected) -> None:  # type: ignore[no-untyped-def]
    blocks = weight.reshape(-1, 16)
    calibrator = nt.NVFP4MSECalibrator(blocks.abs().amax(dim=1), weight.abs().max())
    calibrator.collect(blocks)
    assert torch.equal(calibrator.compute_amax(), nt.calibrate(weight).reshape(-1))
    assert calibrator.compute_amax().device == weight.device
    assert nt.fp8_scale_candidates("cuda").device.type == "cuda"


def test_more_than_two_to_the_31_elements() -> None:
    """bfloat16 [9, 16384, 16384] = 2.4e9 elements; the oracle judges blocks at both ends."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("less than 12 GiB of free device memory")
    big = torch.empty(9, 16384, 16384, dtype=torch.bfloat16, device="cuda").normal_()
    amax = nt.global_amax(big)
    found = nt.sweep(big, global_amax=amax, check_finite=False)
    for matrix, rows in ((0, slice(0, 4)), (8, slice(-4, None)), (8, slice(8190, 8194))):
        sample = big[matrix, rows].float().cpu().numpy()
        judged = nvfp4sweep.sweep(sample, global_amax=amax.item(), implementation="oracle")
        np.testing.assert_array_equal(found.code[matrix, rows].cpu().numpy(), judged.code)
        np.testing.assert_array_equal(found.error[matrix, rows].cpu().numpy(), judged.error)


def test_jax_on_the_device(weight, expected) -> None:  # type: ignore[no-untyped-def]
    jax = pytest.importorskip("jax")
    import nvfp4sweep_jax

    array = jax.device_put(weight.cpu().numpy(), jax.devices("cuda")[0])
    sweep = nvfp4sweep_jax.sweep
    by_xla = jax.jit(lambda w: sweep(w, implementation="xla"))
    for found in (sweep(array), jax.jit(sweep)(array), by_xla(array)):
        assert found.code.devices() == array.devices()
        np.testing.assert_array_equal(np.asarray(found.code), expected.cpu().numpy())
    for function, kernels in ((sweep, 3), (lambda w: sweep(w, implementation="xla"), 0)):
        program = jax.jit(function).lower(array).as_text()
        assert program.count("triton_kernel_call_ffi") == kernels


def test_jax_arrays_die_safely(weight, expected) -> None:  # type: ignore[no-untyped-def]
    """Arrays freed right after the call: memory must not be reused while the kernel still reads it."""
    jax = pytest.importorskip("jax")
    import nvfp4sweep_jax

    host = weight.cpu().numpy()
    codes = []
    for _ in range(20):
        array = jax.device_put(host, jax.devices("cuda")[0])
        codes.append(nvfp4sweep_jax.sweep(array).code)
        del array
        jax.device_put(np.full_like(host, 7.0), jax.devices("cuda")[0]) * 2
    assert all(np.array_equal(np.asarray(code), expected.cpu().numpy()) for code in codes)


@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_jax_sharded_over_devices(weight, implementation, axis_type) -> None:  # type: ignore[no-untyped-def]
    """Rows, columns and both: no device gets another's blocks, and codes are those of one device."""
    jax = pytest.importorskip("jax")
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import nvfp4sweep_jax

    devices = len(jax.devices("cuda"))
    if devices < 2:
        pytest.skip("one CUDA device")
    host = weight.cpu().numpy()
    expected = nvfp4sweep.sweep(host)
    sweep = jax.jit(lambda w: nvfp4sweep_jax.sweep(w, implementation=implementation))
    meshes = {
        (devices, 1): [PartitionSpec("a"), PartitionSpec(None, "a")],
        (2, devices // 2): [PartitionSpec("a", "b"), PartitionSpec(None, ("a", "b"))],
    }
    for shape, specs in meshes.items():
        mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(getattr(AxisType, axis_type),) * 2)
        for spec in specs:
            array = jax.device_put(host, NamedSharding(mesh, spec))
            compiled = sweep.lower(array).compile()
            found = compiled(array)
            for got, wanted in zip(found, expected, strict=True):
                np.testing.assert_array_equal(np.asarray(got), wanted)
            assert found.code.sharding.is_equivalent_to(array.sharding, 2)
            assert "all-gather" not in compiled.as_text()
    eager = nvfp4sweep_jax.sweep(array)
    np.testing.assert_array_equal(np.asarray(eager.code), expected.code)


# --- importances and Hessians: the oracle judges some rows ------------------------------------------

OBJECTIVES = {
    "lognormal-1": lambda x: {"importance": lognormal(1, x.shape[-1])},
    "lognormal-3": lambda x: {"importance": lognormal(3, x.shape[-1])},
    "of-each-element": lambda x: {"importance": lognormal(1, *x.shape)},
    "of-each-expert": lambda x: {"importance": lognormal(1, *x.shape[:-2], 1, x.shape[-1])},
    "tokens": lambda x: {"hessian": moments(512, x.shape[-1])},
    "few-tokens": lambda x: {"hessian": moments(5, x.shape[-1])},
    "common-0.5": lambda x: {"hessian": common_factor(0.5, x.shape[-1])},
    "common-0.9": lambda x: {"hessian": common_factor(0.9, x.shape[-1])},
}


def lognormal(sigma: float, *shape: int):  # type: ignore[no-untyped-def]
    return torch.from_numpy(np.random.default_rng(1).lognormal(0, sigma, shape).astype(np.float32)).cuda()


def moments(tokens: int, columns: int):  # type: ignore[no-untyped-def]
    """The Hessian of Gaussian activations, singular where there are fewer tokens than inputs of a block."""
    x = np.random.default_rng(2).standard_normal((columns // 16, tokens, 16))
    x *= np.random.default_rng(3).lognormal(0, 0.5, (columns // 16, 1, 16))
    return torch.from_numpy((x.swapaxes(1, 2) @ x / tokens).astype(np.float32)).cuda()


def common_factor(rho: float, columns: int):  # type: ignore[no-untyped-def]
    return ((1 - rho) * torch.eye(16) + rho).repeat(columns // 16, 1, 1).cuda()


def judge(found, weight, options, rows=8) -> None:  # type: ignore[no-untyped-def]
    """`rows` of [..., N, K], spread over each matrix, against the oracle given the same global amax."""
    index = torch.linspace(0, weight.shape[-2] - 1, min(rows, weight.shape[-2])).long().cuda()
    options = {name: host(value) for name, value in options.items()}
    importance = options.get("importance")
    if importance is not None and importance.ndim > 1 and importance.shape[-2] > 1:
        options["importance"] = importance[..., index.cpu().numpy(), :]
    judged = nvfp4sweep.sweep(
        weight.index_select(-2, index).float().cpu().numpy(), global_amax=host(found.global_amax),
        batch_dims=weight.ndim - 2, implementation="oracle", **options,
    )  # fmt: skip
    for field in ("amax", "code", "error"):
        got = getattr(found, field).index_select(-2, index)
        np.testing.assert_array_equal(host(got), getattr(judged, field), field)


def host(tensor):  # type: ignore[no-untyped-def]
    return tensor.float().cpu().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(weight, name: str, dtype: str) -> None:  # type: ignore[no-untyped-def]
    typed = weight.to(getattr(torch, dtype))
    options = OBJECTIVES[name](typed)
    found = nt.sweep(typed, **options)
    assert found.global_amax == typed.abs().max()
    judge(found, typed, options)
    # Each combination of outputs and layout is compiled, which takes seconds for a Hessian.
    if dtype == "float32":
        packed = nt.quantize(typed, **options)
        assert torch.equal(packed.scale.view(torch.uint8), found.code)
        return
    if "importance" in options:
        options["importance"] = torch.atleast_2d(options["importance"]).mT
    again = nt.sweep(typed.mT.contiguous(), axis=0, **options)
    assert torch.equal(again.code.mT, found.code)
    assert torch.equal(again.error.mT, found.error)


@pytest.mark.parametrize("name", ["lognormal-1", "of-each-element", "of-each-expert", "tokens"])
def test_objectives_of_experts(weight, name: str) -> None:  # type: ignore[no-untyped-def]
    experts = weight.reshape(4, 128, 1024).bfloat16()
    options = OBJECTIVES[name](experts)
    found = nt.sweep(experts, batch_dims=1, **options)
    assert torch.equal(found.global_amax, experts.abs().amax(dim=(1, 2)).float())
    judge(found, experts, options, rows=3)
    if "hessian" in options:  # one an expert, the last without tokens
        own = torch.stack([options["hessian"] * (i < 3) for i in range(4)])
        with pytest.warns(nvfp4sweep.ZeroHessianWarning, match="64 of 256 blocks"):
            found = nt.sweep(experts, batch_dims=1, hessian=own)
        assert torch.equal(found.code[:3], nt.sweep(experts, batch_dims=1, **options).code[:3])
        assert torch.equal(found.code[3], nt.sweep(experts, batch_dims=1).code[3])


def test_hessians_of_one_token(weight) -> None:  # type: ignore[no-untyped-def]
    """Rank 1: many codes come near a zero error, and are told apart in more than float64."""
    small = weight[:8, :64].contiguous()
    options = {"hessian": moments(1, 64)}
    judge(nt.sweep(small, **options), small, options)


def test_accumulated_hessians(weight) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(300, 1024, generator=torch.Generator().manual_seed(1)).cuda()
    accumulator = nt.HessianAccumulator(weight.shape, device="cuda").add(x)
    options = {"hessian": accumulator.hessian()}
    found = nt.sweep(weight, **options)
    judge(found, weight, options)
    drop_in = nt.nvfp4_fp8_scale_sweep_hessian(weight, found.global_amax, options["hessian"])
    assert torch.equal(drop_in, found.amax.reshape(-1))
    importance = {"importance": accumulator.importance()}
    judge(nt.sweep(weight, **importance), weight, importance)


@pytest.mark.parametrize("name", ["lognormal-3", "of-each-element", "tokens", "common-0.9"])
def test_objectives_in_graphs_and_on_streams(weight, name: str) -> None:  # type: ignore[no-untyped-def]
    options = OBJECTIVES[name](weight)
    expected = nt.sweep(weight, **options).code
    static = torch.zeros_like(weight)
    given = {key: torch.zeros_like(value) for key, value in options.items()}
    nt.sweep(static, check_finite=False, **given)  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = nt.sweep(static, check_finite=False, **given)
    static.copy_(weight)
    for key, value in options.items():
        given[key].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found.code, expected)

    static.zero_()
    given[key].zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        static.copy_(weight)
        given[key].copy_(options[key])
        found = nt.sweep(static, check_finite=False, **given)
    stream.synchronize()
    assert torch.equal(found.code, expected)


def test_objectives_must_be_valid(weight) -> None:  # type: ignore[no-untyped-def]
    h = torch.ones(1024, device="cuda")
    for bad in (-1.0, float("nan"), float("inf")):
        h[5] = bad
        with pytest.raises(ValueError, match=r"importance\[5\] is "):
            nt.sweep(weight, importance=h)
    hessian = common_factor(0.5, 1024)
    hessian[7, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"hessian\[7, 2, 3\] is nan"):
        nt.sweep(weight, hessian=hessian)
    with pytest.raises(ValueError, match="importance is on device cpu"):
        nt.calibrate(weight, importance=torch.ones(1024))
