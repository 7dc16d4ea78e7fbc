"""Who may import whom, checked on the source and on what is really loaded; and that the checks can fail."""

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import nvfp4sweep

CORE = Path(nvfp4sweep.__file__).parent
FRAMEWORKS = {"torch", "jax", "jaxlib", "flax"}
HEAVY = {"numba", "triton", "torch", "jax", "typer", "rich", "matplotlib", "safetensors"}

#: For each module of the core, the modules of the core that it may import (besides itself).
ALLOWED: dict[str, set[str]] = {
    "formats": set(),
    "window": {"formats"},
    "packing": {"formats"},
    "problem": {"formats", "window"},
    "moments": {"problem"},
    "objectives": {"problem", "window"},
    "oracle": {"formats", "packing"},
    "lanes": set(),
    "cpu_tiles": {"formats", "lanes", "window"},
    "cpu_exact": {"formats", "lanes", "window"},
    "cpu_forms": {"formats"},
    "cpu_kernels": {"formats", "lanes", "window", "cpu_exact", "cpu_tiles"},
    "cpu_importance": {"formats", "lanes", "window", "cpu_exact", "cpu_tiles"},
    "cpu_hessian_codes": {"formats", "lanes", "window", "cpu_forms", "cpu_tiles"},
    "cpu_hessian": {"formats", "lanes", "window", "cpu_exact", "cpu_hessian_codes", "cpu_tiles"},
    "cpu_searches": {
        "formats",
        "objectives",
        "window",
        "cpu_kernels",
        "cpu_importance",
        "cpu_hessian",
        "cpu_hessian_codes",
    },
    "cpu": {"formats", "cpu_kernels", "cpu_searches"},
    "triton_tables": {"formats", "window"},
    "triton_arithmetic": set(),
    "triton_blocks": {"triton_tables"},
    "triton_search": {"triton_arithmetic", "triton_blocks", "triton_tables", "window"},
    "triton_kernels": {"triton_arithmetic", "triton_blocks", "triton_search", "triton_tables", "window"},
    "triton_importance": {"triton_arithmetic", "triton_blocks", "triton_search", "triton_tables", "window"},
    "triton_hessian_tables": {"triton_tables", "window"},
    "triton_hessian_exact": {"triton_arithmetic", "triton_blocks", "triton_hessian_tables", "window"},
    "triton_hessian": {
        "triton_arithmetic",
        "triton_blocks",
        "triton_hessian_exact",
        "triton_hessian_tables",
        "triton_search",
        "triton_tables",
        "window",
    },
    "triton_build": {"triton_arithmetic"},
    "triton_sweeps": {
        "problem",
        "triton_build",
        "triton_hessian",
        "triton_hessian_tables",
        "triton_importance",
        "triton_kernels",
        "window",
    },
    "triton_launch": {
        "problem",
        "triton_arithmetic",
        "triton_build",
        "triton_sweeps",
        "triton_tables",
        "window",
    },
    "api": {"formats", "objectives", "oracle", "packing", "problem", "cpu"},
    "__init__": {"api", "formats", "objectives", "packing"},
}


COMMANDS = {"__main__", "cli", "cli_checkpoint", "cli_common", "cli_ranks"}


def imports(source: str) -> set[str]:
    """Every module that the source imports, inside functions too, with `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def core_imports(source: str) -> set[str]:
    parts = [name.split(".") for name in imports(source)]
    return {p[1] for p in parts if p[0] == "nvfp4sweep" and len(p) > 1 and p[1] in ALLOWED}


@pytest.mark.parametrize("module", ALLOWED)
def test_core_layers(module: str) -> None:
    assert core_imports((CORE / f"{module}.py").read_text()) <= ALLOWED[module]


def test_every_core_module_has_a_rule() -> None:
    assert {path.stem for path in CORE.glob("*.py")} - COMMANDS == set(ALLOWED)


@pytest.mark.parametrize(
    "path", [*CORE.glob("*.py"), *(CORE / "checkpoint").glob("*.py")], ids=lambda p: p.stem
)
def test_core_knows_no_framework(path: Path) -> None:
    roots = {name.partition(".")[0] for name in imports(path.read_text())}
    if path.stem in COMMANDS:  # they are above the adapters
        return
    assert not roots & (FRAMEWORKS | {"nvfp4sweep_torch", "nvfp4sweep_jax"})


def test_adapters_do_not_know_each_other() -> None:
    for package, other in (("nvfp4sweep_torch", "nvfp4sweep_jax"), ("nvfp4sweep_jax", "nvfp4sweep_torch")):
        for path in (CORE.parent / package).glob("*.py"):
            assert other not in {name.partition(".")[0] for name in imports(path.read_text())}


def test_the_import_check_can_fail() -> None:
    assert imports("def f():\n    import torch") == {"torch"}
    assert imports("from jax import numpy") == {"jax.numpy"}
    assert core_imports("from nvfp4sweep import cpu\nfrom nvfp4sweep.api import x") == {"cpu", "api"}


def loaded_by(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(output.stdout.split())


def test_core_loads_nothing_heavy() -> None:
    assert not loaded_by("import nvfp4sweep") & HEAVY


def test_jax_adapter_does_not_load_torch() -> None:
    assert "torch" not in loaded_by("import nvfp4sweep_jax")


def test_torch_adapter_does_not_load_jax() -> None:
    assert "jax" not in loaded_by("import nvfp4sweep_torch")


def test_the_loading_check_can_fail() -> None:
    assert "numba" in loaded_by("import nvfp4sweep.cpu")


def test_plain_searches_do_not_compile_the_others() -> None:
    program = "import sys, nvfp4sweep.cpu; print(*(m for m in sys.modules if m.startswith('nvfp4sweep.')))"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert "nvfp4sweep.cpu_kernels" in output.stdout.split()
    assert not {"nvfp4sweep.cpu_importance", "nvfp4sweep.cpu_hessian"} & set(output.stdout.split())


#: Arguments of one package alone: those that stand for what only its framework has.
OWN_ARGUMENTS = {"nvfp4sweep_torch": ["process_group"], "nvfp4sweep_jax": []}


def test_same_public_names_and_signatures() -> None:
    import nvfp4sweep_jax
    import nvfp4sweep_torch

    for adapter in (nvfp4sweep_torch, nvfp4sweep_jax):
        assert set(nvfp4sweep.__all__) <= set(adapter.__all__)
        for name in ("calibrate", "sweep", "quantize", "global_amax", "scale_candidates"):
            ours = inspect.signature(getattr(nvfp4sweep, name)).parameters
            theirs = dict(inspect.signature(getattr(adapter, name)).parameters)
            for own in OWN_ARGUMENTS[adapter.__name__] if ours else ():
                assert theirs.pop(own).default is None
            assert [(p.name, p.kind, p.default) for p in ours.values()] == [
                (p.name, p.kind, p.default) for p in theirs.values()
            ]


def test_one_version() -> None:
    assert importlib.metadata.version("nvfp4sweep") == nvfp4sweep.__version__
