"""nvfp4sweep convert: which bytes stay, what becomes of the others, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer", reason="the extra [checkpoint] is not installed")
pytest.importorskip("safetensors", reason="the extra [checkpoint] is not installed")

from checkpoint_edits import (
    BOTH,
    O_PROJ,
    OTHER,
    Array,
    Tensors,
    edit_config,
    edit_tensors,
    interrupting,
    make,
    mismatch,
    problems,
    put,
    quantization,
    refused,
    run,
    scalars,
    values,
)
from quantize_models import (
    ATTENTION,
    FILES,
    IGNORED,
    LAYER,
    MODULES,
    contents,
    read_all,
    write_model,
)

from nvfp4sweep.checkpoint.converter import convert_checkpoint
from nvfp4sweep.checkpoint.layouts import COMPRESSED_TENSORS, MODELOPT, Layout
from nvfp4sweep.checkpoint.quantizer import quantize_checkpoint
from nvfp4sweep.checkpoint.reader import CheckpointError, TensorInfo
from nvfp4sweep.checkpoint.rescaler import rescale_groups
from nvfp4sweep.checkpoint.settings import Settings

# --- convert ------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("input_scale", [None, 0.3])
def test_convert(tmp_path: Path, layout: Layout, input_scale: float | None) -> None:
    source, out, other = make(tmp_path, layout, input_scale), tmp_path / "out", OTHER[layout.name]
    before = contents(source)
    converted = convert_checkpoint(source, out, other)
    assert contents(source) == before
    assert sorted(converted.modules) == MODULES
    assert sorted(converted.ignored) == IGNORED
    assert (converted.before, converted.with_input) == (layout, input_scale is not None)
    assert problems(out) == []
    old, new = read_all(source), read_all(out)
    renamed = {
        f"{module}.{getattr(layout, end)}": f"{module}.{getattr(other, end)}"
        for module in MODULES
        for end in ("packed", "scale", "global_scale", "input_scale")
    }
    assert sorted(new) == sorted(renamed.get(name, name) for name in old)
    for name, array in old.items():
        found = new[renamed.get(name, name)]
        assert found.dtype == array.dtype
        if name.endswith((layout.global_scale, layout.input_scale)):
            assert found.shape == other.scalar_shape
            assert found.reshape(()) == np.float32(1) / array.reshape(())
        else:
            assert found.shape == array.shape
            assert found.tobytes() == array.tobytes()
    if input_scale is not None:
        assert len(scalars(new, other.input_scale)) == len(MODULES)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "original" / "params.json").read_text() == "[1]"
    assert json.loads((out / "config.json").read_text())["hidden_size"] == 32
    assert (out / "hf_quant_config.json").exists() == (other is MODELOPT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "model", "out"]


@BOTH
def test_convert_writes_what_quantize_writes(tmp_path: Path, layout: Layout) -> None:
    source, other = make(tmp_path, layout, 1.0), OTHER[layout.name]
    convert_checkpoint(source, tmp_path / "out", other)
    quantize_checkpoint(tmp_path / "model", tmp_path / "direct", Settings(other, 1.0))
    for file in ("config.json", "model.safetensors.index.json", *other.other_files([], True)):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "direct" / file).read_bytes()
    direct, found = read_all(tmp_path / "direct"), read_all(tmp_path / "out")
    for name, array in direct.items():
        if name.endswith("weight_scale_2"):  # by way of its reciprocal
            assert abs(int(found[name].view(np.int32)) - int(array.view(np.int32))) <= 1
        else:
            assert found[name].tobytes() == array.tobytes()


@BOTH
def test_values_differ_by_a_rounding(tmp_path: Path, layout: Layout) -> None:
    """In real arithmetic, from what the files hold."""
    source, other = make(tmp_path, layout), OTHER[layout.name]
    convert_checkpoint(source, tmp_path / "out", other)
    differ = 0
    for module in MODULES:
        before, after = (
            values(read_all(f), module, la) for f, la in ((source, layout), (tmp_path / "out", other))
        )
        for old, new in zip(before, after, strict=True):
            assert abs(new - old) <= abs(old) / 2**24
            differ += new != old
    assert differ


@BOTH
def test_there_and_back(tmp_path: Path, layout: Layout) -> None:
    source, other = make(tmp_path, layout), OTHER[layout.name]
    rng = np.random.default_rng(7)

    def scatter(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(layout.global_scale):
                tensors[name] = np.full(layout.scalar_shape, np.exp(rng.uniform(-60, 60)), np.float32)

    edit_tensors(source, scatter)
    folders = [source, *(tmp_path / name for name in "abc")]
    for before, after, to in zip(folders, folders[1:], (other, layout, other), strict=False):
        convert_checkpoint(before, after, to)
    first, there, back, again = (read_all(folder) for folder in folders)
    assert sorted(back) == sorted(first)
    old, new = (scalars(f, layout.global_scale) for f in (first, back))
    steps = [abs(int(new[m].view(np.int32)) - int(old[m].view(np.int32))) for m in MODULES]
    assert max(steps) == 1  # this seed has one that differs
    assert all(
        back[n].tobytes() == a.tobytes() for n, a in first.items() if not n.endswith(layout.global_scale)
    )
    assert {n: a.tobytes() for n, a in again.items()} == {n: a.tobytes() for n, a in there.items()}


def test_reciprocals() -> None:
    """What `convert_checkpoint` says of them, for every significand; powers of two change none."""
    x = (np.arange(2**23, dtype=np.uint32) | 0x3F800000).view(np.float32)
    there = np.float32(1) / x
    back = np.float32(1) / there
    assert np.abs(back.view(np.int32) - x.view(np.int32)).max() == 1
    assert (np.float32(1) / back == there).all()


@BOTH
def test_scalars_of_another_shape(tmp_path: Path, layout: Layout) -> None:
    source, other = make(tmp_path, layout, 0.3), OTHER[layout.name]
    convert_checkpoint(source, tmp_path / "usual", other)

    def reshape(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith((layout.global_scale, layout.input_scale)):
                tensors[name] = tensors[name].reshape(other.scalar_shape)

    edit_tensors(source, reshape)
    assert len(problems(source)) == 2 * len(MODULES)
    convert_checkpoint(source, tmp_path / "out", other)
    assert contents(tmp_path / "out") == contents(tmp_path / "usual")


def test_one_file_without_an_index(tmp_path: Path) -> None:
    weight = np.random.default_rng(1).standard_normal((16, 32)).astype(np.float32)
    folder = write_model(tmp_path / "model", [{"a.weight": weight}])
    (folder / "model.safetensors.index.json").unlink()
    quantize_checkpoint(folder, tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", COMPRESSED_TENSORS)
    assert problems(tmp_path / "out") == []
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


# --- the configuration --------------------------------------------------------------------------------


def test_ignored_patterns(tmp_path: Path) -> None:
    """Of ModelOpt's with *, and a parent's name, become names; so do expressions; and nothing is lost."""
    source = make(tmp_path, MODELOPT)
    listed = [
        "model.embed*",
        f"{LAYER}mlp.uneven",
        "*.mlp.gate",
        "lm_head*",
        "model.visual",
        f"{LAYER}nothing",
    ]
    edit_config(source, lambda c: c["quantization_config"].update(ignore=listed))
    convert_checkpoint(source, tmp_path / "out", COMPRESSED_TENSORS)
    kept = [f"{LAYER}mlp.uneven", "model.visual", f"{LAYER}nothing"]
    expected = [*kept, "lm_head", "model.embed_tokens", f"{LAYER}mlp.gate"]
    assert quantization(tmp_path / "out")["ignore"] == expected
    assert problems(tmp_path / "out") == []

    # The head has no tensor, as where it is the embedding's; a beginning is enough for an expression.
    edit_tensors(tmp_path / "out", lambda tensors: tensors.pop("lm_head.weight", None))
    listed = ["re:.*lm_head", r"re:model\.layers\.0\.mlp\.ga", "re:.*embed_tokens$"]
    edit_config(tmp_path / "out", lambda c: c["quantization_config"].update(ignore=listed))
    assert problems(tmp_path / "out") == []
    convert_checkpoint(tmp_path / "out", tmp_path / "back", MODELOPT)
    assert quantization(tmp_path / "back")["ignore"] == IGNORED
    assert problems(tmp_path / "back") == []


def test_layers_that_no_target_names(tmp_path: Path) -> None:
    """With targets other than Linear a list may leave layers out; the other layout needs them."""
    source = make(tmp_path, COMPRESSED_TENSORS)
    edit_config(source, lambda c: c["quantization_config"].update(ignore=[]))
    convert_checkpoint(source, tmp_path / "out", MODELOPT)
    assert problems(tmp_path / "out") == []
    assert quantization(tmp_path / "out")["ignore"] == IGNORED


@pytest.mark.parametrize("input_scale", [None, 0.3])
def test_hf_quant_config_alone(tmp_path: Path, input_scale: float | None) -> None:
    """As older checkpoints have it."""
    source = make(tmp_path, MODELOPT, input_scale)
    edit_config(source, lambda c: c.pop("quantization_config"))
    converted = convert_checkpoint(source, tmp_path / "out", COMPRESSED_TENSORS)
    assert converted.with_input == (input_scale is not None)
    assert sorted(quantization(tmp_path / "out")["ignore"]) == IGNORED
    assert problems(tmp_path / "out") == []


def test_fp8_cache(tmp_path: Path) -> None:
    source = make(tmp_path, MODELOPT)
    scale = {f"{ATTENTION[1]}.k_scale": np.asarray(np.float32(0.25))}
    edit_tensors(source, lambda tensors: tensors.update(scale if ATTENTION[1] + ".weight" in tensors else {}))
    edit_config(source, lambda c: c["quantization"].update(kv_cache_quant_algo="FP8"), "hf_quant_config.json")
    convert_checkpoint(source, tmp_path / "out", COMPRESSED_TENSORS)
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    assert quantization(tmp_path / "out")["kv_cache_scheme"] == cache
    assert read_all(tmp_path / "out")[f"{ATTENTION[1]}.k_scale"] == np.float32(0.25)
    convert_checkpoint(tmp_path / "out", tmp_path / "back", MODELOPT)
    cache = {"num_bits": 8, "type": "float", "dynamic": False}
    assert quantization(tmp_path / "back")["kv_cache_scheme"] == cache
    other = json.loads((tmp_path / "back" / "hf_quant_config.json").read_text())
    assert other["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert problems(tmp_path / "back") == []


def group_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["config_groups"]["group_0"]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("layout", "edit", "message"),
    [
        (MODELOPT, lambda c: c["quantization_config"].update(quant_algo="NVFP4_AWQ"), "is 'NVFP4_AWQ'"),
        (MODELOPT, lambda c: group_of(c)["weights"].update(group_size=32), "num_bits 4 and group_size 16"),
        (MODELOPT, lambda c: group_of(c).update(input_activations={"num_bits": 4}), "has no input scale"),
        (
            COMPRESSED_TENSORS,
            lambda c: c["quantization_config"]["config_groups"].update(
                other=group_of(c) | {"input_activations": {"num_bits": 4}}
            ),
            "all must quantize activations, or none",
        ),
        (
            COMPRESSED_TENSORS,
            lambda c: group_of(c).update(output_activations={"num_bits": 8}),
            "outputs cannot be quantized",
        ),
        (
            COMPRESSED_TENSORS,
            lambda c: c["quantization_config"].update(kv_cache_scheme={"num_bits": 4, "type": "int"}),
            "only FP8 can be translated",
        ),
        (
            COMPRESSED_TENSORS,
            lambda c: c["quantization_config"].update(transform_config={"config_groups": {"u": 1}}),
            "has a transform_config",
        ),
        (COMPRESSED_TENSORS, lambda c: c.pop("quantization_config"), "has no quantization_config"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be_translated(
    tmp_path: Path,
    layout: Layout,
    edit: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    source = make(tmp_path, layout)
    edit_config(source, edit)
    refused(lambda out: convert_checkpoint(source, out, OTHER[layout.name]), tmp_path, message)


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "change", "message"),
    [
        ("weight_scale", None, "weight_scale is missing"),
        ("weight_scale_2", None, "weight_scale_2 is missing"),
        ("weight_scale", lambda a: a.view(np.uint8), "weight_scale is U8, and must be F8_E4M3"),
        ("weight_scale", lambda a: a[:-1], r"weight_scale has the shape \[31, 2\], not \[32, 2\]"),
        ("weight_scale_2", lambda a: np.repeat(a, 3), r"weight_scale_2 has the shape \[3\], not \[\]"),
        ("weight_scale_2", lambda a: a * 0, r"weight_scale_2 is \[0.0\], and must be positive and finite"),
        ("weight_scale_2", lambda a: a.astype(np.float16), "weight_scale_2 is F16, and must be F32"),
    ],
)
def test_broken_checkpoints(
    tmp_path: Path,
    end: str,
    change: Callable[[Array], Array] | None,
    message: str,
) -> None:
    source = make(tmp_path, MODELOPT)
    edit_tensors(source, put(f"{O_PROJ}.{end}", change))
    refused(lambda out: convert_checkpoint(source, out, COMPRESSED_TENSORS), tmp_path, f"{O_PROJ}: {message}")
    refused(lambda out: rescale_groups(source, out), tmp_path, f"{O_PROJ}: {message}")


def test_scales_without_a_reciprocal(tmp_path: Path) -> None:
    source = make(tmp_path, MODELOPT)
    for value in (1e-39, 3e38):
        edit_tensors(source, put(f"{O_PROJ}.weight_scale_2", lambda a, value=value: np.full_like(a, value)))
        refused(
            lambda out: convert_checkpoint(source, out, COMPRESSED_TENSORS),
            tmp_path,
            f"{O_PROJ}.weight_scale_2 is .*, and its reciprocal is no normal float32",
        )


def test_folders(tmp_path: Path) -> None:
    source = make(tmp_path, MODELOPT)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    edit_tensors(source, put(f"{ATTENTION[0]}.weight_scale_2", lambda a: a * np.float32(0.5)))
    before = contents(tmp_path)
    for out, message in (
        (source, "must not lie in each other"),
        (source / "out", "must not lie in each other"),
        (tmp_path, "must not lie in each other"),
        (tmp_path / "full", "full is there already"),
        (tmp_path / "none" / "out", "none does not exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert_checkpoint(source, out, COMPRESSED_TENSORS)
        with pytest.raises(CheckpointError, match=message):
            rescale_groups(source, out)
    refused(lambda out: convert_checkpoint(source, out, MODELOPT), tmp_path, "in the layout modelopt already")
    model = tmp_path / "model"
    refused(lambda out: convert_checkpoint(model, out, MODELOPT), tmp_path, "no NVFP4 weight")
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    convert_checkpoint(source, tmp_path / "empty", COMPRESSED_TENSORS)


def test_names_that_are_taken(tmp_path: Path) -> None:
    source = make(tmp_path, COMPRESSED_TENSORS)
    dense = np.zeros((32, 32), np.float32)
    edit_tensors(
        source, lambda t: t.update({f"{O_PROJ}.weight": dense} if f"{O_PROJ}.weight_packed" in t else {})
    )
    refused(
        lambda out: convert_checkpoint(source, out, MODELOPT), tmp_path, f"{O_PROJ}.weight is there besides"
    )

    def mix(tensors: Tensors) -> None:
        if tensors.pop(f"{O_PROJ}.weight", None) is not None:
            tensors[f"{O_PROJ}.weight"] = tensors.pop(f"{O_PROJ}.weight_packed")
            tensors[f"{O_PROJ}.weight_scale_2"] = tensors.pop(f"{O_PROJ}.weight_global_scale")

    edit_tensors(source, mix)
    refused(
        lambda out: convert_checkpoint(source, out, MODELOPT), tmp_path, "modelopt and compressed-tensors"
    )


@pytest.mark.parametrize("command", ["convert", "rescale"])
def test_interruptions(tmp_path: Path, command: str) -> None:
    """After any tensor there is no checkpoint; then it goes on, and ends as if it had not been stopped."""
    source = make(tmp_path, MODELOPT, 1.0)
    mismatch(source, MODELOPT)

    def call(out: Path, advance: Callable[[TensorInfo], None] = lambda tensor: None) -> object:
        if command == "convert":
            return convert_checkpoint(source, out, COMPRESSED_TENSORS, advance=advance)
        return rescale_groups(source, out, advance=advance)

    whole = call(tmp_path / "whole")
    out = tmp_path / "out"
    for after in (0, 5, 40, 3, 50):  # the first shard has 31
        with pytest.raises(KeyboardInterrupt):
            call(out, interrupting(after))
        assert not out.exists()
        assert not list((tmp_path / "out.partial").rglob("*.tmp"))
        assert not (tmp_path / "out.partial" / "checkpoint" / "config.json").exists()
    shard = (tmp_path / "out.partial" / "checkpoint" / FILES[0]).stat()
    with pytest.raises(CheckpointError, match=r"out\.partial is of another call"):
        rescale_groups(source, out, min_code=8)
    assert call(out) == whole
    assert contents(out) == contents(tmp_path / "whole")
    kept = (out / FILES[0]).stat()
    assert (kept.st_ino, kept.st_mtime_ns) == (shard.st_ino, shard.st_mtime_ns)  # not written twice
    assert not (tmp_path / "out.partial").exists()


# --- commands -----------------------------------------------------------------------------------------


def test_commands(tmp_path: Path) -> None:
    source, out = make(tmp_path, MODELOPT, 1.0), tmp_path / "out"
    code, output = run("convert", source, out, "--layout", "compressed-tensors")
    expected = f"13 modules (W4A4) from modelopt to compressed-tensors, 4 layers ignored: {out}"
    assert (code, output.strip()) == (0, expected)
    assert run("verify", out)[0] == 0
    for arguments, message in (
        (("convert", source, out, "--layout", "compressed-tensors"), "out is there already"),
        (("convert", source, tmp_path / "x", "--layout", "modelopt"), "in the layout modelopt already"),
        (("convert", source, tmp_path / "x", "--layout", "gguf"), "--layout"),
        (("convert", source, source / "x", "--layout", "compressed-tensors"), "must not lie in each other"),
        (("convert", source, tmp_path / "x"), "--layout"),
    ):
        code, output = run(*arguments)
        assert code == 2, output
        assert message in output
    assert not list(tmp_path.glob("x*"))
