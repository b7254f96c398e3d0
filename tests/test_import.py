"""Importing topkapi has no effect but names: it prints nothing, and pulls in no package of the extras.

Seen to catch: `import transformers` at the top of topkapi/data/language_model.py, and a print in topkapi/__init__.py.
"""

import os
import subprocess
import sys
from pathlib import Path

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
