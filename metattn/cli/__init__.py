"""The command line: `python -m metattn demo | bench | doctor`, also installed as `metattn`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import metattn

# What the extras of pyproject.toml ask for, to be installed from any index, whether metattn is there or not.
EXTRAS = {"demo": ("matplotlib", "numpy", "rich", "scikit-learn"), "bench": ("matplotlib", "rich")}
COMMANDS = {
    "demo": "meta-learn sinusoids and handwritten digits with twice-differentiable attention",
    "bench": "measure the four maps and the second-order step against torch on this machine",
    "doctor": "say which backends work here, and why the others do not",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="metattn", description="Softmax attention that can be differentiated twice."
    )
    parser.add_argument("--version", action="version", version=f"metattn {metattn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    # only the wanted command is imported: doctor must speak even where another one cannot be loaded
    wanted = next((argument for argument in arguments if argument in COMMANDS), "doctor")
    module = importlib.import_module(f"metattn.cli.{wanted}")
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        if name == wanted:
            module.add_arguments(subparser)
    args = parser.parse_args(arguments)
    try:
        return int(module.run(args))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("metattn", "torch"):
            raise
        print(
            f"metattn {wanted} needs {error.name}: pip install {' '.join(EXTRAS.get(wanted, [error.name]))}",
            file=sys.stderr,
        )
        return 1
    except ValueError as error:
        print(f"metattn {wanted}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
