"""Rules of the source that no linter knows: sizes, words, versions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.__about__ import __version__

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "kvstrata").rglob("*.py"))

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
LARGE_FILES = {
    "testing/client.py": "the client contract: one test per promise, read as a list",
}
LARGE_FUNCTIONS: dict[str, str] = {}
BANNED_WORDS = ("Manager", "Controller", "Handler", "Helper", "Utils", "Impl", "Wrapper", "V2")
BANNED_IN_COMMENTS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b(?!\(#\d+\))")


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT / "src" / "kvstrata"))


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    """Qualified names and lengths, docstrings not counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                docstring = node.body[0]
                assert docstring.end_lineno is not None
                length -= docstring.end_lineno - docstring.lineno + 1
            yield f"{_relative(path)}:{node.name}", length


def test_files_fit() -> None:
    long = {_relative(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > MAX_FILE_LINES}
    assert long.keys() <= LARGE_FILES.keys(), long


def test_functions_fit_a_screen() -> None:
    long = {name: n for p in SOURCES for name, n in _functions(p) if n > MAX_FUNCTION_LINES}
    assert long.keys() <= LARGE_FUNCTIONS.keys(), long


def test_exceptions_are_still_needed() -> None:
    for name in LARGE_FILES:
        assert len((ROOT / "src" / "kvstrata" / name).read_text().splitlines()) > MAX_FILE_LINES, name
    lengths = {name: length for path in SOURCES for name, length in _functions(path)}
    for name in LARGE_FUNCTIONS:
        assert lengths[name] > MAX_FUNCTION_LINES, name


@pytest.mark.parametrize("path", SOURCES, ids=_relative)
def test_words(path: Path) -> None:
    """Names of our own carry no word without a meaning, and nothing is left to do without an issue's number."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert not [word for word in BANNED_WORDS if word in node.name], node.name
    assert not BANNED_IN_COMMENTS.search(text)


def test_no_unsafe_deserialisation() -> None:
    banned = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not banned & {alias.name.split(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in banned, path
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path


def test_changelog_knows_the_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == __version__
