"""The command line: `dcnv4 ...` and `python -m dcnv4 ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__

COMMANDS = {
    "info": "what runs here: versions, devices, backends and why others do not run",
    "demo": "train a network on the CPU to undo a fisheye lens, and draw where its layers look",
    "bench": "check and time both operators on this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0: done, 2: wrong usage or a missing package, 130: interrupted."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(words)
    args = parser.parse_args(words)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        status: int = import_module(f"{__package__}.cli.{args.command}").run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        status = 130
    return status


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcnv4", description="Deformable Convolution v4 for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"dcnv4 {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        if name in words:  # only what is asked for is imported
            import_module(f"{__package__}.cli.{name}").add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
