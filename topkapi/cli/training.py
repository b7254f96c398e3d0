"""topkapi train, sweep and demo: what makes autoencoders."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from topkapi.cli.parsing import parse, variant
from topkapi.config import TrainConfig
from topkapi.console import say
from topkapi.errors import TopkapiError, command_line
from topkapi.recipes import RECIPES
from topkapi.sweep.grid import Grid, require_undecided

Flat = Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(kw_only=True)
class Train:
    """Train an autoencoder, or several side by side on one stream of activations."""

    config: Flat

    run: Path
    """Folder that receives config.json, metrics.jsonl, checkpoints and the finished autoencoder."""

    resume: bool = False
    """Go on from the newest checkpoint in the run folder."""

    variants: tuple[str, ...] = ()
    """Train one autoencoder for each, in RUN/VARIANT: fields joined by commas, as in
    model.k=16 model.k=64,model.seed=1. They share the activations and differ in model, loss, auxk and optim."""


@dataclass(kw_only=True)
class Sweep:
    """Train and evaluate an autoencoder for each point of a grid, on one stream of activations. The same command again
    goes on where it was stopped, and one with more values adds to what is there."""

    grid: Annotated[Grid, tyro.conf.arg(name="")]

    config: Flat

    out: Path
    """Folder that receives sweep.jsonl, a line a point, sweep.json, and a run folder for each point."""

    together: int | Literal["auto"] = "auto"
    """Autoencoders trained at a time; auto: as many as have weights and state in half of the device's memory."""


@dataclass(kw_only=True)
class Demo:
    """Train on a real language model from installed packages, evaluate, and show what latents fire on."""

    config: Flat = field(default_factory=RECIPES["demo"])

    run: Path = Path("runs/demo")
    """Folder of the run; a finished or interrupted demo there is continued."""


def train_command(arguments: Sequence[str]) -> None:
    """topkapi train RECIPE_OR_RUN [--field value ...]: train an autoencoder, or several side by side."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_train_help())
        return
    name, *options = arguments
    command = parse(Train, f"topkapi train {name}", options, _start(name))
    from topkapi.train import train

    configs, runs = [command.config], [command.run]
    if command.variants:
        configs = [variant(command.config, text) for text in command.variants]
        runs = [command.run / text for text in command.variants]
    train(configs, runs, resume=command.resume)
    say(f"finished: {', '.join(map(str, runs))}. Evaluate: {command_line('eval', runs[0])}")


def _start(name: str) -> Train:
    """What the options of `topkapi train` change: a recipe, or the config of a run. Raises TopkapiError for others."""
    if name in RECIPES:
        return Train(config=RECIPES[name](), run=Path("runs") / name)
    from topkapi.published import CONFIG
    from topkapi.train import saved_config

    if name and (Path(name) / CONFIG).exists():
        return Train(config=saved_config(Path(name)), run=Path(name))
    raise TopkapiError(f"no recipe or run {name!r}. Recipes: {', '.join(RECIPES)}; a run is a folder with {CONFIG}.")


def sweep_command(arguments: Sequence[str]) -> None:
    """topkapi sweep RECIPE --out FOLDER --n-latents N ... --k K ...: train and evaluate a grid, into FOLDER."""
    name, *options = arguments or ["--help"]
    if name in ("-h", "--help"):
        name, options = "demo", ["--help"]
    if name not in RECIPES:
        raise TopkapiError(f"no recipe {name!r}. Recipes: {', '.join(RECIPES)}.")
    recipe = RECIPES[name]()
    recipe = replace(recipe, eval=replace(recipe.eval, downstream_tokens=0))  # several times the work: when asked for
    default = Sweep(config=recipe, grid=Grid.of(recipe), out=Path("runs") / f"sweep-{name}")
    command = parse(Sweep, f"topkapi sweep {name}", options, default)
    require_undecided(command.config, recipe)
    from topkapi.sweep.running import print_table, sweep

    print_table(sweep(command.config, command.grid, command.out, command.together))


def demo_command(arguments: Sequence[str]) -> None:
    """topkapi demo [--field value ...]: train, evaluate and show a small one on a real language model."""
    command = parse(Demo, "topkapi demo", arguments)
    from topkapi.demo import demo

    demo(command.config, command.run)


def _train_help() -> str:
    rows = [f"  {name:12} {recipe.__doc__}" for name, recipe in RECIPES.items()]
    return "\n".join(["topkapi train RECIPE_OR_RUN [--field value ...]", "", "Recipes:", *rows])
