"""Training killed with SIGKILL at any moment, continued, ends exactly as if nothing had happened.

Half of the kills come before a chosen file operation (of tokenizing, caching activations, checkpoints, publishing),
the others at a random time; training goes on while a checkpoint is written, or waits. Seen to fail when: a checkpoint
is written under its final name; metrics of steps after the checkpoint are kept.
"""

import json
import os
import signal
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tests.command_line import assert_same_run, contents, metrics, train_arguments
from topkapi import published

KILLED_PHASES = ("tokens", "activations", "checkpoints", "publishing", "config", "metrics")


@pytest.fixture(scope="module")
def whole(fork_server, tiny_config, tmp_path_factory):
    """A run that nothing disturbs: its folder, how long it takes, and its file operations a phase."""
    folder = tmp_path_factory.mktemp("whole")
    assert fork_server.run(train_arguments(tiny_config, folder / "warm-up"), folder / "log", folder / "warm") == 0
    started = time.monotonic()
    status = fork_server.run(
        train_arguments(tiny_config, folder / "run"), folder / "log", folder / "cache", list_phases=True
    )
    log = (folder / "log").read_text()
    assert status == 0, log
    counts = json.loads(log.splitlines()[-1])
    assert set(counts) == set(KILLED_PHASES)
    assert all(counts.values()), counts
    return folder / "run", time.monotonic() - started, counts


def kill(fork_server, arguments, folder, whole, random, resumed, phase=None):
    """Start or go on with a run and kill it; what it was doing, or None if it came to its end first."""
    _, seconds, counts = whole
    log, cache = folder / "log", folder / "cache"
    if phase or random.random() < 0.5:
        phase = phase or str(random.choice(KILLED_PHASES))
        moment = (phase, int(random.integers(1, counts[phase] // (3 if resumed else 1) + 1)))
        status = fork_server.run(arguments, log, cache, kill_at=moment)
    else:
        pid = fork_server.start(arguments, log, cache)
        time.sleep(random.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        phase, status = "random time", fork_server.wait(pid)
    assert status in (0, -signal.SIGKILL), log.read_text()
    return phase if status else None


def kill_and_resume(fork_server, config, whole, folder, random, first_phase=None):
    """One run, killed one to four times; what it was doing each time."""
    hits, attempt = [], 0
    while not hits:  # a run that ended before its first kill is no trial
        attempt, home = attempt + 1, folder / str(attempt)
        home.mkdir()
        arguments = train_arguments(config, home / "run", "--resume")
        kills = [kill(fork_server, arguments, home, whole, random, False, first_phase)]
        kills += [kill(fork_server, arguments, home, whole, random, True) for _ in range(random.integers(0, 4))]
        hits = [phase for phase in kills if phase]
    log = home / "log"
    assert fork_server.run(arguments, log, home / "cache") == 0, log.read_text()
    run = whole[0]
    assert_same_run(home / "run", run)
    ours, theirs = (published.read_config(it) | {"commit": ""} for it in (home / "run", run))
    theirs["training"]["async_checkpoints"] = config.async_checkpoints
    assert ours == theirs
    assert [line["step"] for line in metrics(home / "run")] == list(range(1, 21))
    assert not [name for name in contents(home / "run") if name.endswith(".tmp")]
    return hits


@pytest.mark.parametrize("phase", ["activations", "checkpoints", "publishing"])
def test_a_killed_run_continued_equals_an_undisturbed_one(fork_server, tiny_config, whole, tmp_path, phase):
    random = np.random.default_rng([KILLED_PHASES.index(phase)])
    assert kill_and_resume(fork_server, tiny_config, whole, tmp_path, random, phase)[0] == phase


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_while_it_writes_beside_training_equals_an_undisturbed_one(
    fork_server, tiny_config, whole, tmp_path, seed
):
    random, config = np.random.default_rng([2, seed]), replace(tiny_config, async_checkpoints=True)
    assert kill_and_resume(fork_server, config, whole, tmp_path, random, "checkpoints")[0] == "checkpoints"


@pytest.mark.slow
def test_fifty_killed_runs_continued_equal_an_undisturbed_one(fork_server, tiny_config, whole, tmp_path, capsys):
    hits = Counter()
    for i in range(50):
        folder = tmp_path / str(i)
        folder.mkdir()
        config = replace(tiny_config, async_checkpoints=i % 2 == 1)
        hits.update(kill_and_resume(fork_server, config, whole, folder, np.random.default_rng([2026, i])))
    with capsys.disabled():
        print(f"\n50 runs, {hits.total()} kills: {dict(hits)}; all equal bit for bit")
    assert set(hits) >= {"random time", "tokens", "activations", "checkpoints", "publishing"}
