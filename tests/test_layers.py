"""Who may import whom, and how long a function may be, read from the syntax trees of all of topkapi.

Each rule was seen to catch its planted violation: those are the cases of `test_a_violation_is_named`.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "topkapi"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room is a file or folder directly in topkapi/. It imports rooms of lower layers, and files of its own folder.
ROOMS_OF_LAYER = {
    0: ["config", "errors", "ops", "files", "tensor_files", "launch", "console", "parallel", "geometric_median",
        "plotting", "published", "results"],
    1: ["model", "loss", "exchange", "gradients", "statistics"],
    2: ["auxk", "step", "optim", "checkpoint", "formats", "data", "dead", "metrics"],
    3: ["train", "evaluate", "explore", "study", "scaling"],
    4: ["cli", "recipes", "viewer", "demo", "evaluation", "bench", "sweep", "figures", "__main__", "__init__"],
}  # fmt: skip
LAYER = {room: layer for layer, rooms in ROOMS_OF_LAYER.items() for room in rooms}

# The few imports within a layer: importer -> imported. Any room may import errors.
SIDEWAYS = {
    "parallel": {"config", "console", "launch"},
    "published": {"files", "tensor_files"},
    "results": {"files"},
    "tensor_files": {"files"},
    "model": {"exchange"},
    "step": {"auxk"},
    "train": {"evaluate"},
    "study": {"evaluate"},
    "explore": {"evaluate", "study", "train"},
    "figures": {"recipes", "sweep"},
    "demo": {"evaluation", "figures"},
    "cli": {"bench", "demo", "evaluation", "figures", "recipes", "sweep", "viewer"},
    "viewer": {"sweep"},
    "__main__": {"cli"},
}

# Third-party packages that only these places import.
WALLS = {
    "torch.distributed": ("parallel.py", "checkpoint.py"),
    "triton": ("ops/kernels/",),
    "transformers": ("data/",),
    "datasets": ("data/",),
    "tyro": ("cli/",),
}

OWN_ATTRIBUTES = ("topkapi.__doc__", "topkapi.__file__", "topkapi.__version__")  # known before any import is done

LONGEST_FUNCTION = 60  # lines
LONGEST_KERNEL = 100  # a kernel cannot be cut at will: what it holds in registers would go through memory


def room_of(path: str) -> str:
    """The room of a path relative to topkapi/: `data/tokens.py` -> data, `train.py` -> train."""
    return Path(path).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name) of each import in any scope; `from a import b` gives a.b.

    `import topkapi` and `import torch` count as what is then read from them, `topkapi.__version__` say.
    """
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if a.name != "topkapi" or a.asname]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("topkapi", "torch"):
            found.append((node.lineno, ast.unparse(node)))
    return found


def import_problem(path: str, name: str) -> str | None:
    """What is wrong with `path` (relative to topkapi/) importing the dotted `name`, if anything."""
    if name.startswith("."):
        return f"relative import {name}: write it from topkapi on"
    for package, places in WALLS.items():
        if (name == package or name.startswith(f"{package}.")) and not path.startswith(places):
            return f"imports {package}: only {' and '.join(places)} may"
    if name.split(".")[0] != "topkapi" or name in OWN_ATTRIBUTES:
        return None
    here, there = room_of(path), [*name.split("."), "__init__"][1]
    if there not in LAYER:
        return f"imports {name}: {there} is no room in the layer table; import a name from the module that defines it"
    if there in {here, "errors", *SIDEWAYS.get(here, ())} or LAYER[there] < LAYER[here]:
        return None
    return f"layer {LAYER[here]} ({here}) imports layer {LAYER[there]} ({there}): imports go strictly downwards"


def problems(path: str, source: str) -> list[str]:
    """Every broken rule in the module `path` (relative to topkapi/), as `path:line: what`."""
    if room_of(path) not in LAYER:
        return [f"{path}: room {room_of(path)!r} has no layer: add it to ROOMS_OF_LAYER in tests/test_layers.py"]
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else [f"{path}:1: no module docstring"]
    found += [f"{path}:{line}: {what}" for line, name in imported(tree) if (what := import_problem(path, name))]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            is_kernel = any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
            longest = LONGEST_KERNEL if is_kernel else LONGEST_FUNCTION
            if lines > longest:
                found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, more than {longest}")
    return found


def test_every_module_keeps_the_rules():
    found = []
    for module in MODULES:
        found += problems(module.relative_to(PACKAGE).as_posix(), module.read_text(encoding="utf-8"))
    assert MODULES
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("model.py", "from topkapi.train import train", "layer 1 (model) imports layer 3 (train)"),
        ("loss.py", "def f():\n    import topkapi.data.corpora", "layer 1 (loss) imports layer 2 (data)"),
        ("evaluate/probes.py", "from topkapi.train import train", "layer 3 (evaluate) imports layer 3 (train)"),
        ("model.py", "from topkapi import train", "layer 1 (model) imports layer 3 (train)"),
        ("train.py", "from topkapi import Autoencoder", "Autoencoder is no room in the layer table"),
        ("train.py", "import topkapi\nmake = topkapi.Autoencoder", "Autoencoder is no room in the layer table"),
        ("model.py", "import topkapi\nrun = topkapi.train.train", "layer 1 (model) imports layer 3 (train)"),
        ("train.py", "import topkapi as t", "imports layer 4 (__init__)"),
        ("data/tokens.py", "from .corpora import documents", "relative import"),
        ("train.py", "import torch\ntorch.distributed.barrier()", "imports torch.distributed"),
        ("optim.py", "from torch import distributed", "imports torch.distributed"),
        ("ops/reference.py", "import triton.language as tl", "imports triton"),
        ("train.py", "from transformers import AutoTokenizer", "imports transformers"),
        ("train.py", "import tyro", "imports tyro"),
        ("surprise.py", "", "room 'surprise' has no layer"),
        ("train.py", "def f():\n" + "    pass\n" * 60, "f has 61 lines"),
        ("ops/kernels/x.py", "import triton\n@triton.jit\ndef f():\n" + "    pass\n" * 100, "f has 101 lines"),
    ],
)
def test_a_violation_is_named(path, source, expected):
    assert any(expected in problem for problem in problems(path, f'"""Doc."""\n{source}'))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("train.py", "from topkapi.evaluate.reconstruction import reconstruction"),
        ("evaluate/__init__.py", "from topkapi.evaluate.downstream import downstream"),
        ("train.py", "from topkapi import __version__, ops"),
        ("files.py", "import topkapi\nversion = topkapi.__version__"),
        ("ops/kernels/encode_topk.py", "import triton"),
        ("data/language_model.py", "def load():\n    from transformers import AutoModelForCausalLM"),
        ("parallel.py", "import torch.distributed as dist"),
        ("files.py", "import tritonclient"),
    ],
)
def test_what_the_rules_allow_passes(path, source):
    assert problems(path, f'"""Doc."""\n{source}') == []


def test_a_module_without_docstring_is_named():
    assert problems("train.py", "x = 1") == ["train.py:1: no module docstring"]
