"""Options from dataclasses, by tyro; a mistake in them is a line instead of a box."""

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro

from topkapi.config import TrainConfig
from topkapi.errors import TopkapiError


def parse(
    cls: type, program: str, arguments: Sequence[str], default: Any = tyro.MISSING_NONPROP, more: tuple = ()
) -> Any:
    """The dataclass that the options describe; a mistake in them is a TopkapiError of one line, not tyro's box."""
    _require_paths(cls, arguments)
    markers = (tyro.conf.AvoidSubcommands, *more)
    boxed = io.StringIO()
    try:
        with redirect_stderr(boxed):
            return tyro.cli(cls, prog=program, args=list(arguments), default=default, config=markers)
    except SystemExit as end:
        if not end.code:
            raise
        raise TopkapiError(f"{_unboxed(boxed.getvalue())} See {program} --help.") from None


def _require_paths(cls: type, arguments: Sequence[str]) -> None:
    """Raise TopkapiError where the path of an option is "", as of a shell's variable that is not set: Path takes it for
    the current folder."""
    given = [*pairwise(arguments), *(word.partition("=")[::2] for word in arguments if "=" in word)]
    for name in (f"--{field.name}" for field in fields(cls) if field.type is Path):
        if (name, "") in given:
            raise TopkapiError(f"{name} is empty: give a folder, or . for the current one.")


def _unboxed(box: str) -> str:
    """The sentence inside one of tyro's error boxes, which have a title above and a pointer to the help below it."""
    lines = [re.sub("[│╭╰╮╯─]", "", line).strip() for line in box.splitlines()]
    title, *body = [line for line in lines if line.strip("-")] or ["Bad options"]
    end = next((i for i, line in enumerate(body) if line.startswith("For full helptext")), len(body))
    return f"{' '.join(body[:end]) or title}".rstrip(".") + "."


def require_run_first(command: str, run: str) -> None:
    """Raise TopkapiError where an option, or nothing, stands in the place of RUN."""
    if not run or run.startswith("-"):
        raise TopkapiError(f"topkapi {command} needs a run first, as in topkapi {command} runs/demo ...; got {run!r}.")


def run_and_options(command: str, arguments: Sequence[str], options: type, folder: str = "") -> tuple[Path, Any]:
    """RUN, which comes first, and the options after it; the option of a `folder`, if not given, is RUN/study."""
    if not arguments or {"-h", "--help"} & set(arguments):
        parse(options, f"topkapi {command} RUN", ["--help"])
    run, *rest = arguments
    require_run_first(command, run)
    if folder and not any(word.split("=")[0] == f"--{folder}" for word in rest):
        rest += [f"--{folder}", str(Path(run) / "study")]
    return Path(run), parse(options, f"topkapi {command} {run}", rest)


def variant(config: Any, text: str, command: str = "train RECIPE") -> Any:
    """`config` with the fields of a text such as model.k=16,model.seed=1."""
    parts = [part.partition("=") for part in text.split(",")]
    if "/" in text or not all(name and equals for name, equals, _ in parts):
        example = "model.k=16,model.seed=1" if isinstance(config, TrainConfig) else "precision=fp8,dead=0.05"
        raise TopkapiError(f"--variants {text!r}: write FIELD=VALUE, joined by commas, as in {example}.")
    options = [option for name, _, value in parts for option in (f"--{name}", value)]
    try:
        return parse(type(config), f"topkapi {command}", options, config, (tyro.conf.FlagConversionOff,))
    except TopkapiError as error:
        raise TopkapiError(f"--variants {text!r}: {error}") from None
