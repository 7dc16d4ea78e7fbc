"""nvfp4sweep rescale-groups: what moves, by how much, and what does not."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer", reason="the extra [checkpoint] is not installed")
pytest.importorskip("safetensors", reason="the extra [checkpoint] is not installed")

from checkpoint_edits import (
    BOTH,
    EXPERT,
    O_PROJ,
    Array,
    Tensors,
    edit_tensors,
    make,
    mismatch,
    problems,
    put,
    refused,
    run,
    scalars,
    values,
)
from quantize_models import ATTENTION, FILES, LAYER, contents, read_all

from nvfp4sweep import formats
from nvfp4sweep.checkpoint.layouts import MODELOPT, Layout
from nvfp4sweep.checkpoint.rescaler import rescale_groups, rounded_codes

GROUPS = {
    **dict.fromkeys(ATTENTION, tuple(sorted(ATTENTION))),
    **dict.fromkeys(
        [f"{EXPERT}{n}_proj" for n in ("gate", "up")], (f"{EXPERT}gate_proj", f"{EXPERT}up_proj")
    ),
}


@BOTH
@pytest.mark.parametrize("input_scale", [None, 1.0])
def test_rescale(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: Layout,
    input_scale: float | None,
) -> None:
    monkeypatch.setattr("nvfp4sweep.checkpoint.reader._CHUNK", 64)  # bytes: in several reads
    source, out = make(tmp_path, layout, input_scale), tmp_path / "out"
    mismatch(source, layout)
    assert len(problems(source)) == 2
    before = contents(source)
    rows = {row.module: row for row in rescale_groups(source, out)}
    assert contents(source) == before
    assert problems(out) == []
    assert {name: row.group for name, row in rows.items()} == GROUPS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "model", "out"]
    for file in {*contents(source)} - {*FILES}:
        assert (out / file).read_bytes() == (source / file).read_bytes()

    old, new = read_all(source), read_all(out)
    assert sorted(old) == sorted(new)
    seconds, inputs = scalars(old, layout.global_scale), scalars(old, layout.input_scale)
    largest = min if layout.reciprocal else max
    moved = set()
    for module, group in GROUPS.items():
        second = largest(seconds[name] for name in group)
        assert new[f"{module}.{layout.global_scale}"].reshape(()) == second
        moved.add(f"{module}.{layout.global_scale}")
        if inputs:
            assert new[f"{module}.{layout.input_scale}"].reshape(()) == largest(inputs[n] for n in group)
            moved.add(f"{module}.{layout.input_scale}")
        if seconds[module] != second:
            moved.add(f"{module}.{layout.scale}")
        check_row(rows[module], old, new, layout)
    for name, array in old.items():
        assert name in moved or new[name].tobytes() == array.tobytes(), name
    assert sum(old[n].tobytes() != new[n].tobytes() for n in moved if n.endswith(".weight_scale")) == 3


def check_row(row: Any, old: Tensors, new: Tensors, layout: Layout) -> None:
    """What it says, from the values in the files."""
    before, after = (np.array(values(found, row.module, layout)) for found in (old, new))
    scales = [
        [
            Fraction(v) * (1 / Fraction(float(second)) if layout.reciprocal else Fraction(float(second)))
            for v in formats.E4M3_VALUES[found[f"{row.module}.{layout.scale}"].view(np.uint8)].ravel()
        ]
        for found in (old, new)
        for second in [found[f"{row.module}.{layout.global_scale}"].reshape(())]
    ]
    assert row.blocks == len(scales[0])
    assert row.exact == sum(a == b for a, b in zip(*scales, strict=True))
    error = sum((after - before) ** 2) / sum(before**2)
    assert row.error == pytest.approx(float(error), rel=1e-12, abs=0)
    second, shared = (float(found[f"{row.module}.{layout.global_scale}"].reshape(())) for found in (old, new))
    assert row.ratio == (shared / second if layout.reciprocal else second / shared)
    assert row.ratio == 1 or row.error > 0


def nearest(old: np.float32, new: np.float32) -> list[int]:
    """For each code the nearest under the new scale, in integers; of two the even one."""
    (a, b), (c, d) = (float(scale).as_integer_ratio() for scale in (old, new))
    points = [int(value * 512) for value in formats.E4M3_VALUES]
    return [
        min(range(127), key=lambda k: (abs(points[k] * c * b - point * a * d), k % 2)) for point in points
    ]


def test_rounded_codes() -> None:
    """Against exact arithmetic: any ratio, ratios that make ties, and their neighbours."""
    rng = np.random.default_rng(5)
    pairs = [(a, b) for a, b in np.sort(np.exp(rng.uniform(-9, 9, (20, 2)))).astype(np.float32)]
    for _ in range(20):
        midpoint = np.float32((2 * rng.integers(8, 16) + 1) * 2.0 ** rng.integers(-6, 0))
        factor = np.float32(rng.integers(1, 2**16))
        old, new = midpoint * factor, np.float32(rng.integers(8, 16) * 4) * factor
        pairs += [
            (np.float32(near), new) for near in (np.nextafter(old, new * 0), old, np.nextafter(old, new))
        ]
    ties = 0
    for old, new in pairs:
        np.testing.assert_array_equal(rounded_codes(float(old), float(new)), np.maximum(nearest(old, new), 1))
        edges = (formats.E4M3_VALUES[1:] + formats.E4M3_VALUES[:-1]) / 2 * float(new)
        ties += np.isin(formats.E4M3_VALUES * float(old), edges).sum()
    assert ties > 100
    assert rounded_codes(1, 1).tolist() == [1, *range(1, 127)]
    assert rounded_codes(2**-30, 1, 8).tolist() == [8] * 127


@pytest.mark.parametrize("min_code", [1, 8])
def test_scales_that_vanish(tmp_path: Path, min_code: int) -> None:
    """They become the lowest code, neither zero nor NaN."""
    source = make(tmp_path, MODELOPT)
    small = put(f"{ATTENTION[1]}.weight_scale_2", lambda a: a * np.float32(2**-30))
    edit_tensors(source, small)
    rows = {row.module: row for row in rescale_groups(source, tmp_path / "out", min_code=min_code)}
    found, before = read_all(tmp_path / "out"), read_all(source)
    assert (found[f"{ATTENTION[1]}.weight_scale"].view(np.uint8) == min_code).all()
    for name in (ATTENTION[0], ATTENTION[2]):
        assert found[f"{name}.weight_scale"].tobytes() == before[f"{name}.weight_scale"].tobytes()
        assert (rows[name].ratio, rows[name].exact, rows[name].error) == (1, rows[name].blocks, 0)
    assert problems(tmp_path / "out") == []
    check_row(rows[ATTENTION[1]], before, found, MODELOPT)


def test_a_weight_of_zeros(tmp_path: Path) -> None:
    source = make(tmp_path, MODELOPT)
    edit_tensors(source, put(f"{ATTENTION[1]}.weight", lambda a: a & 0x88))
    edit_tensors(source, put(f"{ATTENTION[1]}.weight_scale_2", lambda a: a * np.float32(0.7)))
    rows = {row.module: row for row in rescale_groups(source, tmp_path / "out")}
    assert rows[ATTENTION[1]].error == 0


@BOTH
def test_input_scales_alone(tmp_path: Path, layout: Layout) -> None:
    source = make(tmp_path, layout, 1.0)
    name = f"{ATTENTION[2]}.{layout.input_scale}"
    edit_tensors(source, put(name, lambda a: a * np.float32(0.5 if layout.reciprocal else 2)))
    rows = rescale_groups(source, tmp_path / "out")
    assert [row.module for row in rows] == sorted(ATTENTION)
    assert all((row.ratio, row.exact, row.error) == (1, row.blocks, 0) for row in rows)
    old, new = read_all(source), read_all(tmp_path / "out")
    changed = sorted(n for n, array in old.items() if new[n].tobytes() != array.tobytes())
    assert changed == [f"{module}.{layout.input_scale}" for module in sorted(ATTENTION[:2])]
    assert all(new[n] == old[name] for n in changed)


def test_no_group_differs(tmp_path: Path) -> None:
    source = make(tmp_path, MODELOPT, 1.0)
    assert rescale_groups(source, tmp_path / "out") == ()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "model"]


def test_groups_of_the_user(tmp_path: Path) -> None:
    """What overlaps is one group: o comes to q, k and v, and two experts' down to their gate and up."""
    source = make(tmp_path, MODELOPT)
    groups = (r"self_attn\.(?:v|o)_proj\.weight$", r"experts\.([02])\.(?:up|down)_proj")
    rows = {row.module: row for row in rescale_groups(source, tmp_path / "out", groups=groups)}
    experts = [f"{LAYER}mlp.experts.{i}.{n}_proj" for i in (0, 2) for n in ("gate", "up", "down")]
    assert sorted(rows) == sorted([*ATTENTION, O_PROJ, *experts])
    assert set(rows[O_PROJ].group) == {*ATTENTION, O_PROJ}
    found = scalars(read_all(tmp_path / "out"), "weight_scale_2")
    for row in rows.values():
        assert len({found[name] for name in row.group}) == 1
    assert found[experts[0]] != found[experts[3]]
    assert problems(tmp_path / "out") == []
    assert rescale_groups(tmp_path / "out", tmp_path / "again", groups=groups) == ()
    with pytest.raises(ValueError, match=r"groups: '\(' is not a regular expression"):
        rescale_groups(source, tmp_path / "x", groups=("(",))
    with pytest.raises(ValueError, match=r"min_code=127 must lie in 1 .. 126"):
        rescale_groups(source, tmp_path / "x", min_code=127)


@pytest.mark.parametrize(("byte", "what"), [(0, "zero"), (0x7F, "NaN"), (0x81, "negative")])
def test_block_scales_that_are_none(tmp_path: Path, byte: int, what: str) -> None:
    """Of a module whose scales would move; others may have them, and keep them."""
    source = make(tmp_path, MODELOPT)

    def spoil(array: Array) -> Array:
        code = array.view(np.uint8).copy()
        code[3, 1] = byte
        return code.view(array.dtype)

    edit_tensors(source, put(f"{ATTENTION[1]}.weight_scale", spoil))
    edit_tensors(source, put(f"{ATTENTION[0]}.weight_scale_2", lambda a: a * np.float32(0.5)))
    (half, *_) = (r for r in rescale_groups(source, tmp_path / "kept") if r.module == ATTENTION[0])
    assert (half.ratio, half.exact, half.error) == (0.5, half.blocks, 0)  # a power of two
    edit_tensors(source, put(f"{ATTENTION[1]}.weight_scale_2", lambda a: a * np.float32(0.5)))
    refused(
        lambda out: rescale_groups(source, out), tmp_path, f"{ATTENTION[1]}: 1 of 32 block scales are {what}"
    )


def test_command(tmp_path: Path) -> None:
    source = make(tmp_path, MODELOPT, 1.0)
    for arguments, message in (
        ((source, "--min-code", "0"), "--min-code"),
        ((source, "--group", "("), "--group"),
        ((tmp_path / "model",), "DIR OUT"),
    ):
        code, output = run("rescale-groups", arguments[0], tmp_path / "x", *arguments[1:])
        assert code == 2, output
        assert message in output
    code, output = run("rescale-groups", source, tmp_path / "x")
    assert (code, output.strip()) == (0, "no group differs: nothing is written")
    assert not list(tmp_path.glob("x*"))
    mismatch(source, MODELOPT)
    code, output = run("rescale-groups", source, tmp_path / "x")
    assert code == 0, output
    assert f"5 modules share their scale now: {tmp_path / 'x'}" in output
    assert f"{EXPERT}gate_proj: 0.3" in output
    assert "quantize" in output
    assert run("verify", tmp_path / "x")[0] == 0
    code, output = run("rescale-groups", source, tmp_path / "y", "--min-code", "8", "--group", "(?:o|q)_proj")
    assert code == 0, output
    assert O_PROJ in output
