"""The contexts in which a latent fires most strongly, for a handful of latents a person can read.

1. `strongest_contexts`: one pass over blocks of activations keeps, for every latent, how often it
   fires and its strongest firings, at most one a context.
2. `choose_latents`: picks latents by a rule that never looks at text.
3. `format_contexts`: prints them with the firing token marked.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text
from torch import Tensor

from topkapi.data.tokens import TokenFile
from topkapi.evaluate.reconstruction import CHUNK_ELEMENTS
from topkapi.model import Autoencoder

BEFORE, AFTER = 12, 6  # tokens shown on each side of the firing one
CUT = "\ufffd"  # what decoders put for a piece of a character


@runtime_checkable
class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    def decode(self, ids: list[int], **options: bool) -> str:
        """The text of the tokens."""

    def convert_ids_to_tokens(self, ids: int) -> str:
        """The name of one token."""


@dataclass
class Strongest:
    """How often each latent fires, and its strongest firings, at most one a context window."""

    context: int
    """Tokens of a context window; window = position // context."""

    n_tokens: int
    """Tokens seen."""

    n_fired: Int[Tensor, " n_latents"]
    """Tokens on which the latent has a value > 0."""

    values: Float[Tensor, "n_latents m"]
    """The m strongest values, falling; 0 where the latent fired in fewer than m windows."""

    positions: Int[Tensor, "n_latents m"]
    """Where, as an index into TokenFile.tokens; -1 beside a value 0."""

    @property
    def density(self) -> Float[Tensor, " n_latents"]:
        """Fraction of tokens on which each latent fires; NaN without tokens."""
        return self.n_fired.double() / self.n_tokens


@torch.no_grad()
def strongest_contexts(
    ae: Autoencoder, blocks: Iterable[tuple[Tensor, Tensor]], context: int, per_latent: int = 16
) -> Strongest:
    """Density and the `per_latent` strongest contexts of every latent, in one pass.

    `blocks` yields raw activations and their positions in the token file, as `topkapi.data` does. The result does
    not depend on how tokens are cut into blocks or ordered. Memory: n_latents x per_latent x 12 bytes and one chunk
    of encoder output; after the first chunks few firings beat a latent's weakest kept one, so the pass costs what
    encoding costs.
    """
    n, device = ae.n_latents, ae.W_dec.device
    found = Strongest(
        context=context,
        n_tokens=0,
        n_fired=torch.zeros(n, dtype=torch.int64, device=device),
        values=torch.zeros(n, per_latent, device=device),
        positions=torch.full((n, per_latent), -1, dtype=torch.int64, device=device),
    )
    dense = 8 if ae.activation == "relu" else 1  # all its firings are sorted, several int64 for each
    rows = max(1, CHUNK_ELEMENTS // (dense * n))
    for x, positions in blocks:
        for raw, where in zip(x.split(rows), positions.split(rows), strict=True):
            normal, _, _ = ae.normalise(raw.to(device, torch.float32))
            values, indices = ae.encode(normal)
            active = values > 0
            found.n_tokens += len(raw)
            found.n_fired += torch.bincount(indices[active], minlength=n)
            firing = where.to(device)[:, None].expand_as(indices)
            _keep_strongest(found, indices[active], values[active].float(), firing[active])
    return found


def _keep_strongest(
    found: Strongest,
    latents: Int[Tensor, " firings"],
    values: Float[Tensor, " firings"],
    positions: Int[Tensor, " firings"],
) -> None:
    """Put the firings that belong among their latent's strongest into `found`.

    A firing weaker than its latent's weakest kept one is dropped at once; that is safe within one
    window too, because a window's kept firing is at least as strong. The rest is sorted together
    with what is kept already.
    """
    better = values >= found.values[latents, -1]
    latents, values, positions = latents[better], values[better], positions[better]
    touched = latents.unique()
    m = found.values.shape[1]
    kept = found.positions[touched] >= 0
    latents = torch.cat([latents, touched[:, None].expand(-1, m)[kept]])
    values = torch.cat([values, found.values[touched][kept]])
    positions = torch.cat([positions, found.positions[touched][kept]])
    order = _order(latents, values, positions)
    latents, values, positions = latents[order], values[order], positions[order]

    # strongest of each (latent, window): sort by both, take the first of each run
    by_window = torch.argsort(positions // found.context, stable=True)
    by_window = by_window[torch.argsort(latents[by_window], stable=True)]
    pair = torch.stack([latents, positions // found.context])[:, by_window]
    first = torch.ones_like(by_window, dtype=torch.bool)
    first[1:] = (pair[:, 1:] != pair[:, :-1]).any(0)
    best = by_window[first].sort().values  # back in order of latent and falling value
    latents, values, positions = latents[best], values[best], positions[best]
    start = torch.searchsorted(latents, touched)
    rank = torch.arange(len(latents), device=latents.device) - start[torch.searchsorted(touched, latents)]
    fits = rank < m
    found.values[touched] = 0
    found.positions[touched] = -1
    found.values[latents[fits], rank[fits]] = values[fits]
    found.positions[latents[fits], rank[fits]] = positions[fits]


def _order(
    latents: Int[Tensor, " firings"],
    values: Float[Tensor, " firings"],
    positions: Int[Tensor, " firings"],
) -> Int[Tensor, " firings"]:
    """The permutation by latent, then falling value, then position (ties: the earliest)."""
    order = torch.argsort(positions, stable=True)
    order = order[torch.argsort(values[order], descending=True, stable=True)]
    return order[torch.argsort(latents[order], stable=True)]


class Choice(NamedTuple):
    """Latents to show, and the rule that chose them in a sentence for the person who sees them."""

    latents: list[int]
    rule: str


def choose_latents(found: Strongest, count: int = 8, density: tuple[float, float] = (1e-4, 1e-2)) -> Choice:
    """`count` latents to show, chosen by a rule that never looks at text.

    1. Only latents whose density lies in `density` (rarer ones have too few firings to show what they mean, more
       frequent ones tend to mean something about every text) and that fire in as many windows as `found` keeps.
    2. Ranked by the mean value of the strongest contexts that `found` keeps of each: one odd token decides less than
       with the strongest alone.
    3. Evenly spaced over the ranking, each in the middle of its share: neither the best nor the worst are picked.

    Measured on 4 096 latents of SmolLM2's layer 10 (k=32, 227 000 tokens): from the first to the last eighth of the
    ranking, the share of a latent's five strongest contexts with the same firing token falls from 0.89 to 0.54, so
    what is shown goes from clear to muddled as the dictionary does. Ranking by density separates nothing (0.70 to
    0.77 throughout).

    Where fewer than `count` latents pass the first test, all that fire are ranked, and the rule says so.
    """
    low, high = density
    windows = found.positions.shape[1]
    often = found.positions[:, -1] >= 0
    pool = ((found.density >= low) & (found.density <= high) & often).nonzero()[:, 0]
    wanted = f"fire on {low:.2%} to {high:.2%} of tokens, in {windows} contexts or more"
    if len(pool) < count:
        few, pool = len(pool), (found.n_fired > 0).nonzero()[:, 0]
        wanted = f"fire at all (only {few} {wanted})"
    ranked = pool[torch.argsort(found.values[pool].mean(1), descending=True, stable=True)].tolist()
    count = min(count, len(ranked))
    chosen = [ranked[(2 * i + 1) * len(ranked) // (2 * count)] for i in range(count)]
    rule = (
        f"{count} of the {len(ranked):,} latents that {wanted}, evenly spaced over their ranking by mean "
        f"activation in their {windows} strongest contexts; text plays no part in the choice."
    )
    return Choice(chosen, rule)


class Example(NamedTuple):
    """One firing with the text around it."""

    value: float
    before: str
    token: str
    after: str


def examples(
    found: Strongest, latent: int, token_file: TokenFile, tokenizer: Tokenizer, n_examples: int = 5
) -> list[Example]:
    """The latent's strongest firings in falling order, with the text around them.

    12 tokens before and 6 after, within the firing's own context window. A firing whose shown
    tokens are those of a stronger one (text that repeats) is left out.
    """
    out, seen = [], set()
    pairs = zip(found.values[latent].tolist(), found.positions[latent].tolist(), strict=True)
    for value, position in pairs:
        if position < 0 or len(out) == n_examples:
            break
        window = position // found.context * found.context
        start = max(window, position - BEFORE)
        end = min(window + found.context, position + AFTER + 1)
        ids = token_file.tokens[start:end].astype(np.int64).tolist()
        if (key := (position - start, *ids)) not in seen:
            seen.add(key)
            out.append(Example(value, *decode_around(tokenizer, ids, position - start)))
    return out


def decode_around(tokenizer: Tokenizer, ids: Sequence[int], at: int) -> tuple[str, str, str]:
    """The text of `ids` in three parts: before the token at `at`, that token, after it.

    A byte-level token may hold part of a character, and a word-piece decoder drops spaces at the
    start, so parts decoded alone would not join. Cuts are made in the text of all tokens, at the
    nearest token boundaries where the tokens so far decode to a beginning of it: the marked part
    grows to whole characters. Pieces of characters at the window's ends are dropped; line breaks
    become a visible sign, other control characters a dot.
    """

    def decode(part: Sequence[int]) -> str:
        return tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    text = decode(ids)

    def cut(candidates: Iterable[int], otherwise: int) -> int:
        for i in candidates:
            if text.startswith(begun := decode(ids[:i])):
                return len(begun)
        return otherwise

    start = cut(range(at, -1, -1), 0)
    end = cut(range(at + 1, len(ids) + 1), len(text))
    token = text[start:end] or tokenizer.convert_ids_to_tokens(ids[at])
    return visible(text[:start].lstrip(CUT)), visible(token), visible(text[end:].rstrip(CUT))


def visible(text: str) -> str:
    """Text that stays on one line and cannot steer the terminal."""
    text = text.replace("\r\n", "\n").replace("\n", "⏎").replace("\t", " ")
    return "".join("·" if unicodedata.category(c) == "Cc" else c for c in text)


class ContextsView:
    """What `format_contexts` returns; which marks it prints depends on the console."""

    def __init__(self, found: Strongest, examples: dict[int, list[Example]]) -> None:
        self.found, self.examples = found, examples

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        styled = console.color_system is not None  # None when piped and on terminals without styles
        for latent, shown in self.examples.items():
            yield Text(_heading(self.found, latent), style="bold")
            table = Table.grid(padding=(0, 1, 0, 1))
            table.add_column(justify="right", style="dim", no_wrap=True)
            table.add_column(overflow="fold")
            for value, before, token, after in shown:
                marked = (token, "bold reverse") if styled else f"[[{token}]]"
                table.add_row(f"{value:.3f}", Text.assemble(before, marked, after))
            yield table
            yield Text("")


def _heading(found: Strongest, latent: int) -> str:
    density, strongest = found.density[latent].item(), found.values[latent, 0].item()
    heading = f"latent {latent}   fires on {density:.3%} of tokens   strongest {strongest:.3f}"
    return heading if density else f"latent {latent}   never fires on these {found.n_tokens:,} tokens"


def format_contexts(
    found: Strongest,
    latents: Sequence[int],
    token_file: TokenFile,
    tokenizer: Tokenizer,
    per_latent: int = 5,
) -> ContextsView:
    """A rich renderable: each latent's number, density and strongest value, then its contexts.

    The firing token is shown reversed on a terminal and as [[token]] where output is piped. Text is
    shown as it is, never read as markup.
    """
    return ContextsView(found, {i: examples(found, i, token_file, tokenizer, per_latent) for i in latents})
