"""What the tools of the analyses share: exit codes, and files of results as lines of JSON."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, one_line

Line = dict[str, Any]


def exit_code(tool: Callable[..., Any]) -> Callable[..., int]:
    """Have a tool return its exit code: what is wrong with its input becomes one line and a 2."""

    @functools.wraps(tool)
    def call(*args: Any) -> int:
        try:
            return int(tool(*args) or 0)
        except (ValueError, TypeError, OSError, UsageError) as error:
            print(f'error: {one_line(error)}', file=sys.stderr)
            return 2

    return call


def read_lines(path: Path, key: Callable[[Line], str] = json.dumps) -> list[Line]:
    """Lines of a file; of those with the same key the last."""
    lines = map(json.loads, path.read_text(encoding='utf-8').splitlines())
    return list({key(line): line for line in lines}.values())


def add_line(line: Line, path: Path) -> None:
    """Add a line to a file, which is made with its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('a', encoding='utf-8') as file:
        print(json.dumps(line, ensure_ascii=False), file=file)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, for tools that do without pandas."""
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
