"""Python source of small configs, laid out as one would write them by hand."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from typing import Any

_WIDTH = 96
_INDENT = '    '


class Code(str):
    """An expression that stands in a config as it is, such as the name of a class."""


def source(value: Any, column: int = 0, depth: int = 0) -> str:
    """Write a value as Python source, on one line where it fits.

    Args:
        value: Nested dicts and lists of literals and :class:`Code`.
        column: Where its first character will stand.
        depth: Levels of indentation of the line on which it begins.
    """
    line = _on_one_line(value)
    if column + len(line) <= _WIDTH or not _parts(value):
        return line
    opening, closing = _brackets(value)
    inner = '\n' + _INDENT * (depth + 1)
    rows = []
    for label, part in _parts(value):
        begin = len(_INDENT) * (depth + 1) + len(label) + 1  # 1: the comma behind it
        rows.append(f'{inner}{label}{source(part, begin, depth + 1)},')
    return f'{opening}{"".join(rows)}\n{_INDENT * depth}{closing}'


def assignment(name: str, value: Any) -> str:
    """Write ``name = value``."""
    return f'{name} = {source(value, len(name) + 3)}\n'


def nested(path: tuple[str, ...], value: Any) -> Any:
    """Put a value into dicts, one for each key of a path."""
    for key in reversed(path):
        value = {key: value}
    return value


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Join nested dicts; a value of the second replaces one of the first."""
    joined = dict(first)
    for key, value in second.items():
        both = isinstance(value, Mapping) and isinstance(joined.get(key), Mapping)
        joined[key] = merged(joined[key], value) if both else value
    return joined


def _on_one_line(value: Any) -> str:
    parts = _parts(value)
    if not parts:
        return str(value) if isinstance(value, Code) else repr(value)
    opening, closing = _brackets(value)
    comma = ',' if isinstance(value, tuple) and len(value) == 1 else ''
    inside = ', '.join(f'{label}{_on_one_line(part)}' for label, part in parts)
    return f'{opening}{inside}{comma}{closing}'


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What a container holds, each with what stands before it."""
    if isinstance(value, Mapping):
        form = '{}=' if _as_call(value) else '{!r}: '
        return [(form.format(key), part) for key, part in value.items()]
    return [('', part) for part in value] if isinstance(value, (list, tuple)) else []


def _brackets(value: Any) -> tuple[str, str]:
    if isinstance(value, Mapping):
        return ('dict(', ')') if _as_call(value) else ('{', '}')
    return ('(', ')') if isinstance(value, tuple) else ('[', ']')


def _as_call(value: Mapping[Any, Any]) -> bool:
    """Whether ``dict(key=...)`` can spell a dict."""
    return all(
        isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key) for key in value
    )
