"""What may be asked of the language model: checked here, done by `topkapi.viewer.worker`, answered line by line.

Answers are application/x-ndjson: lines with `progress`, and a last one with `result` or `error`. What is wrong with a
request is said before the first line, with a status of its own.
"""

from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from topkapi.explore import Edit
from topkapi.explore.edits import LARGEST_VALUE
from topkapi.viewer import asking
from topkapi.viewer.answers import Answer, slow, to_json
from topkapi.viewer.asking import Object, Refused
from topkapi.viewer.opened import Opened
from topkapi.viewer.patterns import Pattern
from topkapi.viewer.study_api import latent_of
from topkapi.viewer.worker import Busy, Work

PROMPT_TOKENS, SAMPLES, NEW_TOKENS, EDITS = 512, 32, 128, 16
LIMITS = {"prompt_tokens": PROMPT_TOKENS, "samples": SAMPLES, "new_tokens": NEW_TOKENS, "edits": EDITS}
CHOICES, ROWS, VERIFIED, STEPS = 16, 200, 50, 64  # of an attribution
PATTERN_CHARACTERS = 200
TEMPERATURES = (0.01, 10.0)


class ModelApi:
    """Answers from an opened run's language model."""

    def __init__(self, opened: Opened) -> None:
        self.opened, self.study = opened, opened.study
        self._tokenised = slow(self._tokens_of)
        self._checked = slow(lambda work_of, values: work_of(values))

    def routes(self) -> list[Route]:
        """The addresses below /api."""
        return [
            Route("/latent/{i}/votes", slow(self.votes)),
            Route("/tokenise", self.tokenise, methods=["POST"]),
            *(Route(f"/{work.__name__}", self._streaming(work), methods=["POST"]) for work in self._works()),
        ]

    def _works(self) -> list[Any]:
        return [self.prompt, self.attribution, self.ablation, self.steer]

    def votes(self, request: Request) -> Response:
        """The tokens that a latent's decoder row votes for and against."""
        i = latent_of(request, self.study.n_latents)
        return self._without_model() or Answer(self.opened.votes(i))

    async def tokenise(self, request: Request) -> Response:
        """The tokens of a part of a text, without any that the tokenizer would put before it. Needs no model."""
        values = await asking.body(request)
        asking.only(values, "text")
        text = asking.text(values, "text", asking.BODY_BYTES)
        return await self._tokenised(text)

    def _tokens_of(self, text: str) -> Response:
        texts = self.opened.texts
        ids = texts.ids_inside(text)
        if len(ids) > PROMPT_TOKENS:
            raise Refused(f"the text has {len(ids):,} tokens; at most {PROMPT_TOKENS} are shown.")
        pairs = zip(ids, texts.each(ids), strict=True)
        return Answer({"tokens": [{"id": i, "text": shown} for i, shown in pairs]})

    def prompt(self, values: Object) -> Work:
        """{text}: what is active at each of its tokens."""
        asking.only(values, "text")
        return self.opened.experiments.prompt(self._prompt(values))

    def attribution(self, values: Object) -> Work:
        """{text, positive, negative, top, verify, steps}: what preferred some next tokens over others."""
        asking.only(values, "text", "positive", "negative", "top", "verify", "steps")
        positive, negative = (self._tokens(values, name) for name in ("positive", "negative"))
        if both := set(positive) & set(negative):
            shown = ", ".join(repr(self.opened.texts.alone(i)) for i in sorted(both))
            raise Refused(f"positive and negative both have {shown}: leave it out of one.")
        return self.opened.experiments.attribution(
            self._prompt(values),
            positive,
            negative,
            asking.integer(values, "top", 1, ROWS, 20),
            asking.integer(values, "verify", 0, VERIFIED, 10),
            asking.integer(values, "steps", 0, STEPS, 0),
        )

    def ablation(self, values: Object) -> Work:
        """{latent, row}: what setting the latent to 0 at that token of the study changes."""
        asking.only(values, "latent", "row")
        latent = asking.integer(values, "latent", 0, self.study.n_latents - 1)
        return self.opened.experiments.ablation(latent, asking.integer(values, "row", 0, self.study.n_tokens - 1))

    def steer(self, values: Object) -> Work:
        """{text, edits, n_samples, n_tokens, temperature, seed, pattern}: texts with and without edits."""
        names = ("text", "edits", "n_samples", "n_tokens", "temperature", "seed", "pattern")
        asking.only(values, *names)
        n_tokens = asking.integer(values, "n_tokens", 1, NEW_TOKENS, 30)
        ids = self._prompt(values, n_tokens)
        edits = [self._edit(value, len(ids) + n_tokens) for value in asking.items(values, "edits", EDITS)]
        if not edits:
            raise Refused("edits must have one edit at least.")
        pattern = asking.text(values, "pattern", PATTERN_CHARACTERS, "")
        return self.opened.experiments.steer(
            ids,
            edits,
            asking.integer(values, "n_samples", 1, SAMPLES, 4),
            n_tokens,
            asking.number(values, "temperature", *TEMPERATURES, 1.0),
            asking.integer(values, "seed", 0, 2**32 - 1, 0),
            Pattern(pattern) if pattern else None,
        )

    def _prompt(self, values: Object, n_new: int = 0) -> list[int]:
        """The tokens of `text`, behind which `n_new` more fit."""
        ids = self.opened.texts.ids(asking.text(values, "text", asking.BODY_BYTES))
        if not ids:
            raise Refused("text is empty.")
        most = min(PROMPT_TOKENS, (self.opened.worker.spliced.lm.max_context or PROMPT_TOKENS + n_new) - n_new)
        if len(ids) > most:
            more = f" before {n_new} new ones" if n_new else ""
            raise Refused(f"text has {len(ids):,} tokens; at most {max(0, most)} fit{more}.")
        return ids

    def _tokens(self, values: Object, name: str) -> list[int]:
        """Texts that are one token each."""
        texts, found = self.opened.texts, []
        for text in asking.items(values, name, CHOICES):
            ids = texts.ids_inside(asking.text({name: text}, name, asking.BODY_BYTES))
            if len(ids) != 1:
                raise Refused(f"{name}: {text[:60]!r} must be one token; it has {len(ids)}: {texts.each(ids[:20])}.")
            found += ids
        if not found:
            raise Refused(f"{name} must have one token at least.")
        return found

    def _edit(self, value: Any, n_positions: int) -> Edit:
        """One edit: a latent clamped to an absolute value, or to a multiple of its maximum in the study."""
        if not isinstance(value, dict):
            raise Refused("each edit must be an object with latent, value, unit and where.")
        asking.only(value, "latent", "value", "unit", "where")
        latent = asking.integer(value, "latent", 0, self.study.n_latents - 1)
        amount = asking.number(value, "value", -LARGEST_VALUE, LARGEST_VALUE)
        unit, where = value.get("unit", "absolute"), value.get("where", "all")
        if unit not in ("absolute", "maximum"):
            raise Refused("unit must be absolute or maximum.")
        if unit == "maximum":
            maximum = self.study.latent(latent).maximum
            if maximum is None:
                raise Refused(f"latent {latent} never fired in the study: it has no maximum. Give an absolute value.")
            amount *= maximum
        if isinstance(where, list):
            places = asking.items(value, "where", n_positions)
            where = tuple(asking.integer({"where": at}, "where", 0, n_positions - 1) for at in places)
        if where not in ("all", "active") and not (isinstance(where, tuple) and where):
            raise Refused("where must be all, active, or a list of positions.")
        return Edit(latent, "clamp", amount, where=where)

    def _streaming(self, work_of: Any) -> Any:
        async def endpoint(request: Request) -> Response:
            if refusal := self._without_model():
                return refusal
            values = await asking.body(request)
            work = await self._checked(work_of, values)
            lines = self.opened.worker.lines(work)
            try:
                first = await anext(lines)
            except Busy:
                return Answer({"error": "too many requests wait for the language model; try again."}, 503)
            return StreamingResponse(_encoded(first, lines), media_type="application/x-ndjson", headers=STREAM_HEADERS)

        return endpoint

    def _without_model(self) -> Response | None:
        """The refusal where the language model is not there (yet)."""
        facts = self.opened.worker.facts()
        sentences = {
            "off": "the language model is off: start topkapi view without --no-model.",
            "loading": "the language model is being loaded; try again in a moment.",
            "failed": f"the language model cannot be used: {facts['why']}",
        }
        sentence = sentences.get(facts["state"])
        return Answer({"error": sentence, "model": facts}, 503) if sentence else None


STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # lines are for now, not for a proxy to keep


async def _encoded(first: dict[str, Any], lines: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    yield to_json(first) + b"\n"
    async for line in lines:
        yield to_json(line) + b"\n"
