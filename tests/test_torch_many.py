"""Many weights in one call: the results of single calls, from few launches, with one wait."""

import numpy as np
import pytest
from conftest import CUDA

torch = pytest.importorskip("torch")
pytest.importorskip("numba")
import nvfp4sweep_torch as nt  # noqa: E402
from nvfp4sweep.problem import make_problem  # noqa: E402
from nvfp4sweep_torch import _device, _many  # noqa: E402

GENERATOR = torch.Generator().manual_seed(0)
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def normal(*shape: int, dtype: torch.dtype = torch.float32):  # type: ignore[no-untyped-def]
    return torch.randn(shape, generator=GENERATOR).to(dtype).to(DEVICE)


def single(weights, amaxes=None, **options):  # type: ignore[no-untyped-def]
    """What the oracle says of each weight by itself."""
    amaxes = amaxes if isinstance(amaxes, list) else [amaxes] * len(weights)
    return [
        nt.calibrate(weight, global_amax=amax, implementation="oracle", **options)
        for weight, amax in zip(weights, amaxes, strict=True)
    ]


def same(found, expected) -> None:  # type: ignore[no-untyped-def]
    assert [f.shape for f in found] == [e.shape for e in expected]
    assert all(map(torch.equal, found, expected))


def from_the_oracle(weight, asked, outputs, amax, check_finite, left):  # type: ignore[no-untyped-def]
    """What _device.run returns, raises, and leaves to be checked."""
    options = {"axis": asked.axis, "block_size": asked.block_size, "batch_dims": asked.batch_dims}
    options |= {"min_code": asked.min_code, "implementation": "oracle", "check_finite": check_finite}
    options["global_amax"] = amax
    if isinstance(weight, list):
        weight = torch.stack(weight)
    if left is not None:
        checked = left.values.view(len(weight), -1)
        largest = weight.flatten(1).float().abs()
        checked[:, 0] = largest.amax(1) if largest.shape[1] else 0
        checked[:, 1] = checked[:, 0] if amax is None else amax
        # What the kernels make of numbers that are refused later is nobody's concern.
        weight = weight.nan_to_num(0, 0, 0)
        options["global_amax"] = amax if amax is None else amax.float().nan_to_num(0, 0).clamp(min=0)
    with np.errstate(all="ignore"):
        found = nt.sweep(weight, **options)._asdict()
        if "packed" in outputs:
            stored = nt.quantize(weight, **options)
            found |= {"packed": stored.packed, "global_scale": stored.global_scale}
    return [found[name] for name in outputs]


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """The chunks that are swept without a wait, and "look" where the host looks at what they left.

    Without CUDA the oracle stands in for the kernels: a weight takes them seconds in Triton's interpreter.
    """
    pytest.importorskip("triton")
    seen: list = []
    run, look = _device.run, _device.bad_matrices

    def spy(weight, asked, outputs, amax=None, *objectives, check_finite, left=None):  # type: ignore[no-untyped-def]
        if not check_finite:
            seen.append(weight)
        if CUDA:
            return run(weight, asked, outputs, amax, *objectives, check_finite=check_finite, left=left)
        return from_the_oracle(weight, asked, outputs, amax, check_finite, left)

    monkeypatch.setattr(_device, "run", spy)
    monkeypatch.setattr(_device, "bad_matrices", lambda left: (seen.append("look"), look(left))[1])
    return seen


def chunks_of(swept):  # type: ignore[no-untyped-def]
    return [chunk for chunk in swept if not isinstance(chunk, str)]


def calibrate_many(weights, **options):  # type: ignore[no-untyped-def]
    """By the path for CUDA."""
    return nt.calibrate_many(weights, implementation="triton", **options)


def apart_by_8_bytes(weights):  # type: ignore[no-untyped-def]
    """The same, every second one 8 bytes beyond a multiple of 16: these are copied."""
    result = []
    for i, weight in enumerate(weights):
        begin = 8 * (i % 2) // weight.itemsize
        room = torch.empty(weight.numel() + begin, dtype=weight.dtype, device=weight.device)
        result.append(room[begin:].view_as(weight).copy_(weight))
    return result


def on_device(test):  # type: ignore[no-untyped-def]
    return pytest.mark.gpu(test) if CUDA else test


# --- the same results ---------------------------------------------------------------------------------

OPTIONS = [{}, {"axis": 0}, {"block_size": 32}, {"axis": 0, "block_size": 32, "min_code": 90}]


def assorted(dtype: torch.dtype):  # type: ignore[no-untyped-def]
    """Four shapes, by turns; blocks of 32 along either axis."""
    shapes = [(32, 64), (64, 32), (32, 64), (96, 32), (32, 2, 32), (64, 32), (32, 64)]
    return [normal(*shape, dtype=dtype) * (i + 1) for i, shape in enumerate(shapes)]


@on_device
@pytest.mark.parametrize(
    ("dtype", "options"),
    # On CUDA not each with each: to compile them all takes 16 cores a minute.
    [(d, o) for o in OPTIONS for d in DTYPES if not (CUDA and o) or d is torch.bfloat16],
)
def test_results_are_those_of_single_calls(swept, dtype: torch.dtype, options) -> None:  # type: ignore[no-untyped-def]
    weights = assorted(dtype)
    same(calibrate_many(weights, **options), single(weights, **options))
    assert [len(chunk) for chunk in chunks_of(swept)] == [3, 2, 1, 1]
    for stored, weight in zip(
        nt.quantize_many(weights, implementation="triton", **options), weights, strict=True
    ):
        expected = nt.quantize(weight, implementation="oracle", **options)
        assert torch.equal(stored.packed, expected.packed)
        assert torch.equal(stored.scale.view(torch.uint8), expected.scale.view(torch.uint8))
        assert torch.equal(stored.global_scale, expected.global_scale)
        assert stored.axis == expected.axis
        assert torch.equal(stored.dequantize(), expected.dequantize())


@pytest.mark.parametrize("implementation", ["cpu", "oracle"])
@pytest.mark.parametrize("options", OPTIONS)
def test_on_the_cpu(implementation: str, options) -> None:  # type: ignore[no-untyped-def]
    weights = [weight.cpu() for dtype in DTYPES for weight in assorted(dtype)]
    same(nt.calibrate_many(weights, implementation=implementation, **options), single(weights, **options))


@on_device
def test_the_kernels_themselves() -> None:
    """Of chunks of separate weights; and what they leave to be checked."""
    pytest.importorskip("triton")
    weights = [normal(16, 2), *normal(2, 16, 2).bfloat16(), normal(16, 2) * 3, normal(16, 2) * 2]
    with np.errstate(all="ignore"):  # the interpreter computes with NumPy, overflow included
        same(calibrate_many(weights, axis=0), single(weights, axis=0))
        weights[3][5, 1] = torch.inf
        with pytest.raises(ValueError, match=r"^weights\[1\]: weight\[5, 1\] is inf"):
            calibrate_many([weights[0], weights[3]], axis=0)


@pytest.mark.parametrize("objective", [{"importance_strides": (0, 0, 1)}, {"hessian_matrices": 1}])
def test_starts_are_for_plain_sweeps(objective) -> None:  # type: ignore[no-untyped-def]
    launch = pytest.importorskip("nvfp4sweep.triton_launch", exc_type=ImportError)
    asked = make_problem((2, 4, 32), batch_dims=1)
    with pytest.raises(ValueError, match="starts is given with"):
        launch.plan(
            asked, ("amax",), (128, 32, 32, 1), 4, 90, given=False, checked=False, scattered=True, **objective
        )


@on_device
def test_views_parameters_and_other_iterables(swept) -> None:  # type: ignore[no-untyped-def]
    base = normal(64, 64)
    negated = torch.complex(torch.zeros_like(base), base).conj().imag
    weights = [
        base,
        torch.nn.Parameter(base * 2),
        base.t(),
        base.clone().requires_grad_(),
        negated,
        base[::2],
    ]
    found = calibrate_many(weights)
    same(found, single(weights))
    assert not any(f.requires_grad for f in found)
    same(calibrate_many(w for w in weights), found)
    stacked = normal(3, 4, 32)
    same(calibrate_many(stacked), single(list(stacked)))
    assert calibrate_many([]) == nt.calibrate_many([], global_amax=[]) == []
    empty = [normal(0, 16), normal(2, 16), normal(0, 16), normal(2, 0), *normal(3, 0, 32).unbind()]
    same(calibrate_many(empty), single(empty))


@on_device
@pytest.mark.parametrize("implementation", ["triton", None])
def test_global_amaxes(swept, implementation: str | None) -> None:  # type: ignore[no-untyped-def]
    weights = [normal(4, 32), normal(2, 16), normal(4, 32), normal(4, 32), normal(2, 16)]
    values = [3.0, 0.7, 0.0, 1e-3, 5.0]
    tensors = [torch.tensor(value, device=DEVICE) for value in values]
    halves = [t.bfloat16() for t in tensors[2:4]]
    dtypes = [torch.tensor(1025, device=DEVICE), tensors[1], *halves, tensors[4].double()]
    mixed = [3.0, None, tensors[2], None, 1]
    for one in (2.5, np.float32(2.5), np.array(2.5), torch.tensor(2.5, device=DEVICE), 3):
        same(nt.calibrate_many(weights, global_amax=one, implementation=implementation), single(weights, one))
    for each in (values, tensors, dtypes, mixed):
        found = nt.calibrate_many(weights, global_amax=each, implementation=implementation)
        same(found, single(weights, each))
    for array in (np.array(values), tuple(values), torch.tensor(values, device=DEVICE)):
        found = nt.calibrate_many(weights, global_amax=array, implementation=implementation)
        same(found, single(weights, values))


def test_compile() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(weights, amaxes):  # type: ignore[no-untyped-def]
        found = nt.calibrate_many(weights, global_amax=amaxes)
        return [f + 1 for f in found], [s.packed for s in nt.quantize_many(weights, global_amax=2.0)]

    weights = [normal(4, 32).cpu(), normal(2, 16).cpu()]
    found, packed = compiled(weights, list(torch.tensor([1.0, 2.0])))
    same(found, [f + 1 for f in single(weights, [1.0, 2.0])])
    same(packed, [nt.quantize(weight, global_amax=2.0).packed for weight in weights])


# --- how they are swept -------------------------------------------------------------------------------


@on_device
def test_chunks_are_bounded(swept, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    weights = [normal(4, 32) for _ in range(7)]
    monkeypatch.setattr(_many, "_MOST_BYTES", 3 * weights[0].nbytes + 1)
    same(calibrate_many(weights), single(weights))
    assert [len(chunk) for chunk in chunks_of(swept)] == [3, 3, 1]
    swept.clear()
    monkeypatch.setattr(_many, "_MOST_WEIGHTS", 2)
    assert len(calibrate_many(weights)) == 7
    assert [len(chunk) for chunk in chunks_of(swept)] == [2, 2, 2, 1]
    swept.clear()
    calibrate_many([weights[0], weights[1].bfloat16(), weights[2].half(), weights[3]])
    assert [chunk[0].dtype for chunk in chunks_of(swept)] == [torch.float32, torch.bfloat16, torch.float16]
    swept.clear()
    monkeypatch.setattr(_many, "_MOST_BYTES", weights[0].nbytes - 1)
    calibrate_many(weights)
    assert [chunk.data_ptr() for chunk in chunks_of(swept)] == [weight.data_ptr() for weight in weights]


@on_device
def test_weights_are_read_where_they_lie(swept) -> None:  # type: ignore[no-untyped-def]
    stacked, other = normal(6, 32, 32), normal(6, 32, 32)
    rows = normal(40, 32)
    for parts in (
        stacked.unbind(),
        stacked.mT.unbind(),
        stacked[1::2].unbind(),
        stacked[:, 4:8].unbind(),
        [rows[i : i + 4] for i in range(0, 36, 2)],
        stacked.unbind()[::-1],
        [stacked[0], stacked[0]],
        [stacked[3], other[1], stacked[2], other[5]],
        [other[0], stacked[0]],
        [s[:, :16] for s in (*stacked, *other)],
    ):
        swept.clear()
        same(calibrate_many(parts), single(parts))
        chunk, look = swept
        assert look == "look"
        assert [part.data_ptr() for part in chunk] == [part.data_ptr() for part in parts]


@on_device
def test_layouts_have_chunks_of_their_own(swept) -> None:  # type: ignore[no-untyped-def]
    stacked = normal(4, 32, 32)
    parts = [stacked[0], stacked[1].t(), stacked[2], stacked[3].t(), stacked[0, :, :16], stacked[0, :, 16:]]
    same(calibrate_many(parts), single(parts))
    assert [len(chunk) for chunk in chunks_of(swept)] == [2, 2, 2]


@on_device
def test_what_has_to_be_copied(swept) -> None:  # type: ignore[no-untyped-def]
    not_merged = normal(3, 8, 4, 32)[:, :, :2].unbind()
    for parts in (apart_by_8_bytes(normal(3, 32, 32)), not_merged, normal(3, 4, 32).double().unbind()):
        swept.clear()
        same(calibrate_many(parts), single(parts))
        chunk, look = swept
        assert look == "look"
        assert not {part.data_ptr() for part in chunk} & {part.data_ptr() for part in parts}


@on_device
def test_looks_when_all_is_launched(swept, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(_many, "_MOST_WEIGHTS", 2)
    weights = assorted(torch.float32)
    calibrate_many(weights)
    assert swept.index("look") == swept.count("look") == 5
    swept.clear()
    calibrate_many(weights, check_finite=False)
    assert "look" not in swept
    assert len(swept) == 5


# --- what is refused ----------------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize("implementation", ["triton", None])
def test_the_first_bad_weight_is_named(swept, implementation: str | None) -> None:  # type: ignore[no-untyped-def]
    """By its place, wherever its chunk is in the order of launches."""
    weights = [normal(4, 32), normal(2, 16), normal(4, 32), normal(2, 16), normal(16)]

    def refused(message: str) -> None:
        for function in (nt.calibrate_many, nt.quantize_many):
            for amax in (None, 1.0, torch.tensor(1.0, device=DEVICE)):
                with pytest.raises(ValueError, match=message):
                    function(weights, global_amax=amax, implementation=implementation)

    weights[2][3, 31] = torch.nan
    weights[3][0, 7] = -torch.inf
    refused(r"^weights\[2\]: weight\[3, 31\] is nan")
    weights[1][1, 0] = torch.inf
    refused(r"^weights\[1\]: weight\[1, 0\] is inf")
    with np.errstate(all="ignore"):
        found = nt.calibrate_many(weights, check_finite=False, implementation=implementation)
    same([found[0], found[4]], single([weights[0], weights[4]]))


@on_device
@pytest.mark.parametrize("implementation", ["triton", None])
def test_bad_global_amaxes(swept, implementation: str | None) -> None:  # type: ignore[no-untyped-def]
    weights = [normal(2, 16), normal(2, 32), normal(2, 16), normal(2, 32)]

    def refused(amax, message: str, error: type[Exception] = ValueError) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(error, match=message):
            nt.calibrate_many(weights, global_amax=amax, implementation=implementation)

    for bad in (-1.0, torch.nan, torch.inf):
        refused([1.0, 1.0, bad, 1.0], rf"^global_amax\[2\] is {bad}")
        tensors = [torch.tensor(value, device=DEVICE) for value in (1.0, 1.0, bad, 1.0)]
        refused(tensors, rf"^weights\[2\]: global_amax is {bad}")
    refused([None, None, -1.0, None], r"^global_amax\[2\] is -1")
    refused([1.0, 2.0, 3.0], "^global_amax has 3 values for 4 weights")
    refused(torch.ones(5), "^global_amax has 5 values for 4 weights")
    refused(torch.ones(4, 1, device=DEVICE), r"^weights\[0\]: global_amax has shape \(1,\)")
    refused([1.0, "2", 1.0, 1.0], "global_amax has dtype", TypeError)


@on_device
def test_what_is_wrong_with_a_weight() -> None:
    good = normal(4, 32)
    with pytest.raises(TypeError, match=r"^weights\[1\]: weight is a NumPy array"):
        nt.calibrate_many([good, np.ones((4, 32))])
    with pytest.raises(TypeError, match=r"^weights\[2\]: weight has dtype int64"):
        nt.calibrate_many([good, good, good.long()])
    with pytest.raises(TypeError, match=r"^weights\[1\]: weight has layout torch.sparse_coo"):
        nt.calibrate_many([good, good.to_sparse()])
    with pytest.raises(ValueError, match=r"^weights\[1\]: axis 1 .* block_size=16 does not divide"):
        nt.calibrate_many([good, normal(4, 20)])
    with pytest.raises(ValueError, match=r"^weights\[0\]: implementation='pallas' is unknown"):
        nt.calibrate_many([good], implementation="pallas")
    with pytest.raises(ValueError, match=r"^weights\[0\]: block_size=1 is odd"):
        nt.quantize_many([good], block_size=1)


# --- what only a CUDA device can show -----------------------------------------------------------------


@pytest.fixture
def experts():  # type: ignore[no-untyped-def]
    """64 small weights, and what single calls return; everything is compiled."""
    weights = [normal(256, 512, dtype=torch.bfloat16) for _ in range(64)]
    expected = [nt.calibrate(weight) for weight in weights]
    same(nt.calibrate_many(weights), expected)
    return weights, expected


@pytest.mark.gpu
def test_few_launches(experts) -> None:  # type: ignore[no-untyped-def]
    weights, expected = experts
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as profile:
        found = nt.calibrate_many(weights)
    same(found, expected)
    cuda = torch.autograd.DeviceType.CUDA
    names = [event.name for event in profile.events() if event.device_type == cuda]
    assert [sum(name == kernel for name in names) for kernel in ("largest", "tabulate", "sweep")] == [1, 1, 1]
    assert len(names) <= 8, names


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_waits_for_no_sweep(experts, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    weights, expected = experts
    monkeypatch.setattr(_many, "_MOST_WEIGHTS", 24)
    tensors = [weight.abs().max() for weight in weights]
    given = {"own": None, "number": 3.0, "numbers": [t.item() for t in tensors], "tensors": tensors}
    results, checked = {}, {}
    try:
        torch.cuda.set_sync_debug_mode("error")
        for name, amax in given.items():
            results[name] = nt.calibrate_many(weights, global_amax=amax, check_finite=False)
            checked[name] = nt.calibrate_many(weights, global_amax=amax)  # waits for an event of its own
    finally:
        torch.cuda.set_sync_debug_mode("default")
    threes = [nt.calibrate(weight, global_amax=3.0) for weight in weights]
    for found in (results, checked):
        for name in given:
            same(found[name], threes if name == "number" else expected)


@pytest.mark.gpu
def test_memory(experts, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """None where they lie well, else one chunk's copy at a time."""
    weights, _ = experts
    few, chunk = 4 << 20, 8 << 20
    monkeypatch.setattr(_many, "_MOST_BYTES", chunk)
    assert sum(weight.nbytes for weight in weights) == 2 * chunk
    for parts, copied in ((weights, 0), (apart_by_8_bytes(weights), chunk)):
        nt.calibrate_many(parts)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = nt.calibrate_many(parts)
        extra = torch.cuda.max_memory_allocated() - before - sum(f.nbytes for f in found)
        assert copied <= extra < copied + few


@pytest.mark.gpu
def test_side_stream_and_chunks_that_reuse_memory(experts, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Sweeps follow what the stream holds; so do copies, and the next waits for the last one's sweep."""
    weights, expected = experts
    monkeypatch.setattr(_many, "_MOST_WEIGHTS", 3)
    stream = torch.cuda.Stream()
    for targets in ([torch.empty_like(weight) for weight in weights], apart_by_8_bytes(weights)):
        for target in targets:
            target.fill_(1)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for target, weight in zip(targets, weights, strict=True):
                target.copy_(weight)
            found = nt.calibrate_many(targets, check_finite=False)
        stream.synchronize()
        same(found, expected)


@pytest.mark.gpu
def test_a_refusal_waits_for_what_is_written_to_the_host(experts, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Else the next call could be given that memory meanwhile."""
    weights, _ = experts
    monkeypatch.setattr(_many, "_MOST_WEIGHTS", 2)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    slept = torch.cuda.current_stream().record_event()
    with pytest.raises(TypeError, match=r"^weights\[2\]: weight has dtype int64"):
        nt.calibrate_many([*weights[:2], weights[2].long()])
    assert slept.query()


@pytest.mark.gpu
def test_graph_capture(experts, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    weights, expected = experts
    monkeypatch.setattr(_many, "_MOST_WEIGHTS", 24)
    static = [torch.zeros_like(weight) for weight in weights]
    nt.calibrate_many(static, check_finite=False)  # compile before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = nt.calibrate_many(static, check_finite=False)
    for target, weight in zip(static, weights, strict=True):
        target.copy_(weight)
    graph.replay()
    torch.cuda.synchronize()
    same(found, expected)


@pytest.mark.gpu
def test_several_devices(experts) -> None:  # type: ignore[no-untyped-def]
    weights, expected = experts
    here = torch.cuda.current_device()
    places = ["cpu", *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    spread = [weight.to(places[i % len(places)]) for i, weight in enumerate(weights)]
    found = nt.calibrate_many(spread)
    assert [f.device for f in found] == [weight.device for weight in spread]
    same([f.to(e.device) for f, e in zip(found, expected, strict=True)], expected)
    assert torch.cuda.current_device() == here
    spread[7] = spread[7].clone()
    spread[7][2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"^weights\[7\]: weight\[2, 3\] is nan"):
        nt.calibrate_many(spread)
