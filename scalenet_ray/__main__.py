"""The command line: `scalenet-ray COMMAND`, or `python -m scalenet_ray COMMAND`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from scalenet_ray import __version__

_PROGRAM = "scalenet-ray"


class Command(NamedTuple):
    """A command, imported when it is called.

    Attributes:
        module: its module in `scalenet_ray.commands`, with a function `main(job) -> int`.
        job: name of the dataclass of its flags, in that module.
        summary: a line for the help.
        extra: the extra of scalenet-ray that installs all it needs; None if the core is enough.
    """

    module: str
    job: str
    summary: str
    extra: str | None = None


COMMANDS = {
    "show": Command("show", "Show", "run the recursion on one image, print and draw its steps"),
    "detect": Command("detect", "DetectImages", "detect objects in images without ground truth"),
    "eval": Command("evaluate", "EvalCoco", "evaluate policies on an annotated data set"),
    "check": Command("check", "CheckInputs", "try data, networks and policies without a run"),
    "policy": Command("policy", "PrintPolicy", "print a policy as YAML, check a policy file, list the names"),
    "tune": Command("tune", "TuneRecursion", "tune the recursion on one split, report on another", "train"),
    "train": Command("train", "TrainScaleNet", "train a Scale Net or a scale head", "train"),
    "finetune": Command("finetune", "FinetuneDetector", "fine-tune a detector on upsampled windows", "train"),
    "export": Command("export", "Export", "convert detections of a run to another tool's format"),
    "export-onnx": Command("export_onnx", "ExportOnnx", "export a network to ONNX, to run it without torch", "torch"),
}
"""Command -> its module and flags. Importing this module imports none of them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its status.

    Args:
        arguments: the command and its flags; those of this process by default.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(_help(), end="")  # noqa: T201 - the standard output may be closed
        sys.exit(0)
    if name == "--version":
        print(f"{_PROGRAM} {__version__}")  # noqa: T201
        sys.exit(0)
    if name not in COMMANDS:
        sys.stderr.write(f"error: the command must be one of {', '.join(COMMANDS)}, got {name!r}: see --help\n")
        sys.exit(2)
    from scalenet_ray.commands.arguments import parse_arguments
    from scalenet_ray.console import complain, run_job
    from scalenet_ray.core.errors import UserError, needs_extra

    command = COMMANDS[name]
    try:
        with needs_extra(command.extra):
            module = importlib.import_module(f"scalenet_ray.commands.{command.module}")
    except UserError as error:
        sys.exit(complain(f"error: {error}", 2))
    run_job(module.main, parse_arguments(getattr(module, command.job), rest, program=f"{_PROGRAM} {name}"))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        f"usage: {_PROGRAM} COMMAND [FLAGS]",
        "",
        "Recursive detection of small objects with a Scale Net, on Ray.",
        "",
        "commands:",
        *(f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items()),
        "",
        f"{_PROGRAM} COMMAND --help lists the flags of a command, {_PROGRAM} --version prints the version.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
