"""The command line. A sub-command is a module with `SUMMARY`, `add_arguments` and `run`, listed in `COMMANDS`.

`run` returns the exit status. It raises `argparse.ArgumentError` for a mistake of the user's, which then reads as one
sentence, with exit status 2. Modules import what is heavy or optional in `run`, not at the top.
"""

import argparse
import io
import os
import sys
from pathlib import Path
from typing import NoReturn

from jaxact._cli import bench, converge, head, verify

COMMANDS = {"bench": bench, "converge": converge, "head": head, "verify": verify}


class _Parser(argparse.ArgumentParser):
    """Errors are one sentence on one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split()).removesuffix('.')}.\n")


def main(argv: list[str] | None = None) -> NoReturn:
    """Runs the command in `argv`, by default the command line's, and exits with its status."""
    if sys.stdout is None:  # it was closed
        sys.stdout = io.StringIO()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a user's labels may not exist in the terminal's encoding
    parser = _Parser(
        prog="python -m jaxact" if Path(sys.argv[0]).name == "__main__.py" else "jaxact",
        description="Sigmoid and softmax for JAX: experiments to run for yourself.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        module.add_arguments(
            commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY, allow_abbrev=False)
        )
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        sys.exit(2)
    command = commands.choices[arguments.command]
    try:
        sys.exit(COMMANDS[arguments.command].run(arguments))
    except argparse.ArgumentError as error:
        command.error(str(error))
    except BrokenPipeError:  # who reads it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so, as it ends
        sys.exit(1)
    except OSError as error:  # what is printed may have nowhere to go
        command.error(error.strerror or str(error))
    except KeyboardInterrupt:
        command.exit(130, f"{command.prog}: interrupted.\n")
