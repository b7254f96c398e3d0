"""What latents do: the language model with the autoencoder at its site, and latents changed.

1. `edits`: what a latent's value becomes, and where. `spliced`: the language model that runs with it.
2. `attribution`: which latents made the model prefer one token over another; estimated, then measured.
3. `effects`: what follows from one latent at one token.
4. `steering`: text written with latents changed; `controls`, `proportions`: whether it differs, and from what.
5. `finding`, `writing`: the commands `topkapi find` and `topkapi steer`.

    spliced = topkapi.explore.open("runs/demo")
    tokens = spliced.tokens("The old man looked at his wife and")
    spliced.logits(tokens, [Edit(17, "clamp", 2.0)])
"""

from topkapi.explore.attribution import Attribution, attribute, measure, rank_correlation
from topkapi.explore.controls import matched_controls
from topkapi.explore.edits import Edit
from topkapi.explore.effects import Effects, ablation_effects
from topkapi.explore.prompts import single_token
from topkapi.explore.spliced import Code, Spliced
from topkapi.explore.spliced import open_run as open
from topkapi.explore.steering import Experiment, Samples, experiment, sample

__all__ = [
    "Attribution",
    "Code",
    "Edit",
    "Effects",
    "Experiment",
    "Samples",
    "Spliced",
    "ablation_effects",
    "attribute",
    "experiment",
    "matched_controls",
    "measure",
    "open",
    "rank_correlation",
    "sample",
    "single_token",
]
