"""Find what made a language model say one word rather than another, and change it: a tour of `topkapi.explore`.

    python examples/explore.py runs/demo

Any finished run will do; the prompt and the two words are at the end. Read it from top to bottom.
"""

import re
import sys
from pathlib import Path

import topkapi.explore
import topkapi.study
from topkapi.data.language_model import LanguageModel
from topkapi.explore import (
    Edit,
    Spliced,
    ablation_effects,
    attribute,
    experiment,
    matched_controls,
    measure,
    rank_correlation,
    sample,
    single_token,
)


def explore(run: Path, prompt: str, this: str, that: str) -> None:
    """Print what the autoencoder of `run` has to say on why `this` follows `prompt` and not `that`."""
    # The language model with the autoencoder at its site. Nothing changes until a latent is edited.
    spliced = topkapi.explore.open(run)
    lm, tokens = spliced.lm, spliced.tokens(prompt)

    # Which latents are active on the last token, and how much of it they leave unexplained.
    code = spliced.code(tokens)
    active = zip(code.indices[0, -1].tolist(), code.values[0, -1].tolist(), strict=True)
    print(f"last token: {list(active)[:3]} ..., unexplained {code.error[0, -1]:.2f}")

    # Which latents argue for `this`: an estimate from one gradient, checked by taking each away.
    up, down = [single_token(lm, this)], [single_token(lm, that)]
    found = attribute(spliced, tokens, up, down)
    top = found.latents[:8].tolist()
    measured = measure(spliced, tokens, top, up, down)
    print(f"logit of {this!r} less that of {that!r}: {found.metric:+.3f}")
    for latent, estimate, fall in zip(top, found.total, measured, strict=False):
        print(f"  latent {latent:6}  estimated {estimate:+.3f}  measured {fall:+.3f}")
    print(f"  {rank_correlation(found.total[:8], measured)}")

    # What one of them does to every prediction that follows.
    at = int(abs(found.at[0]).argmax())
    effects = ablation_effects(spliced, tokens, at, top[0])
    lost = [lm.tokenizer.decode([one.token]) for one in effects.down[-1][:5]]
    print(f"without latent {top[0]} at position {at}: the last prediction moves by {effects.kl[-1]:.4f} nats")
    print(f"  and these lose most: {lost}")

    # Text with the latent held at twice its largest value, beside text from the same random numbers.
    study = topkapi.study.open(run / "study", run) if (run / "study").exists() else None
    largest = (study.latent(top[0]).maximum if study else None) or float(found.values[0].max())
    held = [Edit(top[0], "clamp", 2 * largest)]
    pairs = sample(spliced, tokens, held, n_samples=2, n_tokens=12, seed=0)
    for clean, steered in zip(pairs.clean, pairs.steered, strict=True):
        print(f"  as it is: {lm.tokenizer.decode(clean)!r}\n  steered:  {lm.tokenizer.decode(steered)!r}")

    # Does `this` come more often than with other latents held as high? Controls come from a study.
    if study is not None:
        word = re.compile(re.escape(this.strip()))
        counted = experiment(spliced, tokens, held, matched_controls(study, held, 2), word, n_samples=5, n_tokens=8)
        print(f"  {word.pattern!r} in {counted.steered.n} of {counted.steered.of}: {counted.steered_less_controls}")

    # The same with a transformers model of your own, and transformers' own `generate`.
    mine = Spliced(LanguageModel.wrap(lm.model, lm.tokenizer, site=lm.site), spliced.ae)
    silenced = [Edit(latent, "ablate", where="active") for latent in top[:3]]
    with mine.editing(silenced):
        written = lm.model.generate(tokens.to(lm.device), max_new_tokens=8, do_sample=False, pad_token_id=0)
    print(f"without the first three: {lm.tokenizer.decode(written[0])!r}")


if __name__ == "__main__":
    explore(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"), "My grandmother said that", " she", " he")
