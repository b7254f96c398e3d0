"""The autoencoder: four parameters, encoding, decoding, normalisation and initialisation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jaxtyping import Float, Int
from torch import Tensor, nn

from topkapi import exchange, ops, published
from topkapi.console import say
from topkapi.errors import TopkapiError
from topkapi.files import write_text_atomic
from topkapi.geometric_median import geometric_median
from topkapi.ops.normalise import normalised
from topkapi.parallel import ALONE, Mesh

DENSE_ELEMENTS = 2**25  # latents of a ReLU autoencoder in memory at a time
DRAWN_TOGETHER = 2**16  # latents whose initial directions are one stream of random numbers
PARAMETERS = ("W_enc", "W_dec", "latent_bias", "pre_bias")
OF_LATENTS = PARAMETERS[:3]


class Normalised(NamedTuple):
    """Activations as the autoencoder sees them, and what `denormalise` needs to undo it."""

    x: Float[Tensor, "... d_model"]
    mean: Float[Tensor, "... 1"]
    norm: Float[Tensor, "... 1"]


class Autoencoder(nn.Module, PyTorchModelHubMixin, library_name="topkapi", license="mit"):
    """A sparse autoencoder of language-model activations.

        x      = (raw - mean over d_model) / norm                      per token
        z      = ReLU(TopK_k(W_enc (x - pre_bias) + latent_bias))      or ReLU alone (activation relu)
        recon  = z W_dec + pre_bias                                    then denormalised

    W_enc and W_dec are both (n_latents, d_model): row i belongs to latent i. `load_state_dict`, `save_pretrained`,
    `from_pretrained` and `push_to_hub` work as everywhere; the published config.json holds the normalisation, the
    site, the language model's name and the training summary, with its fingerprint.

    One of several processes that train it holds the rows `latents` of them, those that a process alone would start
    with; it is an autoencoder only together with the others (`topkapi.exchange`), and encodes and decodes nothing by
    itself.

    Raises:
        TopkapiError: k > n_latents, or a size below 1.

    Source: Gao et al. 2024, sections 2.1 to 2.3.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_latents: int,
        k: int,
        activation: Literal["topk", "relu"] = "topk",
        language_model: str = "",
        site: str = "",
        seed: int = 0,
        latents: slice | None = None,
        training: dict[str, Any] | None = None,
        summary: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if min(d_model, n_latents, k) < 1 or k > n_latents:
            raise TopkapiError(
                f"An autoencoder needs d_model >= 1 and 1 <= k <= n_latents; got d_model={d_model}, "
                f"n_latents={n_latents}, k={k}."
            )
        self.d_model, self.n_latents, self.k = d_model, n_latents, k
        self.activation = activation
        self.language_model, self.site = language_model, site
        self.training_config, self.summary = training, summary or {}
        directions = _directions(n_latents, d_model, seed, latents or slice(0, n_latents))
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.clone())
        self.latent_bias = nn.Parameter(torch.zeros(len(directions)))
        self.pre_bias = nn.Parameter(torch.zeros(d_model))

    @torch.no_grad()
    def initialise_(self, sample: Float[Tensor, "n d_model"], encoder_scale: float = 1.0, mesh: Mesh = ALONE) -> None:
        """Fit pre_bias and the encoder's scale to a sample of normalised activations, the same on all of a mesh.

        pre_bias becomes the sample's geometric median. The encoder, parallel to the decoder, is scaled so that
        reconstructions are `encoder_scale` times as long as what they reconstruct:
        mean |recon - pre_bias| = encoder_scale mean |x - pre_bias|. As latents are proportional to the encoder
        while latent_bias is 0, one division does it.

        Source: Gao et al. 2024, appendix A.1.
        """
        median = geometric_median(sample)
        if not median.converged:
            say(f"warning: the geometric median did not converge (slope {median.slope:.1e}); going on with it.")
        self.pre_bias.copy_(mesh.broadcast_(median.point.to(self.pre_bias.dtype)))
        centred = sample[:4096] - self.pre_bias
        length = self._recon_length(centred, mesh).mean()
        if length > 0:
            self.W_enc.mul_(mesh.broadcast_(encoder_scale * centred.norm(dim=1).mean() / length))

    def _recon_length(self, centred: Float[Tensor, "n d_model"], mesh: Mesh) -> Float[Tensor, " n"]:
        """|recon - pre_bias| of each token, from the rows of all shards; one weight of a shard is held at a time."""
        whole, parts = mesh.latents(self.n_latents), centred.split(512)
        n_rows, primitives = whole.stop - whole.start, ops.implementation(centred)
        W_enc = mesh.gather_rows(self.W_enc.detach(), n_rows)
        latent_bias = mesh.gather_rows(self.latent_bias.detach(), n_rows)
        if self.activation == "relu":
            W_dec = mesh.gather_rows(self.W_dec.detach(), n_rows)
            return torch.cat([(relu_latents(part, W_enc, latent_bias) @ W_dec).norm(dim=1) for part in parts])
        width = min(self.k, -(-self.n_latents // mesh.n_shards))
        codes = [exchange.select(part, W_enc, latent_bias, self.k, width, mesh) for part in parts]
        del W_enc
        W_dec = mesh.gather_rows(self.W_dec.detach(), n_rows)
        recons = (mesh.ordered_sum(primitives.dense_sparse_matmul(*code, W_dec), "shards") for code in codes)
        return torch.cat([recon.norm(dim=1) for recon in recons])

    @staticmethod
    def normalise(raw: Float[Tensor, "... d_model"]) -> Normalised:
        """Per token: subtract the mean over d_model, scale to unit norm. A constant token becomes 0.

        Source: Gao et al. 2024, section 2.1.
        """
        return Normalised(*normalised(raw))

    @staticmethod
    def denormalise(
        recon: Float[Tensor, "... d_model"], mean: Float[Tensor, "... 1"], norm: Float[Tensor, "... 1"]
    ) -> Float[Tensor, "... d_model"]:
        """The inverse of `normalise`: recon norm + mean."""
        return recon * norm + mean

    def encode(self, x: Float[Tensor, "n d_model"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Values and indices of the active latents of normalised activations.

        For activation relu k is n_latents: all values, in order.
        """
        if self.activation == "relu":
            values = relu_latents(x - self.pre_bias, self.W_enc, self.latent_bias)
            return values, torch.arange(self.n_latents, device=x.device).expand(len(x), -1)
        return ops.encode_topk(x, self.W_enc, self.latent_bias, self.pre_bias, self.k)

    def decode(self, values: Float[Tensor, "n k"], indices: Int[Tensor, "n k"]) -> Float[Tensor, "n d_model"]:
        """The normalised reconstruction: the sum of the active latents' decoder rows, plus pre_bias."""
        if self.activation == "relu" and indices.shape[1] == self.n_latents and indices.stride(0) == 0:
            return values @ self.W_dec + self.pre_bias  # all latents in order, as `encode` gives them
        return ops.dense_sparse_matmul(values, indices, self.W_dec) + self.pre_bias

    def forward(self, raw: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction of raw activations, of the same shape, scale and dtype; computed in the weights' dtype."""
        if raw.shape[-1] != self.d_model:
            raise TopkapiError(f"activations must be (..., d_model={self.d_model}); got {tuple(raw.shape)}.")
        rows = raw.reshape(-1, self.d_model).to(self.W_enc.dtype)
        x, mean, norm = self.normalise(rows)
        # ReLU latents are dense: in parts, so that memory stays bounded
        parts = x.split(max(1, DENSE_ELEMENTS // self.n_latents)) if self.activation == "relu" else (x,)
        recon = torch.cat([self.decode(*self.encode(part)) for part in parts])
        return self.denormalise(recon, mean, norm).view(raw.shape).to(raw.dtype)

    def description(self) -> dict[str, Any]:
        """What config.json says of this autoencoder."""
        sizes = {name: getattr(self, name) for name in ("d_model", "n_latents", "k", "activation")}
        return {
            "autoencoder": sizes,
            "language_model": self.language_model,
            "site": self.site,
            "training": self.training_config,
            "summary": self.summary,
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in PARAMETERS}
        published.write_published(save_directory, tensors, self.description())
        write_text_atomic(
            save_directory / published.CARD, str(self.generate_model_card())
        )  # the mixin keeps an old one

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str | torch.device = "cpu", **hub_options: Any
    ) -> "Autoencoder":
        """The autoencoder published in a folder or, if there is no such folder, under a Hugging Face hub id.

        `hub_options` go to huggingface_hub.snapshot_download (revision, token, cache_dir, local_files_only ...).

        Raises:
            TopkapiError: nothing found, or a file is damaged.
        """
        folder = Path(name)
        if not folder.is_dir():
            wanted = [published.WEIGHTS, published.CONFIG]
            try:
                folder = Path(snapshot_download(str(name), allow_patterns=wanted, **hub_options))
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
                reason = str(error).splitlines()[0]
                raise TopkapiError(
                    f"{name} is neither a folder here nor an autoencoder on the hub ({reason})."
                ) from None
        tensors, config = published.read_published(folder)
        _require_fitting(folder, config, tensors)
        about = {key: config[key] for key in ("language_model", "site", "training", "summary") if key in config}
        ae = cls(**config["autoencoder"], **about)
        ae.load_state_dict(tensors)
        return ae.to(device)

    def generate_model_card(self, *_: Any, **__: Any) -> ModelCard:
        """The README.md that is published beside the weights."""
        return ModelCard(_model_card(self))


def _require_fitting(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise TopkapiError where an autoencoder that others wrote has weights that its config.json does not describe."""
    sizes = config["autoencoder"]
    n_latents, d_model = sizes["n_latents"], sizes["d_model"]
    wanted = {"W_enc": (n_latents, d_model), "W_dec": (n_latents, d_model)}
    wanted |= {"latent_bias": (n_latents,), "pre_bias": (d_model,)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise TopkapiError(f"{folder / published.WEIGHTS} has {found}; {published.CONFIG} beside it wants {wanted}.")
    if strange := sorted(sizes.keys() - {"n_latents", "d_model", "k", "activation"}):
        raise TopkapiError(
            f"{folder / published.CONFIG} says {', '.join(strange)}, unknown to this version of Topkapi."
        )
    if sizes.get("activation", "topk") not in ("topk", "relu"):
        raise TopkapiError(
            f"{folder / published.CONFIG}: activation must be topk or relu; got {sizes['activation']!r}."
        )


def relu_latents(
    centred: Float[Tensor, "n d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    latent_bias: Float[Tensor, " n_latents"],
) -> Float[Tensor, "n n_latents"]:
    """All latents of a ReLU autoencoder, ReLU(W_enc centred + latent_bias)."""
    return torch.addmm(latent_bias, centred, W_enc.T).relu()


class Working:
    """The weights of this shard in the form that a training step computes with; the optimiser keeps them up to date.

    Replicas own a part of the rows each, and send each other what has changed. That goes on beside other work:
    `finish` waits before the rows are read.
    """

    W_enc: Float[Tensor, "n_latents d_model"]
    W_dec: Float[Tensor, "n_latents d_model"]
    latent_bias: Float[Tensor, " n_latents"]
    screening: Literal["bf16", "fp8"]
    """Precision in which `ops.encode_topk` looks for candidates on a GPU."""
    own: slice
    """The rows of the latents that this process owns."""

    def __init__(
        self, ae: Autoencoder, precision: Literal["float32", "bf16", "fp8"] = "float32", mesh: Mesh = ALONE
    ) -> None:
        """bf16 copies of an autoencoder's weights; the weights themselves where they have that dtype already.

        On a mesh of replicas parameters that are not copied become a part of the tensors here.
        """
        self.mesh, self.screening = mesh, "fp8" if precision == "fp8" else "bf16"
        whole, part = mesh.latents(ae.n_latents), mesh.owned(ae.n_latents)
        n_rows = whole.stop - whole.start
        self.own = slice(part.start - whole.start, part.stop - whole.start)
        self._padded: dict[str, Tensor] = {}
        self._travelling: dict[str, Callable[[], Tensor]] = {}
        for name in OF_LATENTS:
            parameter = getattr(ae, name)
            rows = parameter.detach()
            if precision != "float32" and name != "latent_bias":
                rows = rows.to(torch.bfloat16)
            if mesh.n_replicas > 1:
                is_copy = rows.data_ptr() != parameter.data_ptr()
                padded = rows.new_zeros(mesh.n_replicas * mesh.largest_part(n_rows), *rows.shape[1:])
                padded[self.own] = rows
                self._padded[name], rows = padded, padded[:n_rows]
                if not is_copy:
                    parameter.data = rows[self.own]
            setattr(self, name, rows)
            self.send(name)

    def send(self, name: str) -> None:
        """The rows of a parameter that this process owns have changed: begin to give them to the other replicas."""
        self.finish(name)
        if self.mesh.n_replicas > 1:
            padded, part = self._padded[name], len(self._padded[name]) // self.mesh.n_replicas
            own = padded[self.mesh.replica * part : (self.mesh.replica + 1) * part]
            self._travelling[name] = self.mesh.start_gather(own, "replicas", padded)

    def finish(self, *names: str) -> None:
        """Wait until the other replicas' rows of these parameters are here."""
        for name in names:
            if name in self._travelling:
                self._travelling.pop(name)()

    @torch.no_grad()
    def read(self, ae: Autoencoder) -> None:
        """Take over all parameters of `ae`, which were written to after `finish`."""
        for name in OF_LATENTS:
            getattr(self, name)[self.own].copy_(getattr(ae, name))
            self.send(name)


def _directions(n_latents: int, d_model: int, seed: int, latents: slice) -> Float[Tensor, "rows d_model"]:
    """Random unit vectors: the rows `latents` of n_latents, without all the others.

    Each block of DRAWN_TOGETHER latents has a generator of its own, so that a shard makes the blocks it has a part of;
    the first block's is that of `seed`.
    """
    out = torch.empty(latents.stop - latents.start, d_model)
    for block in range(latents.start // DRAWN_TOGETHER, -(-latents.stop // DRAWN_TOGETHER)):
        first = block * DRAWN_TOGETHER
        generator = torch.Generator().manual_seed((seed + block * 0x9E3779B1) % 2**32)  # 32 bits are all it uses
        drawn = torch.randn(min(DRAWN_TOGETHER, n_latents - first), d_model, generator=generator)
        start, stop = max(latents.start, first), min(latents.stop, first + len(drawn))
        out[start - latents.start : stop - latents.start] = drawn[start - first : stop - first]
    return out.div_(out.norm(dim=1, keepdim=True))


def _model_card(ae: Autoencoder) -> str:
    figures = {name: value for name, value in ae.summary.items() if name != "last_batch"}
    figures |= {f"{name}, last training batch": value for name, value in ae.summary.get("last_batch", {}).items()}
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    kind = f"TopK (k={ae.k})" if ae.activation == "topk" else "ReLU"
    return f"""---
library_name: topkapi
tags: [sparse-autoencoder, interpretability]
---
# {kind} sparse autoencoder, {ae.n_latents:,} latents

Reads `{ae.site}` of `{ae.language_model}` (d_model {ae.d_model}). Each token's activation has its mean over d_model
subtracted and is scaled to unit norm before encoding; both are undone on the reconstruction.

```python
from topkapi import Autoencoder

ae = Autoencoder.from_pretrained("PATH_OR_HUB_ID")
recon = ae(activations)                                    # (..., {ae.d_model}), raw activations of the site
values, indices = ae.encode(ae.normalise(activations).x)   # the active latents of each token
```

| training | |
|---|---|
{rows}

Architecture and loss: Gao et al. 2024, [Scaling and evaluating sparse autoencoders](https://arxiv.org/abs/2406.04093).
"""
