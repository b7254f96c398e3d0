"""Controls from a study that is made up.

Mutations seen caught: an edited latent among the controls; a latent in two controls; density compared without its
logarithm; silent latents drawn.
"""

import numpy as np
import pytest

from topkapi.errors import TopkapiError
from topkapi.explore import Edit, matched_controls
from topkapi.study import Study


class MadeUp(Study):
    """What is asked of a study, without files."""

    def __init__(self, n_fired, maxima):
        self.arrays = {"n_fired": np.array(n_fired), "maxima": np.array(maxima, dtype=np.float32)}
        self.n_tokens, self.folder = 1_000, "here"


@pytest.fixture
def study():
    """60 latents in three groups of activity, and 5 that never fired."""
    rng = np.random.default_rng(0)
    n_fired = np.repeat([5, 50, 500], 20) + rng.integers(0, 4, 60)
    return MadeUp([*n_fired, *[0] * 5], [*np.repeat([0.2, 1.0, 0.2], 20), *[0.0] * 5])


def test_controls_are_latents_of_equal_activity(study):
    edits = [Edit(3, "clamp", 2.0), Edit(3, "add", 1.0), Edit(45, "ablate")]
    controls = matched_controls(study, edits, 4)
    assert len(controls) == 4
    for control in controls:
        assert [(e.kind, e.value) for e in control] == [(e.kind, e.value) for e in edits]
        assert control[0].latent == control[1].latent
        assert control[0].latent < 20
        assert 40 <= control[2].latent < 60
    latents = [control[i].latent for control in controls for i in (0, 2)]
    assert len(set(latents)) == 8
    assert not {3, 45} & set(latents)


def test_controls_are_drawn_by_the_seed(study):
    edits = [Edit(3, "ablate")]
    assert matched_controls(study, edits, 4) == matched_controls(study, edits, 4)
    assert matched_controls(study, edits, 4) != matched_controls(study, edits, 4, seed=1)


def test_no_latent_is_in_two_controls(study):
    for seed in range(5):
        controls = matched_controls(study, [Edit(3, "ablate"), Edit(4, "ablate")], 8, seed)
        assert len({edit.latent for control in controls for edit in control}) == 16


def test_nearness_is_relative():
    """50 and 200 are as near to 100 as each other; 1 is farther than 300."""
    study = MadeUp([100, 30, 300, 50, 200, 1, 2, 3, 5], [1.0] * 9)
    drawn = {matched_controls(study, [Edit(0, "ablate")], 1, seed)[0][0].latent for seed in range(40)}
    assert drawn == {1, 2, 3, 4}


def test_mistakes_are_named(study):
    with pytest.raises(TopkapiError, match=r"latent 61 never fired in the 1,000 tokens of here"):
        matched_controls(study, [Edit(61, "ablate")], 2)
    for n_controls, seed in ((-1, 0), (2, -1)):
        with pytest.raises(TopkapiError, match="must be 0 or more"):
            matched_controls(study, [Edit(1, "ablate")], n_controls, seed)
    with pytest.raises(TopkapiError, match=r"60 controls of 1 latents each need 60 other latents .* there are 59"):
        matched_controls(study, [Edit(1, "ablate")], 60)
