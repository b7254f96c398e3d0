"""What README.md names exists: files, links, make targets, commands with their flags, and imported names. So do the
files that other pages link.

Seen to catch: a misspelled file, `make tests`, `topkapi trian`, a flag that no command has, a moved function, and
pictures of a page that were deleted.
"""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from topkapi.cli import main

REPOSITORY = Path(__file__).parent.parent
README = re.sub(r"<!--.*?-->", "", (REPOSITORY / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
CODE = re.findall(r"`([^`\n]+)`", PROSE)
SHELL_LINES = [line for kind, text in BLOCKS if kind == "sh" for line in text.replace("\\\n", " ").splitlines()]
COMMANDS = [line.split(" #")[0].strip() for line in SHELL_LINES + CODE]
PATH = re.compile(r"[\w.-]+(/[\w.-]*)+|[\w.-]+\.(py|md|txt|toml|yml|png)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGES = sorted([REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "docs").rglob("*.md")])
MADE_BY_RUNNING = ("runs/", ".venv/", "/")


def is_path(code: str) -> bool:
    """Whether a piece of code in backticks names a file or folder of the repository."""
    return PATH.fullmatch(code) is not None and not code.startswith(MADE_BY_RUNNING)


def linked(text: str) -> set[str]:
    """Files that a page's links and pictures lead to, from its folder."""
    return {link.split("#")[0] for link in LINK.findall(text) if "://" not in link} - {""}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_links_exist(page):
    names = sorted(linked(page.read_text(encoding="utf-8")))
    assert [name for name in names if not (page.parent / name).exists()] == []


def test_files_that_the_readme_names_exist():
    paths = {code for code in CODE if is_path(code)}
    links = linked(PROSE)
    assert paths
    assert [name for name in sorted(paths | links) if not (REPOSITORY / name).exists()] == []


def test_make_targets_that_the_readme_names_exist():
    targets = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {word for command in COMMANDS if command.startswith("make ") for word in shlex.split(command)[1:]}
    assert {"demo", "test"} <= named
    assert {word for word in named if "=" not in word} - targets == set()


@pytest.mark.parametrize("command", sorted({command for command in COMMANDS if command.startswith("topkapi ")}))
def test_commands_and_flags_that_the_readme_names_exist(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # the help breaks no flag over two lines
    words = [word for word in shlex.split(command)[1:] if word != "--help"]
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    before_flags = words[: words.index(flags[0])] if flags else words
    try:
        status = main([*before_flags, "--help"])
    except SystemExit as leaving:
        status = leaving.code
    shown = "".join(capsys.readouterr())
    assert status == 0, shown
    assert [flag for flag in flags if not re.search(rf"{re.escape(flag)}(?![\w-])", shown)] == []


def test_python_examples_import_what_exists():
    examples = [ast.parse(text) for kind, text in BLOCKS if kind == "python"]
    assert examples
    for node in (node for example in examples for node in ast.walk(example)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "topkapi":
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
