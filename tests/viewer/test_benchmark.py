"""benchmarks/viewer.py makes its study and measures it.

Mutation seen to fail: the offsets of latents not written before `invert`.
"""

from contextlib import closing

import pytest

import topkapi.study
from tests import scripts
from tests.viewer.serving import served


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module, for a tokenizer of few tokens."""
    module = scripts.load("benchmarks/viewer.py")
    for name, value in {"VOCABULARY": 60, "D_MODEL": 16, "K": 4, "DOCUMENT": 70, "REPETITIONS": 7}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_a_made_up_study_is_whole_and_measured(benchmark, tiny_config, tmp_path, capsys):
    run = tmp_path / "made-up"
    benchmark.make_run(run, tiny_config, n_latents=64, n_tokens=1_100)
    study = topkapi.study.open(run / "study", run)
    study.verify()
    study.require_run()
    assert study.n_tokens == 1_024
    latent = study.latent(int(study.n_fired.argmax()))
    codes = [study.code(row) for row in latent.rows.tolist()]
    assert all(latent.i in code.indices for code in codes)
    assert [code.values[code.indices == latent.i].item() for code in codes] == latent.values.tolist()

    with served(run, model=False) as address, closing(benchmark.Client(address)) as client:
        benchmark.measure(client, study, benchmark.Table("Tiny"), None)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 19
    assert {line.count("|") for line in lines} == {7}
