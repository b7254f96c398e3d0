"""The command `topkapi`: one function a subcommand, options generated from dataclasses.

1. `training`, `reading` and `machine`: the commands, each beside its options
2. `parsing`: options as tyro reads them, mistakes as one line
3. `main`, here: which command, and what is said when it fails
"""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import topkapi
from topkapi.cli.machine import bench_command, plan_command
from topkapi.cli.reading import (
    eval_command,
    export_command,
    figures_command,
    find_command,
    steer_command,
    study_command,
    view_command,
)
from topkapi.cli.training import demo_command, sweep_command, train_command
from topkapi.console import console, say
from topkapi.errors import Interrupted, TopkapiError
from topkapi.launch import launched, speaks

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": demo_command,
    "train": train_command,
    "sweep": sweep_command,
    "eval": eval_command,
    "study": study_command,
    "find": find_command,
    "steer": steer_command,
    "view": view_command,
    "export": export_command,
    "figures": figures_command,
    "bench": bench_command,
    "plan": plan_command,
}
TOGETHER = ("train", "study", "plan")  # run in several processes; plan for --measure
SPEAKING_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0, 2 for a mistake that one line explains, 128 + n after signal n.

    Of several processes that were launched together one speaks; one that ends badly leaves at once, as its threads
    may wait for another process for ever.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not launched():
        return _run(arguments)
    console.quiet = not speaks()
    try:
        status = _run(arguments)
    except Exception:
        status = 1
        if not console.quiet:
            traceback.print_exc()
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        if console.quiet:  # a launcher ends all when the first one ends, and rank 0 may not have spoken yet
            time.sleep(SPEAKING_SECONDS)
        os._exit(status)
    return status


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(topkapi.__version__)
        return 0
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise TopkapiError(f"no command {name!r}. Commands: {', '.join(COMMANDS)}.")
        if launched() and name not in TOGETHER:
            raise TopkapiError(
                f"topkapi {name} runs in one process: start it without torchrun, which is for {', '.join(TOGETHER)}."
            )
        COMMANDS[name](rest)
    except TopkapiError as error:
        say(f"topkapi: {_where(error)}{error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not (memory := _exhausted(error)):
            raise
        advice = "Lower --model.n-latents or --batch-tokens, or see docs/performance.md for what takes less."
        advice = advice if name in ("demo", "train", "sweep") else "Ask for less at a time, or use a machine with more."
        say(f"topkapi: {_where(error)}out of {memory}. {advice}")
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stderr.close()
        return 128 + signal.SIGPIPE
    except OSError as error:
        say(f"topkapi: {_where(error)}{_explain(error)}")
        return 2
    except Interrupted as request:
        say(f"topkapi: {request}")
        return 128 + request.signal_number
    except KeyboardInterrupt:
        say("topkapi: stopped.")
        return 130
    return 0


def _where(error: BaseException) -> str:
    """The process that failed, where several were launched and it is one's own fault."""
    return "".join(f"{note}: " for note in getattr(error, "__notes__", ()))


def _exhausted(error: MemoryError | RuntimeError) -> str:
    """Which memory did not suffice; "" where something else is wrong."""
    from torch import OutOfMemoryError

    if isinstance(error, OutOfMemoryError):
        return "GPU memory"
    of_cpu = ("DefaultCPUAllocator", "Storage size calculation overflowed")  # torch's own, which are RuntimeErrors
    return "memory" if isinstance(error, MemoryError) or any(words in str(error) for words in of_cpu) else ""


def _explain(error: OSError) -> str:
    """One line for what the operating system refused."""
    where = f" {error.filename}" if error.filename else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "Free some space or choose another folder" if full else "Choose another folder, or mend this one"
    return f"the system refused{where}: {error.strerror or error}. {advice}; what was saved before is untouched."


def _help() -> str:
    lines = [f"topkapi {topkapi.__version__}: {topkapi.__doc__.splitlines()[0]}", ""]
    for function in COMMANDS.values():
        lines.append(f"  {function.__doc__.rstrip('.')}")
    return "\n".join([*lines, "", "Options of each: topkapi COMMAND --help, topkapi train RECIPE --help."])
