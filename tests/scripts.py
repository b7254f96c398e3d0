"""Scripts that are no modules of the package, loaded from their files."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def load(script: str | Path) -> ModuleType:
    """A new module of the script at a path, absolute or from the root of the repository."""
    path = ROOT / script
    name = f"script_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their own module
    spec.loader.exec_module(module)
    return module
