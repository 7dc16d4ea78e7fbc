"""What is special to tensors: memory, autograd, compilation, and the drop-ins for ModelOpt."""

import numpy as np
import pytest
from conftest import to_tensor

import nvfp4sweep

torch = pytest.importorskip("torch")
pytest.importorskip("numba")
import nvfp4sweep_torch as nt  # noqa: E402
from nvfp4sweep_torch import _tensors  # noqa: E402

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(32, 64, generator=GENERATOR)


def test_cpu_tensors_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = nvfp4sweep.calibrate

    def spy(array, **options):  # type: ignore[no-untyped-def]
        seen.append(array.ctypes.data)
        return real(array, **options)

    monkeypatch.setattr(nvfp4sweep, "calibrate", spy)
    for weight in (WEIGHT, WEIGHT.half(), WEIGHT.bfloat16(), WEIGHT.t(), WEIGHT[3:, 16:48]):
        nt.calibrate(weight)
        assert seen.pop() == weight.data_ptr()


def test_rows_further_apart_than_int32_counts() -> None:
    if not _tensors.interpreting():
        pytest.skip("the interpreter runs the kernels' address arithmetic on memory that is not touched")
    storage = torch.empty(2**31 + 512, dtype=torch.bfloat16)
    for shape in ((2, 512), (2, 16)):
        weight = storage.as_strided(shape, (2**31, 1))
        weight.copy_(torch.randn(shape, generator=GENERATOR))
        with np.errstate(all="ignore"):  # the interpreter computes with NumPy, overflow included
            found = nt.sweep(weight, implementation="triton")
        expected = nt.sweep(weight.clone(), implementation="oracle")
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_views_and_parameters(dtype: torch.dtype) -> None:
    weight = WEIGHT.to(dtype)
    expected = nt.calibrate(weight, implementation="oracle")
    for same in (torch.nn.Parameter(weight), weight.clone().requires_grad_(), weight.t().contiguous().t()):
        result = nt.calibrate(same)
        assert torch.equal(result, expected)
        assert result.dtype == torch.float32
        assert not result.requires_grad
    assert torch.equal(nt.calibrate(weight.t(), axis=0), expected.t())
    assert torch.equal(nt.calibrate(weight[::2]), expected[::2]) == bool(
        weight[::2].abs().max() == weight.abs().max()
    )


def test_lazily_negated_tensor() -> None:
    negated = torch.complex(torch.zeros_like(WEIGHT), WEIGHT).conj().imag
    assert negated.is_neg()
    assert torch.equal(nt.calibrate(negated), nt.calibrate(WEIGHT))


def test_zero_blocks_and_one_block() -> None:
    assert nt.calibrate(torch.zeros(0, 16)).shape == (0, 1)
    assert nt.calibrate(WEIGHT[0, :16]).shape == (1,)
    assert nt.sweep(torch.zeros(2, 16)).code.tolist() == [[1], [1]]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend: str) -> None:
    @torch.compile(fullgraph=True, backend=backend)
    def compiled(w, amax):  # type: ignore[no-untyped-def]
        own = nt.calibrate(w * 2, axis=-1)
        found = nt.sweep(w, global_amax=amax)
        packed = nt.quantize(w, global_amax=7.0)
        return own + 1, found.code, found.error, packed.packed, packed.scale, packed.global_scale

    amax = torch.tensor(5.0)
    own, code, error, packed, scale, global_scale = compiled(WEIGHT, amax)
    expected = nt.sweep(WEIGHT, global_amax=amax)
    quantized = nt.quantize(WEIGHT, global_amax=7.0)
    assert torch.equal(own, nt.calibrate(WEIGHT * 2) + 1)
    assert torch.equal(code, expected.code)
    assert torch.equal(error, expected.error)
    assert torch.equal(packed, quantized.packed)
    assert torch.equal(scale.view(torch.uint8), quantized.scale.view(torch.uint8))
    assert torch.equal(global_scale, quantized.global_scale)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_with_objectives(backend: str) -> None:
    @torch.compile(fullgraph=True, backend=backend)
    def compiled(w, h, hessian):  # type: ignore[no-untyped-def]
        found = nt.sweep(w, importance=h)
        packed = nt.quantize(w, hessian=hessian)
        return nt.calibrate(w, importance=h * 2), found.code, found.error, packed.packed, packed.scale

    h = torch.rand(WEIGHT.shape[1], generator=GENERATOR)
    hessian = nt.HessianAccumulator(WEIGHT.shape).add(WEIGHT).hessian()
    amax, code, error, packed, scale = compiled(WEIGHT, h, hessian)
    expected = nt.sweep(WEIGHT, importance=h, implementation="oracle")
    quantized = nt.quantize(WEIGHT, hessian=hessian, implementation="oracle")
    assert torch.equal(amax, expected.amax)
    assert torch.equal(code, expected.code)
    assert torch.equal(error, expected.error)
    assert torch.equal(packed, quantized.packed)
    assert torch.equal(scale.view(torch.uint8), quantized.scale.view(torch.uint8))
    assert not torch.equal(amax, nt.calibrate(WEIGHT))


@pytest.mark.parametrize("name", ["calibrate", "sweep", "quantize"])
def test_operators_are_well_formed(name: str) -> None:
    operator = getattr(torch.ops.nvfp4sweep, name).default
    columns = WEIGHT.shape[1]
    hessian = torch.eye(16).repeat(columns // 16, 1, 1)
    for arrays, options in (
        ((WEIGHT, None, None, None), (-1, 16, 0, 1, True, None)),
        ((WEIGHT.t(), torch.tensor(9.0), None, None), (0, 32, 0, 8, False, "oracle")),
        ((WEIGHT, None, torch.arange(columns), None), (-1, 16, 0, 1, True, "oracle")),
        ((WEIGHT[:8], None, None, hessian), (-1, 16, 0, 1, True, "oracle")),
    ):
        torch.library.opcheck(operator, (*arrays, *options))


def test_quantized_tensor_dequantizes_as_the_core_does() -> None:
    for axis in (0, 1):
        ours = nt.quantize(WEIGHT[:16], axis=axis)
        core = nvfp4sweep.quantize(WEIGHT[:16].numpy(), axis=axis)
        np.testing.assert_array_equal(ours.dequantize().numpy(), core.dequantize())
        assert ours.dequantize(torch.bfloat16).dtype == torch.bfloat16
        assert ours.scale.dtype == torch.float8_e4m3fn


# --- drop-ins -------------------------------------------------------------------------------------

BLOCKS = WEIGHT.reshape(-1, 16)
AMAX = WEIGHT.abs().max()


def fake_quantize(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """NVFP4 values of x under block amaxes, in float64: an independent quant_func."""
    scale = (amax.reshape(-1, 1) / 6).double()
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    nearest = (x.double().abs()[..., None] - grid * scale[..., None]).abs().argmin(-1)
    return grid[nearest] * scale * x.double().sign()


def test_calibrator_finds_the_exact_amax() -> None:
    initial = BLOCKS.abs().amax(dim=1)
    calibrator = nt.NVFP4MSECalibrator(initial, AMAX)
    assert calibrator.compute_amax() is None
    calibrator.collect(BLOCKS)
    expected = nt.calibrate(BLOCKS, implementation="oracle").reshape(-1)
    assert torch.equal(calibrator.compute_amax(), expected)
    assert torch.equal(nt.nvfp4_fp8_scale_sweep(WEIGHT, AMAX), expected)


def test_drop_ins_with_a_hessian() -> None:
    """It is shared by rows, and goes before an error_func; the blocks are those of calibrate."""
    x = torch.randn(300, 64, generator=GENERATOR)
    hessian = nt.HessianAccumulator(WEIGHT.shape).add(x).hessian()
    expected = nt.calibrate(WEIGHT, hessian=hessian, implementation="oracle").reshape(-1)
    assert torch.equal(nt.nvfp4_fp8_scale_sweep_hessian(WEIGHT, AMAX, hessian), expected)
    assert torch.equal(nt.nvfp4_fp8_scale_sweep_hessian(BLOCKS, AMAX.item(), hessian), expected)
    assert not torch.equal(expected, nt.nvfp4_fp8_scale_sweep(WEIGHT, AMAX))
    calibrator = nt.NVFP4MSECalibrator(
        torch.ones(128, 1), AMAX, error_func=lambda x, xq: (x - xq).abs(), hessian=hessian
    )
    calibrator.collect(BLOCKS)
    assert torch.equal(calibrator.compute_amax(), expected[:, None])
    with pytest.raises(ValueError, match=r"hessian has shape \(5, 16, 16\), of 80 inputs"):
        nt.nvfp4_fp8_scale_sweep_hessian(WEIGHT, AMAX, torch.zeros(5, 16, 16))
    with pytest.raises(ValueError, match="global_amax has shape"):
        nt.nvfp4_fp8_scale_sweep_hessian(WEIGHT, torch.ones(2), hessian)


@pytest.mark.parametrize("kind", [torch.bool, torch.complex64])
@pytest.mark.parametrize("implementation", ["cpu", "triton"])
def test_weights_of_errors_are_real(kind: torch.dtype, implementation: str) -> None:
    if implementation == "triton" and not _tensors.interpreting():
        pytest.skip("TRITON_INTERPRET is not set")
    for options in ({"importance": torch.ones(64, dtype=kind)}, {"hessian": torch.ones(4, 16, 16).to(kind)}):
        with pytest.raises(TypeError, match="must be real numbers"):
            nt.calibrate(WEIGHT, implementation=implementation, **options)


@pytest.mark.parametrize("shape", [(128,), (128, 1), (32, 4)])
def test_calibrator_keeps_the_initial_shape(shape: tuple[int, ...]) -> None:
    calibrator = nt.NVFP4MSECalibrator(torch.ones(shape, dtype=torch.bfloat16), AMAX, axis=0)
    calibrator.collect(BLOCKS.bfloat16())
    result = calibrator.compute_amax()
    assert result.shape == shape
    assert result.dtype == torch.float32


def test_calibrator_collects_once_between_resets() -> None:
    calibrator = nt.NVFP4MSECalibrator(torch.ones(128), AMAX)
    calibrator.collect(BLOCKS)
    first = calibrator.compute_amax()
    with pytest.raises(RuntimeError, match=r"reset\(\)"):
        calibrator.collect(BLOCKS)
    calibrator.reset()
    assert calibrator.compute_amax() is None
    calibrator.collect(BLOCKS * 0.5)
    assert not torch.equal(calibrator.compute_amax(), first)


@pytest.mark.parametrize("shape", [(127, 16), (128 * 16,), (32, 64), (2, 64, 16)])
def test_calibrator_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    calibrator = nt.NVFP4MSECalibrator(torch.ones(128), AMAX)
    with pytest.raises(ValueError, match=r"x has shape .*n_blocks=128"):
        calibrator.collect(torch.ones(shape))
    calibrator.collect(BLOCKS)  # nothing was collected by the refused call


def test_calibrator_honours_an_error_function() -> None:
    """|x - xq| instead of its square; and the square by brute force equals the exact sweep."""
    shapes = []

    def quant_func(x, amax):  # type: ignore[no-untyped-def]
        shapes.append(tuple(amax.shape))
        return fake_quantize(x, amax)

    def search(error_func):  # type: ignore[no-untyped-def]
        calibrator = nt.NVFP4MSECalibrator(
            torch.ones(128, 1), AMAX, quant_func=quant_func, error_func=error_func
        )
        calibrator.collect(BLOCKS)
        return calibrator.compute_amax().reshape(-1)

    squared = search(lambda x, xq: (x - xq) ** 2)
    assert len(shapes) == 126
    assert set(shapes) == {(128, 1)}
    assert torch.equal(squared, nt.nvfp4_fp8_scale_sweep(BLOCKS, AMAX))
    absolute = search(lambda x, xq: (x - xq).abs())
    by_block = search(lambda x, xq: (x - xq).abs().sum(dim=1))
    assert torch.equal(absolute, by_block)
    assert not torch.equal(absolute, squared)
    for row, amax in enumerate(absolute[:8]):
        errors = [(BLOCKS[row] - fake_quantize(BLOCKS[row : row + 1], c * AMAX)).abs().sum()
                  for c in nt.fp8_scale_candidates("cpu")]  # fmt: skip
        assert amax == nt.fp8_scale_candidates("cpu")[int(torch.stack(errors).argmin())] * AMAX


def test_error_function_needs_a_quantizer() -> None:
    calibrator = nt.NVFP4MSECalibrator(torch.ones(128), AMAX, error_func=lambda x, xq: x - xq)
    with pytest.raises(RuntimeError, match="quant_func"):
        calibrator.collect(BLOCKS)


def test_drop_ins_refuse() -> None:
    with pytest.raises(ValueError, match="axis=1"):
        nt.NVFP4MSECalibrator(torch.ones(128), AMAX, axis=1)
    with pytest.raises(ValueError, match="global_amax"):
        nt.NVFP4MSECalibrator(torch.ones(128), torch.ones(2))
    with pytest.raises(TypeError, match="list"):
        nt.nvfp4_fp8_scale_sweep([1.0], AMAX)
    with pytest.raises(ValueError, match="block_size=16"):
        nt.nvfp4_fp8_scale_sweep(torch.ones(17), AMAX)


def test_candidates_as_published() -> None:
    codes = torch.arange(1, 127, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float() / torch.tensor(448.0)
    assert torch.equal(nt.fp8_scale_candidates(), expected)


def test_to_tensor_keeps_strides() -> None:
    assert to_tensor(WEIGHT.numpy().T).stride() == WEIGHT.t().stride()
