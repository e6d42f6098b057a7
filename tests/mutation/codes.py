"""Whether a mutant compiles, and whether it is another program at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from . import compiler

TRIED = 6
"""Libraries that have a part of the change, before it counts as one that changes nothing."""


def compiles(file: str, entry: Mapping[str, Any], trees: tuple[Path, Path], folder: Path) -> bool:
    """Whether a library that has a file compiles with a change of it.

    Args:
        file: that is changed.
        entry: the library, as `compiler` wrote it down, without the change.
        trees: without the change, and with it.
        folder: where sources may be written.
    """
    original, changed = ((tree / file).read_text(encoding="utf-8") for tree in trees)
    source = entry["source"]
    source = None if source is None else source.replace(original, changed)
    try:
        compiler.check(_command(entry, source, trees[1], folder))
    except compiler.CompileError:
        return False
    return True


def differ(
    file: str, compiled: Iterable[Mapping[str, Any]], trees: tuple[Path, Path], cache: Path
) -> Iterator[bool]:
    """Of libraries that have a part of a change, whether their optimised object code differs.

    Args:
        file: that is changed.
        compiled: what the tests compiled with the change, as `compiler` wrote it down.
        trees: without the change, and with it.
        cache: of what was compiled.
    """
    original, changed = ((tree / file).read_text(encoding="utf-8") for tree in trees)
    seen: set[str] = set()

    def each() -> Iterator[bool]:
        for entry in compiled:
            source = entry["source"]
            if file not in entry.get("files", ()) and changed not in (source or ""):
                continue
            sources = None if source is None else source.replace(changed, original), source
            texts = [
                _preprocess(entry, written, tree, trees[1].parent / name)
                for written, tree, name in zip(sources, trees, ("original", "changed"), strict=True)
            ]
            if texts[0][1] == texts[1][1] or texts[0][1] in seen:
                continue
            seen.add(texts[0][1])
            built = [compiler.build(*text, cache).read_bytes() for text in texts]
            yield built[0] != built[1]

    return islice(each(), TRIED)


def _preprocess(
    entry: Mapping[str, Any], source: str | None, tree: Path, folder: Path
) -> tuple[list[str], str]:
    """The command of a library, optimised, in a tree, and what it then compiles."""
    command = _command(entry, source, tree, folder)
    command = ["-O2" if part == "-O0" else part for part in command]
    return command, compiler.preprocess(command, tree)[0]


def _command(entry: Mapping[str, Any], source: str | None, tree: Path, folder: Path) -> list[str]:
    """The command of a library in a tree.

    Args:
        source: what a test wrote to be compiled; None for a file of the tree.
        folder: where it may be written.
    """
    command = [part.replace("{tree}", str(tree)) for part in entry["command"]]
    folder.mkdir(exist_ok=True)
    for header, text in entry["headers"].items():
        (folder / Path(header).name).write_text(text, encoding="utf-8")
        command = [part.replace(f"-I{Path(header).parent}", f"-I{folder}") for part in command]
    if source is not None:
        command[-1] = str(folder / Path(command[-1]).name)
        Path(command[-1]).write_text(source, encoding="utf-8")
    return command
