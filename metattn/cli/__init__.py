"""The command line: `python -m metattn demo | bench | doctor`, also installed as `metattn`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "demo": "meta-learn sinusoids and handwritten digits with twice-differentiable attention",
    "bench": "measure the four maps and the second-order step against torch on this machine",
    "doctor": "say which backends work here, and why the others do not",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="metattn", description="Softmax attention that can be differentiated twice."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    modules = {}
    for name, summary in COMMANDS.items():
        modules[name] = importlib.import_module(f"metattn.cli.{name}")
        modules[name].add_arguments(
            commands.add_parser(name, help=summary, description=modules[name].__doc__)
        )
    args = parser.parse_args(arguments)
    try:
        return int(modules[args.command].run(args))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("metattn", "torch"):
            raise
        print(
            f"metattn {args.command} needs {error.name}: pip install 'metattn[{args.command}]'",
            file=sys.stderr,
        )
        return 1
    except ValueError as error:
        print(f"metattn {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
