"""docs/objectives.md: what its benchmark computes, on small layers, and the page that a record gives."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("benchmarks", reason="the benchmarks were not copied")

from benchmarks import report_objectives  # noqa: E402
from tests import minilm  # noqa: E402  the module, and so the model, that the benchmark has

LAYERS = {f"encoder.layer.{i}.{kind}": [32, 16] for i in (0, 1) for kind in ("query", "dense")}
RATIOS = {
    "absmax": [1.25, 1.5, 1.25, 0.8],
    "plain": [1, 1, 1, 1],
    "root_importance": [0.95, 0.95, 0.95, 0.95],
    "importance": [0.9, 0.9, 0.9, 0.9],
    "half_hessian": [0.85, 0.85, 0.85, 1],
    "hessian": [0.8, 0.2, 0.8, 1.125],
}


@pytest.fixture
def record() -> dict[str, Any]:
    """Of a model with four layers, on which the output errors of plain scales are 0.002."""
    cosines = {scales: {"mean": 0.975, "min": 0.95} for scales in RATIOS}
    errors = {scales: [0.002 * ratio for ratio in ratios] for scales, ratios in RATIOS.items()}
    texts = report_objectives.TEXTS
    summary = {"cosine": 0.98} | dict.fromkeys(texts, 0.9) | {f"{text}_worse": 1 for text in texts}
    worst = summary | {"everyday": 1.025}
    draws = [dict.fromkeys(report_objectives.WEIGHTED, row) for row in (summary, worst)]
    return {
        "model": "small",
        "time": "today",
        "commit": "abc",
        "device": "a CPU",
        "versions": {"python": "3.11"},
        "text": {text: {"sentences": 10, "tokens": 1234} for text in texts},
        "blocks_equal_to_oracle": dict.fromkeys(RATIOS, 1000),
        "layers": LAYERS,
        "squared_error": {scales: [1.5, 2.5, 3, 4] for scales in RATIOS},
        "output_error": dict.fromkeys(texts, errors),
        "cosine": dict.fromkeys(texts, cosines),
        "sizes": [{"tokens": [64, 70], "draws": draws}, {"tokens": [1234], "draws": draws[:1]}],
    }


def test_page(record: dict[str, Any]) -> None:
    text = report_objectives.page(record, "plot.svg")
    for line in (
        "![Output errors by layer and by calibration tokens](plot.svg)",
        "| Hessian | 11.0 | 0.616 | 0.616 | 0.616 | 0.9750 (0.9500) | 0.9750 (0.9500) |",  # 0.144^(1/4)
        "| query | 1.250 | 0.950 | 0.900 | 0.850 | 0.800 |",
        "- Hessian: 1 of 4: encoder.layer.1.dense (1.125).",
        "- half Hessian: none.",
        "- plain, compared with absmax: 1 of 4: encoder.layer.1.dense (1.250).",
        "| 64 .. 70 | Hessian | 0.900 | 0.900 | 0.900 .. 1.025 | 1 | 1 | 0.9800 |",
        "| 1,234 | importance | 0.900 | 0.900 | 0.900 | 1 | 1 | 0.9800 |",
    ):
        assert f"\n{line}\n" in text
    assert "| encoder.layer.1.dense | 32x16 | 0.002 | 0.800 / 0.800 |" in text


def test_page_of_an_incomplete_record(record: dict[str, Any]) -> None:
    short = copy.deepcopy(record)
    short["output_error"]["held_out"]["hessian"].pop()
    with pytest.raises(ValueError, match="shorter"):
        report_objectives.page(short, "plot.svg")
    for part in ("output_error", "cosine", "text"):
        without = copy.deepcopy(record)
        del without[part]["everyday"]
        with pytest.raises(KeyError, match="everyday"):
            report_objectives.page(without, "plot.svg")


def test_plot_is_the_same_for_the_same_record(record: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra [checkpoint] is not installed")
    path, files = tmp_path / "plot.svg", []
    for _ in range(2):
        report_objectives.draw(record, path)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert b"<svg" in files[0]


needs_minilm = pytest.mark.skipif(bool(minilm.missing()), reason=str(minilm.missing()))


@needs_minilm
def test_texts_are_disjoint() -> None:
    from benchmarks import minilm_readings

    held_out, others = minilm_readings.split_text(1000)
    assert not {*held_out} & {*others}
    assert 1000 <= minilm_readings.count_tokens(held_out) < 5000
    draws = minilm_readings.disjoint_draws(others, 100, most=3)
    assert len(draws) == 3
    assert sum(map(len, draws)) == len({sentence for draw in draws for sentence in draw})
    assert all(minilm_readings.count_tokens(draw[:-1]) < 100 for draw in draws)


@needs_minilm
def test_errors_are_those_of_the_outputs() -> None:
    from benchmarks import minilm_readings, objectives

    name = "encoder.layer.5.attention.output.dense"
    inputs: list[Any] = []
    layer = minilm.model().get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].flatten(0, -2)))
    reading = minilm_readings.read(minilm.SENTENCES[:3])
    handle.remove()
    before, x = minilm_readings.linear_weights(), torch.cat(inputs)
    after = {n: objectives.absmax(n) for n in before}
    weight, changed = before[f"{name}.weight"], after[f"{name}.weight"]
    expected = (x @ (weight - changed).T).norm() ** 2 / (x @ weight.T).norm() ** 2
    errors = dict(zip(before, objectives.output_errors(after, reading), strict=True))
    assert errors[f"{name}.weight"] == pytest.approx(expected.item(), rel=1e-4)
    assert reading.moments[f"{name}.weight"].tokens == len(x) == reading.tokens

    assert objectives.cosines(before, reading) == {"mean": 1, "min": 1}
    assert 0.9 < objectives.cosines(after, reading)["min"] < 0.99
    assert torch.equal(layer.weight, weight)  # as it was


@needs_minilm
def test_absmax_is_what_the_report_calls_absmax() -> None:
    from benchmarks import minilm_readings, objectives
    from nvfp4sweep.checkpoint import baselines

    name = "encoder.layer.0.attention.self.key.weight"
    weight, amax = minilm_readings.linear_weights()[name], objectives.global_amaxes()[name]
    code = np.ones((384, 24), np.uint8)
    expected = baselines.scale_errors(weight.numpy(), code, amax.numpy()).absmax
    error = (weight.double() - objectives.absmax(name).double()).square().sum()
    assert float(error) == pytest.approx(expected, rel=1e-6)
