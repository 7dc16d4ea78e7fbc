"""What `nvfp4sweep quantize` is made of: the order of its steps, imatrix files, warnings, the report."""

import html.parser
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nvfp4sweep

pytest.importorskip("typer", reason="the extra [checkpoint] is not installed")
pytest.importorskip("safetensors", reason="the extra [checkpoint] is not installed")

from safetensors import deserialize
from safetensors.numpy import save_file

from nvfp4sweep.checkpoint import baselines
from nvfp4sweep.checkpoint.importances import Importances
from nvfp4sweep.checkpoint.passes import QUANTIZE, STAGES, Amaxes, Step, steps
from nvfp4sweep.checkpoint.pipeline import ahead
from nvfp4sweep.checkpoint.plan import cut_by_tensor_parallelism
from nvfp4sweep.checkpoint.quality import JSON_NAME, PAGE_NAME, Quality
from nvfp4sweep.checkpoint.quantizer import quantize_checkpoint
from nvfp4sweep.checkpoint.ranks import share
from nvfp4sweep.checkpoint.reader import CheckpointError, TensorInfo
from nvfp4sweep.checkpoint.settings import Settings

Array = np.ndarray[Any, Any]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# --- ahead --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_ahead_keeps_the_order_and_few_values(workers: int) -> None:
    held, most, lock = 0, 0, threading.Lock()

    def read(item: int) -> int:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return 10 * item

    def compute(item: int, get: Callable[[], int]) -> tuple[int, int]:
        nonlocal held
        value = get()
        time.sleep(0.002 * (item % 3))
        with lock:
            held -= 1
        return item, value

    assert list(ahead(range(40), read, compute, workers)) == [(i, 10 * i) for i in range(40)]
    assert most <= workers + 1


def test_ahead_goes_on_while_the_caller_is_busy() -> None:
    computed = []
    results = ahead(range(4), lambda item: item, lambda item, get: computed.append(get()))
    next(results)
    deadline = time.monotonic() + 10
    while len(computed) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert computed[:2] == [0, 1]
    results.close()  # type: ignore[attr-defined]


def test_ahead_reads_two_at_a_time() -> None:
    both = threading.Barrier(2, timeout=10)

    def read(item: int) -> int:
        both.wait()
        return item

    assert list(ahead(range(6), read, lambda item, get: get(), 1)) == list(range(6))


@pytest.mark.parametrize("step", ["read", "compute"])
def test_ahead_hands_on_what_a_thread_raises(step: str) -> None:
    def fail(name: str, item: int) -> int:
        if name == step and item == 5:
            raise ValueError(f"{name} {item}")
        return item

    results = ahead(range(100), lambda item: fail("read", item), lambda _, get: fail("compute", get()), 2)
    found = []
    with pytest.raises(ValueError, match=f"{step} 5"):
        found.extend(results)
    assert found == [] or found == list(range(5))
    assert threading.active_count() < 20


@pytest.mark.parametrize("failing", ["read", "compute", "caller"])
def test_nobody_waits_for_what_nobody_finds(failing: str) -> None:
    """Weights that share a scale: the first's magnitude is not found, and another thread has asked for it."""
    groups = dict.fromkeys("ab", ("a", "b"))
    plan = steps([[TensorInfo(name, (1,), "F32", Path()) for name in "ab"]], ())
    assert [(step.stage, step.tensor.name) for step in plan] == [*product(STAGES, "ab")]
    amaxes = Amaxes(groups, {}, "ab")
    asked = threading.Event()

    def fail_once_asked(step: Step, reason: str) -> None:
        if step == plan[1] and failing == reason:
            assert asked.wait(10)
            raise ValueError(reason)

    def read(step: Step) -> str:
        fail_once_asked(step, "read")
        return step.tensor.name

    def do(step: Step, get: Callable[[], str]) -> str:
        if step.stage == QUANTIZE:
            asked.set()
            return str(amaxes.shared(step.tensor.name))
        amaxes.find(step.tensor.name, lambda: (get(), fail_once_asked(step, "compute"), np.ones(()))[-1])
        return ""

    results = ahead(plan, read, do, 2)
    if failing == "caller":
        next(results)
        results.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(ValueError, match=failing):
            list(results)
    assert threading.active_count() < 20


def test_shares_are_a_partition() -> None:
    class Fake:
        size = 3

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def gather(self, mine: Any) -> list[Any]:
            raise NotImplementedError

    sizes = [7, 1, 9, 4, 4, 0, 12, 3]
    parts = [share(range(len(sizes)), sizes.__getitem__, Fake(rank)) for rank in range(3)]
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    assert [sum(sizes[i] for i in part) for part in parts] == [13, 13, 14]


# --- imatrix ------------------------------------------------------------------------------------------


def write_imatrix(path: Path, sums: dict[str, Array], counts: dict[str, Array]) -> Path:
    """As llama-imatrix writes it."""
    gguf = pytest.importorskip("gguf", reason="the extra [imatrix] is not installed")
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_uint32("imatrix.chunk_count", 1)
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts[name].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, shape, "F32", Path("x"))


@pytest.fixture
def imatrix(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    shapes = {
        "blk.0.attn_q.weight": (1, 32),
        "blk.11.ffn_down.weight": (1, 48),
        "blk.0.ffn_gate_exps.weight": (3, 32),
        "blk.0.ffn_down_exps.weight": (3, 16),
    }
    sums = {name: rng.uniform(1, 2, shape) for name, shape in shapes.items()}
    counts = {name: np.full((len(values), 1), 8) for name, values in sums.items()}
    counts["blk.0.ffn_down_exps.weight"][1] = 0  # an expert that saw no token
    sums["blk.0.ffn_down_exps.weight"][1] = 0
    return write_imatrix(tmp_path / "imatrix.gguf", sums, counts)


def read_gguf(path: Path, name: str) -> Array:
    import gguf

    return next(np.array(t.data) for t in gguf.GGUFReader(path).tensors if t.name == f"{name}.in_sum2")


@pytest.mark.parametrize(
    ("model_type", "name", "shape", "there", "expert"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.weight", (8, 32), "attn_q", 0),
        ("mistral", "model.layers.11.mlp.down_proj.weight", (8, 48), "blk.11.ffn_down", 0),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w1.weight", (8, 32), "ffn_gate_exps", 2),
        ("qwen3_moe", "model.layers.0.mlp.experts.1.down_proj.weight", (8, 16), "ffn_down_exps", 1),
        ("qwen3_moe", "model.layers.0.mlp.experts.gate_up_proj", (3, 8, 32), "ffn_gate_exps", None),
        ("gpt_oss", "model.layers.0.mlp.experts.gate_up_proj", (3, 32, 8), "ffn_gate_exps", None),
    ],
)
def test_imatrix(
    imatrix: Path, model_type: str, name: str, shape: tuple[int, ...], there: str, expert: int | None
) -> None:
    there = f"{there if there.startswith('blk') else f'blk.0.{there}'}.weight"
    expected = read_gguf(imatrix, there).reshape(-1, read_gguf(imatrix, there).shape[-1]) / np.float32(8)
    found = Importances(imatrix, model_type).of(info(name, shape))
    assert found is not None
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected if expert is None else expected[expert])


def test_imatrix_refusals(imatrix: Path, tmp_path: Path) -> None:
    importances = Importances(imatrix, "llama")
    assert importances.of(info("model.layers.1.self_attn.q_proj.weight", (8, 32))) is None
    assert importances.of(info("model.layers.0.self_attn.bogus.weight", (8, 32))) is None
    with pytest.raises(CheckpointError, match=r"q_proj.weight .* shape \(32,\), and must have \(64,\)"):
        importances.of(info("model.layers.0.self_attn.q_proj.weight", (8, 64)))
    with pytest.raises(CheckpointError, match=r"how llama\.cpp names the tensors of 'nothing' is not known"):
        Importances(imatrix, "nothing")
    (tmp_path / "text.gguf").write_text("GGUF?")
    with pytest.raises(CheckpointError, match=r"text\.gguf is not a readable GGUF file"):
        Importances(tmp_path / "text.gguf", "llama")
    other = write_imatrix(tmp_path / "other.gguf", {}, {})
    with pytest.raises(CheckpointError, match=r"other.gguf is not an imatrix"):
        Importances(other, "llama")


# --- warnings and the report --------------------------------------------------------------------------


def test_cut_by_tensor_parallelism() -> None:
    tensors = [info(f"model.layers.{i}.mlp.down_proj.weight", (64, 1856)) for i in range(3)]
    tensors += [info("layers.0.mlp.up_proj.weight", (1856, 48)), info("a.o_proj.weight", (64, 4096))]
    assert cut_by_tensor_parallelism(tensors) == [
        "model.layers.0.mlp.down_proj.weight and 2 like it: K = 1,856, and 8 ranks of tensor parallelism "
        "take 232 each, which cuts blocks of 16"
    ]


def write_model(folder: Path) -> dict[str, Array]:
    rng = np.random.default_rng(5)
    tensors: dict[str, Array] = {
        "model.layers.10.mlp.down_proj.weight": rng.standard_normal((32, 48)).astype(ml_dtypes.bfloat16),
        "model.layers.2.mlp.down_proj.weight": rng.standard_t(3, (32, 48)).astype(np.float32),
        "model.layers.2.mlp.<b>uneven.weight": rng.standard_normal((4, 24)).astype(np.float32),
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return tensors


def test_report(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "model")
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "h.safetensors")
    written = quantize_checkpoint(
        tmp_path / "model", tmp_path / "out", Settings(scale_max=256), importance=tmp_path / "h.safetensors"
    )
    assert [warning.partition(" ")[0] for warning in written.warnings] == [
        "model.layers.2.mlp.<b>uneven.weight",
        "model.layers.2.mlp.down_proj.weight",
        "2",
    ]
    report = json.loads((tmp_path / "out" / JSON_NAME).read_text())
    assert report["warnings"] == list(written.warnings)
    assert {reason: tuple(names) for reason, names in report["skipped"].items()} == written.skipped
    names = [module["module"] for module in report["modules"]]
    assert names == ["model.layers.2.mlp.down_proj", "model.layers.10.mlp.down_proj"]
    stored = dict(deserialize((tmp_path / "out" / "model.safetensors").read_bytes()))
    errors = {"absmax": 0.0, "stored": 0.0}
    for module in report["modules"]:
        weight = tensors[f"{module['module']}.weight"]
        amax = np.float32(nvfp4sweep.global_amax(weight) * np.float32(448 / 256))
        assert module["global_amax"] == amax
        swept = nvfp4sweep.sweep(weight, global_amax=amax)
        code = np.frombuffer(stored[f"{module['module']}.weight_scale"]["data"], np.uint8)
        counts = {str(c): int(n) for c, n in zip(*np.unique(code, return_counts=True), strict=True)}
        assert module["blocks_by_code"] == counts
        assert module["blocks"] == code.size == sum(counts.values())
        assert sum(module["blocks_by_offset_from_absmax"].values()) == code.size
        assert module["squared_error"]["stored"] == pytest.approx(swept.error.sum(dtype=np.float64), rel=1e-6)
        blocks = np.abs(weight.astype(np.float32)).reshape(-1, 16).max(axis=1)
        assert module["blocks_clipped"] == np.count_nonzero(blocks > swept.amax.reshape(-1))
        for name in errors:
            errors[name] += module["squared_error"][name]
        assert Quality.from_json(module).as_json() == module
    assert report["saved_percent"] == pytest.approx(100 * (1 - errors["stored"] / errors["absmax"]), rel=1e-9)
    assert 5 < report["saved_percent"] < 50


def test_clipped_blocks_are_counted() -> None:
    weight = np.zeros((1, 32), np.float32)
    weight[0, :2] = 7, 6  # clipped at a scale of 1
    weight[0, 16] = 6
    code = np.full((1, 2), 0x38, np.uint8)  # 1.0
    errors = baselines.scale_errors(weight, code, np.float32(2688))
    assert errors.clipped == 1
    assert errors.exact == pytest.approx(1, rel=1e-4)  # its scale is not quite 1
    assert errors.codes[0x38] == 2


class _Table(html.parser.HTMLParser):
    """The texts of a page's table, and what it would load from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loaded: list[str] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [f"{tag} {key}={value}" for key, value in attrs if key in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def test_page(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    quantize_checkpoint(tmp_path / "model", tmp_path / "out")
    page = (tmp_path / "out" / PAGE_NAME).read_text()
    table = _Table(page)
    assert table.loaded == []
    assert "<b>uneven" not in page
    assert "&lt;b&gt;uneven" in page
    assert "$" not in re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL)
    head, *rows = table.rows
    assert [len(row) for row in rows] == [len(head)] * 3
    names = [f"model.layers.{i}.mlp.down_proj" for i in (2, 10)]
    assert [row[0] for row in rows] == [*names, "total"]


@pytest.fixture
def chromium(tmp_path: Path) -> list[str]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    return [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
    ]  # fmt: skip


def test_page_in_chromium(tmp_path: Path, chromium: list[str]) -> None:
    """It renders, its script runs, and a click on a column sorts by it."""
    write_model(tmp_path / "model")
    quantize_checkpoint(tmp_path / "model", tmp_path / "out")
    page = (tmp_path / "out" / PAGE_NAME).read_text()
    clicked = tmp_path / "clicked.html"
    click = "<script>document.querySelectorAll('thead th')[3].click();document.title='sorted'</script></body>"
    clicked.write_text(page.replace("</body>", click))

    def names(path: Path) -> list[str]:
        command = [*chromium, "--dump-dom", path.as_uri()]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        dom = done.stdout
        assert "<rect" in dom
        assert ("<title>sorted</title>" in dom) == (path == clicked)
        return [row[0] for row in _Table(dom).rows[1:-1]]

    first, second = names(tmp_path / "out" / PAGE_NAME), names(clicked)
    report = json.loads((tmp_path / "out" / JSON_NAME).read_text())
    errors = {module["module"]: module["squared_error"]["absmax"] for module in report["modules"]}
    assert first == list(errors)
    assert second == sorted(errors, key=lambda name: errors[name])
    assert errors[first[0]] > errors[first[1]]  # or the click would show nothing
