"""Bad input, one table: each gets an exception that names the argument and what would be right."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import nvfp4sweep

torch = pytest.importorskip("torch")
jnp = pytest.importorskip("jax.numpy")
import nvfp4sweep_jax  # noqa: E402
import nvfp4sweep_torch  # noqa: E402

WEIGHT = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
ONES = np.ones(32, np.float32)
EYES = np.tile(np.eye(16, dtype=np.float32), (2, 1, 1))

PACKAGES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "numpy": (nvfp4sweep, np.asarray),
    "torch": (nvfp4sweep_torch, lambda a: torch.from_numpy(np.array(a))),
    "jax": (nvfp4sweep_jax, jnp.asarray),
}


def with_value(value: float) -> Any:
    w = WEIGHT.copy()
    w[2, 5] = value
    w[3, 1] = value
    return w


#: (what is wrong, weight, options, exception, words that the message must have)
TABLE: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    ("integers", WEIGHT.astype(np.int32), {}, TypeError, r"weight has dtype int32: .*bfloat16"),
    ("complex", WEIGHT.astype(np.complex64), {}, TypeError, r"weight has dtype complex64"),
    ("bools", WEIGHT > 0, {}, TypeError, r"weight has dtype bool"),
    ("nan", with_value(np.nan), {}, ValueError, r"weight\[2, 5\] is nan: .*check_finite"),
    ("inf", with_value(np.inf), {}, ValueError, r"weight\[2, 5\] is inf"),
    ("minus inf", with_value(-np.inf), {}, ValueError, r"weight\[2, 5\] is -inf"),
    ("nan, amax given", with_value(np.nan), {"global_amax": 1.0}, ValueError, r"weight\[2, 5\] is nan"),
    ("axis not divisible", WEIGHT[:, :30], {}, ValueError, r"axis 1 .*\(4, 30\) .*length 30.*block_size=16"),
    ("block_size zero", WEIGHT, {"block_size": 0}, ValueError, r"block_size=0 must lie in 1 \.\. "),
    ("block_size negative", WEIGHT, {"block_size": -16}, ValueError, r"block_size=-16 must lie"),
    ("block_size bool", WEIGHT, {"block_size": True}, TypeError, r"block_size=True is a bool"),
    ("block_size float", WEIGHT, {"block_size": 16.0}, TypeError, r"block_size=16\.0 is a float"),
    ("axis too large", WEIGHT, {"axis": 2}, ValueError, r"axis=2 is out of range .*\(4, 32\)"),
    ("axis too small", WEIGHT, {"axis": -3}, ValueError, r"axis=-3 is out of range"),
    ("axis of a scalar", np.float32(3), {}, ValueError, r"axis=-1 is out of range .*\(\)"),
    ("axis in the batch", WEIGHT, {"axis": 0, "batch_dims": 1}, ValueError, r"axis=0 .*batch_dims=1"),
    ("batch_dims negative", WEIGHT, {"batch_dims": -1}, ValueError, r"batch_dims=-1 is out of range"),
    ("batch_dims too large", WEIGHT, {"batch_dims": 2}, ValueError, r"batch_dims=2 is out of range"),
    ("amax negative", WEIGHT, {"global_amax": -1.0}, ValueError, r"global_amax is -1\.0: .*>= 0"),
    ("amax nan", WEIGHT, {"global_amax": float("nan")}, ValueError, r"global_amax is nan"),
    ("amax inf", WEIGHT, {"global_amax": float("inf")}, ValueError, r"global_amax is inf"),
    ("amax shape", WEIGHT, {"global_amax": np.ones(3)}, ValueError, r"global_amax has shape \(3,\)"),
    (
        "amax of the wrong batch", WEIGHT, {"global_amax": np.ones(3, np.float32), "batch_dims": 1},
        ValueError, r"global_amax has shape \(3,\).*batch_dims=1.*\(4,\)",
    ),
    ("min_code zero", WEIGHT, {"min_code": 0}, ValueError, r"min_code=0 must lie in 1 \.\. 126"),
    ("min_code 127", WEIGHT, {"min_code": 127}, ValueError, r"min_code=127 must lie in 1 \.\. 126"),
    ("engine unknown", WEIGHT, {"implementation": "cuda"}, ValueError, r"='cuda' is unknown.*oracle"),
]  # fmt: skip


def changed(array: Any, index: Any, value: float) -> Any:
    array = array.copy()
    array[index] = value
    return array


#: (what is wrong, options, exception, words that the message must have)
OBJECTIVES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("both", {"importance": ONES, "hessian": EYES}, ValueError, r"importance and hessian are both given"),
    ("hessian of 32", {"hessian": EYES, "block_size": 32}, ValueError, r"block_size=32 must be 16"),
    ("importance shape", {"importance": np.ones(5)}, ValueError, r"importance has shape \(5,\).*\(4, 32\)"),
    ("importance larger", {"importance": np.ones((3, 4, 32))}, ValueError, r"importance .*\(3, 4, 32\)"),
    ("importance < 0", {"importance": changed(ONES, 3, -2)}, ValueError, r"importance\[3\] is -2\.0.*>= 0"),
    ("importance nan", {"importance": changed(ONES, 7, np.nan)}, ValueError, r"importance\[7\] is nan.*fin"),
    ("importance inf", {"importance": changed(ONES, 7, np.inf)}, ValueError, r"importance\[7\] is inf"),
    ("importance beyond float32", {"importance": 1e39}, ValueError, r"importance is inf"),
    ("importance complex", {"importance": ONES + 1j}, TypeError, r"importance has dtype complex"),
    ("importance bool", {"importance": ONES > 0}, TypeError, r"importance has dtype bool"),
    ("hessian shape", {"hessian": EYES[0]}, ValueError, r"hessian has shape \(16, 16\).*\[2, 16, 16\]"),
    ("hessian blocks", {"hessian": EYES[:1]}, ValueError, r"hessian has shape \(1, 16, 16\).*\[2, 16, 16\]"),
    (
        "hessian of the wrong batch", {"hessian": np.stack([EYES] * 3), "batch_dims": 1},
        ValueError, r"hessian has shape \(3, 2, 16, 16\).*\[4, 2, 16, 16\] for one a matrix",
    ),
    ("hessian nan", {"hessian": changed(EYES, (1, 2, 3), np.nan)}, ValueError, r"hessian\[1, 2, 3\] is nan"),
    ("hessian inf", {"hessian": changed(EYES, (1, 2, 3), np.inf)}, ValueError, r"hessian\[1, 2, 3\] is inf"),
    (
        "hessian not symmetric", {"hessian": changed(EYES, (1, 2, 3), 0.5)},
        ValueError, r"hessian\[1, 2, 3\] is 0\.5 and its mirror image is 0\.0.*symmetric",
    ),
    (
        "hessian not positive", {"hessian": changed(EYES, (1, 2, 2), -0.5)},
        ValueError, r"hessian\[1\] has the eigenvalue -0\.5.*positive semidefinite",
    ),
    ("hessian complex", {"hessian": EYES + 0j}, TypeError, r"hessian has dtype complex"),
]  # fmt: skip


@pytest.mark.parametrize("package", [*PACKAGES, "jax, in XLA"])
@pytest.mark.parametrize("function", ["calibrate", "sweep", "quantize"])
@pytest.mark.parametrize(
    ("options", "error", "message"), [row[1:] for row in OBJECTIVES], ids=[r[0] for r in OBJECTIVES]
)
def test_objectives(package: str, function: str, options: dict[str, Any], error: Any, message: str) -> None:
    if package == "jax, in XLA":
        package, options = "jax", options | {"implementation": "xla"}
    module, convert = PACKAGES[package]
    weight = convert(WEIGHT.reshape(4, 1, 32) if "batch_dims" in options else WEIGHT)
    given = {k: convert(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    with pytest.raises(error, match=message):
        getattr(module, function)(weight, **given)


@pytest.mark.parametrize("package", PACKAGES)
def test_unchecked_objectives_give_no_exception(package: str) -> None:
    module, convert = PACKAGES[package]
    for name, values in (
        ("importance", changed(changed(ONES, 7, np.nan), 20, -1)),
        ("importance", changed(ONES, slice(None), np.inf)),
        ("hessian", changed(changed(EYES, (0, 2, 3), np.nan), (1, 4, 4), -3)),
        ("hessian", changed(EYES, (1, 5), np.inf)),
    ):
        for function in ("calibrate", "sweep"):
            options = {name: convert(values), "check_finite": False}
            getattr(module, function)(convert(WEIGHT), **options)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("function", ["calibrate", "sweep", "quantize"])
@pytest.mark.parametrize(
    ("weight", "options", "error", "message"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_table(
    package: str, function: str, weight: Any, options: dict[str, Any], error: Any, message: str
) -> None:
    module, convert = PACKAGES[package]
    if package == "numpy":
        weight = np.array(weight)
    with pytest.raises(error, match=message):
        getattr(module, function)(convert(weight), **options)


@pytest.mark.parametrize("function", ["calibrate", "sweep", "quantize", "global_amax"])
def test_arrays_of_other_packages(function: str) -> None:
    tensor, array = torch.from_numpy(WEIGHT.copy()), jnp.asarray(WEIGHT)
    for module, wrong, right in [
        (nvfp4sweep, tensor, "nvfp4sweep_torch"),
        (nvfp4sweep, array, "nvfp4sweep_jax"),
        (nvfp4sweep_torch, array, "nvfp4sweep_jax"),
        (nvfp4sweep_torch, WEIGHT, "use nvfp4sweep$"),
        (nvfp4sweep_jax, tensor, "nvfp4sweep_torch"),
        (nvfp4sweep_jax, WEIGHT, "use nvfp4sweep$"),
    ]:
        with pytest.raises(TypeError, match=right):
            getattr(module, function)(wrong)
    for module in (nvfp4sweep, nvfp4sweep_torch, nvfp4sweep_jax):
        with pytest.raises(TypeError, match="list"):
            getattr(module, function)([[1.0] * 16])


def test_byte_order() -> None:
    with pytest.raises(TypeError, match="byte order"):
        nvfp4sweep.calibrate(WEIGHT.astype(">f4"))


def test_tensors_without_plain_memory() -> None:
    tensor = torch.from_numpy(WEIGHT.copy())
    with pytest.raises(TypeError, match=r"layout torch\.sparse_coo"):
        nvfp4sweep_torch.calibrate(tensor.to_sparse())
    with pytest.raises(ValueError, match="device meta"):
        nvfp4sweep_torch.calibrate(tensor.to("meta"))
    with pytest.raises(TypeError, match="dtype float8_e4m3fn"):
        nvfp4sweep_torch.calibrate(tensor.to(torch.float8_e4m3fn))
    with pytest.warns(UserWarning, match="quantized tensor"), pytest.raises(TypeError, match="dtype qint8"):
        nvfp4sweep_torch.calibrate(torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8))


def test_amax_on_another_device() -> None:
    tensor = torch.from_numpy(WEIGHT.copy())
    with pytest.raises(ValueError, match="global_amax is on device meta"):
        nvfp4sweep_torch.calibrate(tensor, global_amax=torch.ones((), device="meta"))


def test_cuda_engine_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'triton' cannot serve a NumPy array: choose one of oracle, cpu"):
        nvfp4sweep.calibrate(WEIGHT, implementation="triton")
    monkeypatch.setattr(nvfp4sweep_torch._tensors, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="'triton' cannot serve a tensor on cpu: choose one of cpu, oracle"):
        nvfp4sweep_torch.calibrate(torch.from_numpy(WEIGHT.copy()), implementation="triton")
    with pytest.raises(ValueError, match="'xla' cannot serve a tensor on cpu"):
        nvfp4sweep_torch.calibrate(torch.from_numpy(WEIGHT.copy()), implementation="xla")


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVFP4SWEEP_IMPLEMENTATION", "nonsense")
    for module, convert in PACKAGES.values():
        with pytest.raises(ValueError, match="NVFP4SWEEP_IMPLEMENTATION='nonsense'"):
            module.calibrate(convert(WEIGHT))
        module.calibrate(convert(WEIGHT), implementation="oracle")  # the argument wins
    monkeypatch.setenv("NVFP4SWEEP_IMPLEMENTATION", "oracle")
    import nvfp4sweep.oracle

    calls = []
    search = nvfp4sweep.oracle.search
    monkeypatch.setattr(nvfp4sweep.oracle, "search", lambda *a: calls.append(1) or search(*a))
    for module, convert in PACKAGES.values():
        before = len(calls)
        module.calibrate(convert(WEIGHT))
        assert len(calls) > before


def test_odd_blocks_cannot_be_packed() -> None:
    for module, convert in PACKAGES.values():
        with pytest.raises(ValueError, match="block_size=15 is odd"):
            module.quantize(convert(WEIGHT[:, :30]), block_size=15)


def test_unchecked_weight_gives_no_exception() -> None:
    for module, convert in PACKAGES.values():
        result = module.calibrate(convert(with_value(np.nan)), check_finite=False, global_amax=3.0)
        assert result.shape == (4, 2)


def test_global_amax() -> None:
    a, b = WEIGHT, WEIGHT * np.float32(3)
    stacked = np.stack([a, b])
    for module, convert in PACKAGES.values():
        assert float(module.global_amax(convert(a), convert(b))) == np.abs(b).max()
        both = np.asarray(module.global_amax(convert(stacked), batch_dims=1))
        np.testing.assert_array_equal(both, np.abs(stacked).max(axis=(1, 2)))
        with pytest.raises(ValueError, match="weights"):
            module.global_amax()
        with pytest.raises(ValueError, match=r"\[2, 5\] is nan"):
            module.global_amax(convert(with_value(np.nan)))
        with pytest.raises(ValueError, match="weights"):
            module.global_amax(convert(stacked), convert(stacked[:1]), batch_dims=1)
