"""The documents: their Python runs, their commands parse, their links resolve, no public name is missing."""

import importlib
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
from conftest import CUDA, REQUIRED

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS_CUDA = "<!-- needs cuda -->"
PACKAGES = ("nvfp4sweep", "nvfp4sweep_torch", "nvfp4sweep_jax")


class Block(NamedTuple):
    """A fenced block. `line` is that of its first line of content, `before` the text line above the fence."""

    language: str
    text: str
    line: int
    before: str


def read(document: Path) -> str:
    if not document.is_file():
        pytest.fail(f"{document} does not exist")
    return document.read_text(encoding="utf-8")


def fenced_blocks(text: str) -> Iterator[Block]:
    for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```[ ]*$", text, re.MULTILINE | re.DOTALL):
        before = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        yield Block(match[1], match[2], text[: match.start(2)].count("\n") + 1, before.strip())


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```[ ]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def by_name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def missing_framework(text: str) -> str | None:
    """The first framework that a block imports and that is not installed."""
    for name in re.findall(r"^(?:import|from) (torch|jax|nvfp4sweep_torch|nvfp4sweep_jax)\b", text, re.M):
        framework = name.removeprefix("nvfp4sweep_")
        if importlib.util.find_spec(framework) is None:
            return framework
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_python_blocks_run(document: Path) -> None:
    text = read(document)
    namespace: dict[str, Any] = {"__name__": "__document__"}
    left_out = []
    for block in fenced_blocks(text):
        if block.language != "python":
            continue
        if block.before == NEEDS_CUDA and not CUDA:
            left_out.append(f"line {block.line} needs CUDA")
            continue
        framework = missing_framework(block.text)
        if framework is not None:
            if framework in REQUIRED:
                pytest.fail(f"line {block.line} needs {framework}, which is not installed")
            left_out.append(f"line {block.line} needs {framework}, which is not installed")
            continue
        # Empty lines before it, so that a traceback has the document's line numbers.
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(document), "exec"), namespace)
    if any("not installed" in reason for reason in left_out):
        pytest.skip("; ".join(left_out))


def commands() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for block in fenced_blocks(document.read_text(encoding="utf-8")):
            if block.language in ("sh", "shell", "bash", "console", ""):
                lines = block.text.replace("\\\n", " ").splitlines()
                stripped = (line.strip().removeprefix("$ ") for line in lines)
                found += [
                    (by_name(document), line) for line in stripped if re.match(r"nvfp4sweep(\s|$)", line)
                ]
    return found


def test_there_are_commands() -> None:
    assert any("report" in command for _, command in commands())


@pytest.mark.parametrize(("document", "command"), commands())
def test_command_parses(document: str, command: str) -> None:
    pytest.importorskip("typer", reason="the extra [checkpoint] is not installed")
    pytest.importorskip("safetensors", reason="the extra [checkpoint] is not installed")
    from typer.testing import CliRunner

    from nvfp4sweep.cli import app

    words = shlex.split(command, comments=True)[1:]
    is_subcommand = bool(words) and not words[0].startswith("-")
    subcommand = words[:1] if is_subcommand else []
    result = CliRunner().invoke(app, [*subcommand, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 0, f"{document}: {command}: {result.output}"
    help_text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    for option in options:
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help_text), f"{document}: {command}"


def anchors(text: str) -> set[str]:
    """The anchors that a Markdown viewer makes of the headings."""
    headings = re.findall(r"^#+ +(.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


IS_SOURCE_TREE = (ROOT / "pyproject.toml").is_file() and (ROOT / "nvfp4sweep").is_dir()
LINKING = [*DOCUMENTS, *(p for p in (ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md") if p.is_file())]


@pytest.mark.parametrize("document", LINKING, ids=by_name)
def test_relative_links_resolve(document: Path) -> None:
    links = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", without_code(read(document)))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.is_relative_to(ROOT), f"{link} leaves the project"
        if not IS_SOURCE_TREE and target.parent not in (ROOT / "docs", ROOT / "docs/images"):
            continue  # Only the README, the documents and the tests were copied.
        assert target.exists(), f"{link} does not exist"
        if anchor:
            assert anchor in anchors(read(target)), f"{link}: no such heading"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package: str) -> None:
    framework = package.removeprefix("nvfp4sweep_")
    if framework != package:
        pytest.importorskip(framework, reason=f"{framework} is not installed")
    module = importlib.import_module(package)
    text = read(ROOT / "docs" / "api.md")
    section = text.partition(f"\n## {package}\n")[2].partition("\n## ")[0]
    assert section, f"docs/api.md has no section {package}"
    for name in module.__all__:
        assert re.search(rf"\b{name}\b", section), f"{package}.{name} is not in docs/api.md"
        value = getattr(module, name)
        if inspect.isfunction(value):
            for parameter in inspect.signature(value).parameters:
                assert re.search(rf"\b{parameter}\b", text), f"{package}.{name}({parameter}) is not there"
