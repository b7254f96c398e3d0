"""A language model with an autoencoder at its site, whose latents can be changed while it runs.

The error term is kept: what the autoencoder does not explain of an activation stays in it, and so does everything else
but the change of the edited latents,

    raw' = raw + norm sum_i (z'_i - z_i) W_dec[i]

with the token's mean and norm frozen. Without an edit nothing is added, and the logits are the language model's own.

1. Before a forward pass a hook reads which tokens come, which of them are padding, and how many went before (the
   attention mask, or the length of the cache of keys and values): so that positions count from each sequence's first
   real token, in batches padded on either side and in every step of `generate`.
2. At the site a second hook encodes the activations, finds z and z', and adds the difference.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from topkapi.console import say
from topkapi.data.language_model import LanguageModel
from topkapi.errors import TopkapiError
from topkapi.explore.edits import Edit, changes
from topkapi.explore.prompts import encode
from topkapi.model import Autoencoder
from topkapi.train import device_type, load_run, warn_if_changed


@dataclass(frozen=True)
class Code:
    """What the autoencoder makes of the tokens of some contexts."""

    values: Float[Tensor, "b c k"]
    indices: Int[Tensor, "b c k"]
    norm: Float[Tensor, "b c"]
    """The scale of each raw activation: a latent's part of it is norm z W_dec[i]."""
    error: Float[Tensor, "b c"]
    """|x - recon|^2 of the normalised activation, whose own |x|^2 is 1: the share that is not explained."""
    kept: Bool[Tensor, "b c"]
    """Whether training would use the token; what is said of others means nothing."""


@dataclass
class _Places:
    """Where the tokens of the forward pass that is running are in their sequences."""

    position: Int[Tensor, "b c"]
    """From 0, the first real token; -1 for padding."""
    kept: Bool[Tensor, "b c"]


class Spliced:
    """A language model with an autoencoder at its site.

    Methods take the language model's lock, as its own do: they may be called from several threads, one of which runs
    at a time. A block of `editing` holds it.

    Raises:
        TopkapiError: the autoencoder is of another width, or of another site.
    """

    def __init__(self, lm: LanguageModel, ae: Autoencoder) -> None:
        if lm.d_model != ae.d_model:
            raise TopkapiError(
                f"the autoencoder is of activations of width {ae.d_model}; {lm.name} has {lm.d_model}: it was trained "
                f"on another language model{f', {ae.language_model}' if ae.language_model else ''}."
            )
        if ae.site and ae.site != lm.site:
            raise TopkapiError(
                f"the autoencoder was trained at {ae.site}, and the language model is read at {lm.site}: give "
                f"LanguageModel the site {ae.site}."
            )
        if ae.language_model and ae.language_model != lm.name:
            say(
                f"warning: the autoencoder was trained on {ae.language_model}; whether {lm.name} is the same is not "
                "checked."
            )
        self.lm, self.ae = lm, ae
        data = (ae.training_config or {}).get("data", {})
        self.drops_first: bool = data.get("drop_first_position", True)
        self.drops_special: bool = data.get("drop_special_tokens", True)
        self._special = torch.tensor(sorted(lm.special_ids), dtype=torch.int64, device=lm.device)
        self._editor: int | None = None  # the thread that is inside of `editing`

    def tokens(self, text: str) -> Int[Tensor, "1 c"]:
        """The tokens of a prompt. Raises TopkapiError where there is none, or too many for the language model."""
        return encode(self.lm, text)

    def kept(self, tokens: Int[Tensor, "b c"]) -> Bool[Tensor, "b c"]:
        """Which tokens training would use: not the first position, nor special tokens, as the run's config says."""
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self._kept(tokens, position)

    def _kept(self, tokens: Tensor | None, position: Int[Tensor, "b c"]) -> Bool[Tensor, "b c"]:
        kept = position >= (1 if self.drops_first else 0)
        if self.drops_special and tokens is not None:
            special = self._special.to(tokens)
            kept = kept & (tokens[..., None] != special).all(-1)
        return kept

    @torch.no_grad()
    def code(self, tokens: Int[Tensor, "b c"]) -> Code:
        """The active latents of every token; for activation relu k is n_latents. Cost: a pass up to the site."""
        self._require_no_edits()
        x, norm, values, indices = self._encode(self.lm.activations(tokens))
        error = (x - self.ae.decode(values, indices)).square().sum(-1)
        b, c = tokens.shape
        return Code(
            values=values.unflatten(0, (b, c)),
            indices=indices.unflatten(0, (b, c)),
            norm=norm.view(b, c),
            error=error.view(b, c),
            kept=self.kept(tokens).to(values.device),
        )

    def logits(self, tokens: Int[Tensor, "b c"], edits: Sequence[Edit] = ()) -> Float[Tensor, "b c vocab"]:
        """Logits of the next token with latents edited, in float32 (float64 of a model in float64)."""
        with self.editing(edits):
            return self.lm.logits(tokens)

    def generate(self, tokens: Int[Tensor, "b c"], edits: Sequence[Edit] = (), **options: Any) -> Any:
        """What `lm.model.generate` returns for its `options`, with latents edited.

        Give an `attention_mask` where contexts are padded.
        """
        tokens = tokens.to(self.lm.device)
        with self.editing(edits):
            return self.lm.model.generate(tokens, **{"attention_mask": torch.ones_like(tokens), **options})

    @contextmanager
    def editing(self, edits: Sequence[Edit]) -> Iterator[None]:
        """Within the block `lm.model(...)` and `lm.model.generate(...)` run with latents edited.

        Sequences of a batch may be padded, with an attention mask; tokens that are padding are never edited. Gradients
        pass as if the change were a constant. Other threads wait where they use `lm`, and see no edits where they call
        `lm.model` directly.

        Raises:
            TopkapiError: no such latent, or inside of another block.
        """
        self._require_no_edits()
        self.check(edits)
        if not edits:
            yield
            return
        latents = sorted({edit.latent for edit in edits})
        rows = self.ae.W_dec.detach()[latents]
        places: list[_Places] = []

        def before(call: dict[str, Any]) -> None:
            places[:] = [self._places(call)]

        def replace(raw: Tensor) -> Tensor:
            return raw + self._change(raw.detach(), edits, latents, rows, places[0])

        with self.lm.changing(replace, before):
            self._editor = get_ident()
            try:
                yield
            finally:
                self._editor = None

    def check(self, edits: Sequence[Edit]) -> None:
        """Raise TopkapiError if an edit names a latent that there is none of."""
        for edit in edits:
            self.check_latent(edit.latent)

    def check_latent(self, latent: int) -> None:
        """Raise TopkapiError if there is no such latent."""
        if not 0 <= latent < self.ae.n_latents:
            raise TopkapiError(f"no latent {latent}: the autoencoder has latents 0 to {self.ae.n_latents - 1}.")

    def _require_no_edits(self) -> None:
        if self._editor == get_ident():
            raise TopkapiError(
                "edits are in force here already: give all of them to one `editing`, and leave it first."
            )

    @torch.no_grad()
    def _change(
        self,
        raw: Float[Tensor, "b c d_model"],
        edits: Sequence[Edit],
        latents: Sequence[int],
        rows: Float[Tensor, "m d_model"],
        places: _Places,
    ) -> Float[Tensor, "b c d_model"]:
        """norm (z' - z) W_dec of the edited latents, on the language model's device; their `rows` of W_dec are given.

        It runs at every token that is written, and does not make the host wait for the device.
        """
        device, shape = self.ae.W_dec.device, raw.shape[:2]
        position, kept = places.position.to(device), places.kept.to(device)
        _, norm, values, indices = self._encode(raw)
        z = values_of(values, indices, latents).unflatten(0, shape)
        change = changes(edits, latents, z, position, kept)
        return (norm.view(*shape, 1) * (change @ rows)).to(raw.device)

    def _encode(self, raw: Float[Tensor, "b c d_model"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised rows (b c, d_model), their norms (b c, 1), values and indices (b c, k) of their latents."""
        rows = raw.flatten(0, 1).to(self.ae.W_dec)
        x, _, norm = self.ae.normalise(rows)
        return x, norm, *self.ae.encode(x)

    def _places(self, call: dict[str, Any]) -> _Places:
        """Positions of the tokens of a forward pass, from the arguments that the decoder is given."""
        tokens, embedded = call.get("input_ids"), call.get("inputs_embeds")
        b, c = (tokens if tokens is not None else embedded).shape[:2]
        device = (tokens if tokens is not None else embedded).device
        mask, given, cache = call.get("attention_mask"), call.get("position_ids"), call.get("past_key_values")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask.to(device) > 0
            position = torch.where(real, real.cumsum(1) - 1, -1)[:, -c:]
        elif given is not None:
            position = given.to(device).expand(b, c)
        else:
            before = 0 if cache is None else int(cache.get_seq_length())
            position = torch.arange(before, before + c, device=device).expand(b, c)
        return _Places(position, self._kept(tokens, position))


def values_of(
    values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"], latents: Sequence[int]
) -> Float[Tensor, "n m"]:
    """The values of some latents, 0 where they are not among the k of a token."""
    if indices.stride(0) == 0:  # all latents in order, as a ReLU autoencoder gives them
        return torch.stack([values[:, latent] for latent in latents], 1)
    return torch.stack([torch.where(indices == latent, values, 0).sum(1) for latent in latents], 1)


def open_run(run: Path | str) -> Spliced:
    """The autoencoder of a finished run in the language model that it was trained on, which computes in float32.

    On a GPU that is twice the memory of training; in bf16 what most latents change would be rounded away.

    Raises:
        TopkapiError: no finished run, or its language model cannot be loaded.
    """
    ae, config = load_run(Path(run))
    lm = LanguageModel.load(config.language_model, torch.device(device_type(config)))
    warn_if_changed(Path(run), ae, lm)
    lm.model.float()
    return Spliced(lm, ae.to(lm.device))
