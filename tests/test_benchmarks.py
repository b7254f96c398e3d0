"""Every script in benchmarks/ and examples/ loads: what it takes from the package is still there. And their arithmetic.

Seen to catch: a function that had moved to another module; kernels that overlap counted twice; what is communicated
beside computing counted as time.
"""

from pathlib import Path

import pytest

from tests import scripts

SCRIPTS = sorted(path for folder in ("benchmarks", "examples") for path in (scripts.ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_loads(script: Path, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(script.parent)  # where Python looks first when it runs one
    scripts.load(script)


def test_a_step_is_cut_into_what_computes_what_communicates_and_what_waits(tmp_path):
    scaling = scripts.load("benchmarks/scaling.py")
    kernels = [  # two steps: name, start, length
        ("screen", 0, 4_000), ("ncclAllGather", 3_000, 2_000), ("_update", 6_000, 2_000), ("fill", 7_000, 2_000),
        ("ncclAllReduce", 7_500, 1_000),
    ]  # fmt: skip
    kernels = [{"name": name, "start": start, "us": us} for name, start, us in kernels]
    assert scaling.by_part(kernels) == {
        "encoder": 2.0,
        "decode, latent gradient": 0.0,
        "weight gradients, Adam": 1.0,
        "the rest": 1.0,
        "communicates alone": 0.5,
        "waits": 0.5,
    }
    scaling.draw_parts({"1x2 none 64 x 16 bf16": kernels, "2x1 auto 64 x 16 bf16": kernels}, tmp_path / "parts.png")
    assert (tmp_path / "parts.png").stat().st_size > 0
