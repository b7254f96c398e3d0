"""Importing topkapi has no effect but names: it prints nothing, and pulls in no package of the extras.

Seen to catch: `import transformers` at the top of topkapi/data/language_model.py, a print in topkapi/__init__.py, and
`import torch` at the top of topkapi/cli/reading.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "topkapi"
OPTIONAL = ("transformers", "datasets", "gguf", "accelerate", "matplotlib", "tensorboard", "wandb", "trackio")

# Kernels are the one place that imports Triton, which a torch without CUDA does not bring; __main__ runs the command.
NAMES = [
    ".".join(("topkapi", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if "kernels" not in path.parts and path.name != "__main__.py"
]


def run(source: str) -> str:
    """What a fresh interpreter prints, stdout and stderr together, when it runs `source`; it must succeed."""
    ran = subprocess.run(
        [sys.executable, "-c", source],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


def test_import_topkapi_is_silent():
    assert run("import topkapi") == ""


def test_import_topkapi_adds_no_heavy_package():
    # torch comes first: what it imports by itself, Triton with some builds, is not Topkapi's doing.
    source = """
import sys
import torch
before = set(sys.modules)
import topkapi
added = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(added & {"triton", "transformers", "datasets", "tyro"}))
"""
    assert run(source) == "[]\n"


@pytest.mark.parametrize(
    "words", ["--help", "--version", "train demo --help", "study --help", "trian", "train demo --x 1"]
)
def test_help_and_mistakes_are_shown_before_torch_is_there(words):
    source = f"""
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from topkapi.cli import main
with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
    try:
        main({words.split()!r})
    except SystemExit:
        pass
print("torch" in sys.modules)
"""
    assert run(source) == "False\n"


def test_the_autoencoder_is_topkapis_own_name():
    source = """
import topkapi
from topkapi.model import Autoencoder
assert topkapi.Autoencoder is Autoencoder
assert "Autoencoder" in dir(topkapi)
assert not hasattr(topkapi, "Autoencoders")
assert topkapi.config.TrainConfig and topkapi.study.open
"""
    assert run(source) == ""


def test_every_module_imports_with_the_core_dependencies_alone():
    source = f"""
import importlib
import sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # None makes `import transformers` fail as if it were not installed
for name in {NAMES!r}:
    importlib.import_module(name)
"""
    assert "topkapi.config" in NAMES
    assert run(source) == ""
