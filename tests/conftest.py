"""Engines by fixture: each takes NumPy arrays and options, and gives NumPy arrays back."""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton_interpreter

import nvfp4sweep


def _cuda_is_available() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


CUDA = _cuda_is_available()
if CUDA:
    # Before JAX is imported: the processes of a parallel run, and PyTorch in each, share the device's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
else:
    # Before Triton is imported: its kernels then run on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        triton_interpreter.hasten()

#: Engines that must not be skipped, as NVFP4SWEEP_REQUIRE=triton,jax on a machine that has them.
REQUIRED = set(filter(None, os.environ.get("NVFP4SWEEP_REQUIRE", "").split(",")))

Answer = Callable[..., Any]


@dataclass(frozen=True)
class Engine:
    """One way to reach an answer. quantize gives [packed, scale bytes, global scale]."""

    name: str
    sweep: Answer
    quantize: Answer
    calibrate: Answer
    rows: int = 64  # of a case: what suits its speed

    def __str__(self) -> str:
        return self.name


def _numpy_engine() -> Engine:
    def quantize(weight: Any, **options: Any) -> list[Any]:
        result = nvfp4sweep.quantize(weight, implementation="cpu", **options)
        return [result.packed, result.scale.view(np.uint8), result.global_scale]

    return Engine(
        "cpu",
        functools.partial(nvfp4sweep.sweep, implementation="cpu"),
        quantize,
        functools.partial(nvfp4sweep.calibrate, implementation="cpu"),
    )


def to_tensor(weight: Any, device: str = "cpu") -> Any:
    """A tensor with the array's values and strides."""
    import torch

    if weight.dtype.name == "bfloat16":
        return torch.from_numpy(weight.view(np.int16).copy(order="K")).view(torch.bfloat16).to(device)
    return torch.from_numpy(weight.copy(order="K")).to(device)


def from_tensor(tensor: Any) -> Any:
    import torch

    if tensor.dtype is torch.float8_e4m3fn:
        tensor = tensor.view(torch.uint8)
    return tensor.cpu().numpy()


def _torch_engine(name: str, device: str, implementation: str, rows: int) -> Engine:
    import nvfp4sweep_torch

    def call(function: Answer) -> Answer:
        def run(weight: Any, **options: Any) -> Any:
            with np.errstate(all="ignore"):  # the interpreter computes with NumPy, overflow included
                result = function(to_tensor(weight, device), implementation=implementation, **options)
            if isinstance(result, nvfp4sweep_torch.QuantizedTensor):
                return [from_tensor(t) for t in (result.packed, result.scale, result.global_scale)]
            if isinstance(result, tuple):
                return nvfp4sweep.Sweep(*map(from_tensor, result))
            return from_tensor(result)

        return run

    functions = (nvfp4sweep_torch.sweep, nvfp4sweep_torch.quantize, nvfp4sweep_torch.calibrate)
    return Engine(name, *map(call, functions), rows=rows)


def _jax_engine(name: str, implementation: str | None = None) -> Engine:
    import jax
    import jax.numpy as jnp

    import nvfp4sweep_jax

    traced = name != "jax"

    @functools.cache
    def jitted(function: Answer, options: tuple[tuple[str, Any], ...]) -> Answer:
        """One compilation for all weights of a shape: the global amax is traced too."""
        return jax.jit(lambda w, amax: function(w, global_amax=amax, **dict(options)))

    def call(function: Answer) -> Answer:
        def run(weight: Any, **options: Any) -> Any:
            array = jnp.asarray(weight.astype(np.float32) if weight.dtype == np.float64 else weight)
            options["implementation"] = implementation
            if traced:
                amax = options.pop("global_amax", None)
                result = jitted(function, tuple(options.items()))(array, amax)
            else:
                result = function(array, **options)
            if isinstance(result, nvfp4sweep_jax.QuantizedTensor):
                return [
                    np.asarray(result.packed),
                    np.asarray(result.scale).view(np.uint8),
                    np.asarray(result.global_scale),
                ]
            if isinstance(result, tuple):
                return nvfp4sweep.Sweep(*map(np.asarray, result))
            return np.asarray(result)

        return run

    functions = (nvfp4sweep_jax.sweep, nvfp4sweep_jax.quantize, nvfp4sweep_jax.calibrate)
    return Engine(name, *map(call, functions))


_ENGINES: dict[str, tuple[list[str], Callable[[], Engine]]] = {
    "cpu": (["numba"], _numpy_engine),
    "torch": (["numba", "torch"], lambda: _torch_engine("torch", "cpu", "cpu", 64)),
    "triton": (
        ["torch", "triton"],
        lambda: _torch_engine("triton", *(("cuda", "triton", 64) if CUDA else ("cpu", "triton", 2))),
    ),
    "jax": (["jax", "triton"] if CUDA else ["numba", "jax"], lambda: _jax_engine("jax")),
    "jit": (["jax", "triton"] if CUDA else ["jax"], lambda: _jax_engine("jit")),
}
#: Those of them that run all cases with an importance or a hessian. Others take some: test_jax_objectives.py.
SERVES_OBJECTIVES = ["cpu", "torch", "jax"]
#: What runs on a CUDA device where there is one.
ON_DEVICE = {"triton", "jax", "jit", "xla"}
if CUDA:  # elsewhere it is what "jit" chooses
    _ENGINES["xla"] = (["jax"], lambda: _jax_engine("xla", "xla"))


def _parameter(name: str) -> Any:
    return pytest.param(name, marks=[pytest.mark.gpu] if CUDA and name in ON_DEVICE else [])


@pytest.fixture(scope="session", params=[_parameter(name) for name in _ENGINES])
def engine(request: pytest.FixtureRequest) -> Engine:
    return _engine(request.param)


@pytest.fixture(scope="session", params=[_parameter(name) for name in SERVES_OBJECTIVES])
def objective_engine(request: pytest.FixtureRequest) -> Engine:
    return _engine(request.param)


@functools.cache
def _engine(name: str) -> Engine:
    needs, make = _ENGINES[name]
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        reason = f"engine {name} needs {', '.join(missing)}, which is not installed"
        if REQUIRED & {name, *missing}:
            pytest.fail(reason)
        pytest.skip(reason)
    return make()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not CUDA:
        (pytest.fail if REQUIRED else pytest.skip)("no CUDA device")
    if CUDA:
        import torch

        torch.cuda.set_device(0)  # once it has been used, JAX leaves its last device the current one


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model's folder, to be quantized."""
    from quantize_models import make_tensors, write_model  # which needs extras that most tests do without

    return write_model(tmp_path / "model", make_tensors())


@pytest.fixture
def on_host() -> Iterator[None]:
    """JAX makes its arrays on the CPU, also where there is a GPU."""
    import jax

    with jax.default_device(jax.devices("cpu")[0]):
        yield
