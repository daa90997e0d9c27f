"""The command ``mechdiffusers``, with a subcommand for each thing that it does.

mechdiffusers --help
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["main"]

#: The module of each subcommand, which has ``add_arguments(parser)`` and ``run(arguments)``, and what it is for.
_COMMANDS = {
    "import": ("mechdiffusers.microstructures.import_responses", "make a dataset of your designs and responses"),
    "design": ("mechdiffusers.evaluation.inverse_design.command", "generate designs for targets and verify them"),
    "verify": (
        "mechdiffusers.evaluation.inverse_design.verify_command",
        "report on designs by another solver's results",
    ),
}


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    given = sys.argv[1:] if args is None else list(args)
    parser = argparse.ArgumentParser(
        prog="mechdiffusers", description="Latent diffusion models of microstructures with wanted responses."
    )
    parser.set_defaults(run=None)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        command = subparsers.add_parser(name, help=summary)
        if given[:1] == [name]:  # importing a module takes seconds, so only the one that is asked for is imported
            chosen = import_module(module)
            command.description, command.formatter_class = chosen.__doc__, argparse.RawDescriptionHelpFormatter
            chosen.add_arguments(command)
            command.set_defaults(run=chosen.run)
    arguments = parser.parse_args(given)
    if arguments.run is None:
        parser.print_help(sys.stderr)
        parser.exit(2)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.captureWarnings(True)
    try:
        arguments.run(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
