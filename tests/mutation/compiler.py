"""A C++ compiler that compiles the same text once, for all trees and processes.

`CXX="python compiler.py g++"` makes the tests use it: a mutant of one kernel then costs the
compilation of that kernel alone. What it was asked is written down, so that a mutant can be
compiled as the tests would without running them. Imports nothing of this project.

Environment:
    MUTATION_TREE: the tree that is compiled; its place does not count.
    MUTATION_CACHE: the folder of what was compiled.
    MUTATION_LOG: the file that gets a line of JSON for each library.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path


class CompileError(Exception):
    """With what the compiler said."""


def preprocess(command: Sequence[str], tree: Path) -> tuple[str, list[str]]:
    """What the compiler sees after the preprocessor, and the files of the tree that it comes from.

    Args:
        command: that of a library, whose last argument is its source, without `-o`.
        tree: whose files are named relative to it.

    Raises:
        CompileError: it has errors already.
    """
    with tempfile.TemporaryDirectory() as folder:
        depends = Path(folder, "depends")
        done = _run([*command, "-E", "-P", "-MMD", "-MF", str(depends), "-MT", "x"])
        names = depends.read_text(encoding="utf-8").replace("\\\n", " ").split()[1:]
    root = f"{tree}{os.sep}"
    used = sorted({str(Path(name).resolve()) for name in names})
    return done.replace(root, ""), [name.removeprefix(root) for name in used if root in name]


def build(command: Sequence[str], text: str, cache: Path) -> Path:
    """The library that `command` makes of `text`.

    Raises:
        CompileError: it has errors.
    """
    flags = [argument for argument in command[1:] if "/" not in argument]
    built = cache / f"{sha256(repr((flags, text)).encode()).hexdigest()[:32]}.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            new = Path(folder, "library")
            _run([*command, "-o", str(new)])
            new.replace(built)
    return built


def check(command: Sequence[str]) -> None:
    """Compile up to where code would be made.

    Raises:
        CompileError: it has errors.
    """
    _run([*command, "-fsyntax-only"])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(done.stderr)
    return done.stdout


def main(arguments: list[str]) -> int:
    if "-shared" not in arguments:
        return subprocess.run(arguments).returncode
    tree, cache = Path(os.environ["MUTATION_TREE"]), Path(os.environ["MUTATION_CACHE"])
    place = arguments.index("-o")
    command, target = arguments[:place] + arguments[place + 2 :], arguments[place + 1]
    source = Path(command[-1])
    folders = [Path(argument[2:]) for argument in command if argument.startswith("-I")]
    entry = {
        "command": [argument.replace(str(tree), "{tree}") for argument in command],
        "source": None if source.is_relative_to(tree) else source.read_text(encoding="utf-8"),
        # What was written for this compilation alone, and will be gone.
        "headers": {
            str(header): header.read_text(encoding="utf-8")
            for folder in folders
            if not folder.is_relative_to(tree)
            for header in folder.glob("*.h")
        },
    }
    try:
        text, entry["files"] = preprocess(command, tree)
        shutil.copy(build(command, text, cache), target)
    except CompileError as error:
        print(error, file=sys.stderr)
        entry["error"] = str(error)
    with open(os.environ["MUTATION_LOG"], "a", encoding="utf-8") as log:
        log.write(json.dumps(entry) + "\n")
    return int("error" in entry)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
