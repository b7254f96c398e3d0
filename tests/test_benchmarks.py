"""Every script in benchmarks/ and examples/ loads: what it takes from the package is still there.

Seen to catch: a function that had moved to another module.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for folder in ("benchmarks", "examples") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_loads(script: Path, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(script.parent)  # where Python looks first when it runs one
    name = f"script_{script.stem}"
    spec = importlib.util.spec_from_file_location(name, script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
