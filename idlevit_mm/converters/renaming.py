"""Tables of names that are read in both directions.

A pattern is a name in which ``{stage}`` stands for a number, ``{stage+1}`` for the same number
plus one, ``{leaf}`` for a last part such as ``weight``, and ``{path}`` for anything. Our names are
OpenMMLab's, their names those of another project.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..checkpoints import StateDict, of_policy
from ..errors import SettingError, shortened

_T = TypeVar('_T')
Transform = Callable[[Tensor], Tensor]

_FIELD = re.compile(r'\{(\w+(?:\+1)?)\}')
# What stands for other fields than numbers.
_TEXTS = {'leaf': '[a-z_]+', 'path': '.+'}
_NOTHING = re.compile(r'(?!)')


def same(value: _T) -> _T:
    """The transform of what only changes its name."""
    return value


class Rule(NamedTuple):
    """Patterns of the two names of a weight, and what makes either value of the other."""

    ours: str
    theirs: str
    decode: Transform = same
    encode: Transform = same


class Conversion(NamedTuple):
    """Weights by their new names.

    Dropped are old names that have no place among the new ones, added the new names of weights that
    were made up without changing features.
    """

    state: StateDict
    dropped: list[str]
    added: list[str]


class Joint(NamedTuple):
    """A weight that they have in parts, one after another in its first dimension.

    Attributes:
        whole: Pattern of a name for all parts together.
        parts: Patterns of the names of the parts.
        shares: How many of as many equal pieces each part has.
    """

    whole: str
    parts: tuple[str, ...]
    shares: tuple[int, ...]

    def joined(self, state: StateDict) -> StateDict:
        """Put parts together wherever all of them are there, in the place of the first."""
        first = self.parts[0]
        joined: StateDict = {}
        used: set[str] = set()
        for key, value in state.items():
            names = [_translated(key, first, part) for part in self.parts]
            if all(name in state for name in names):
                joined[_translated(key, first, self.whole)] = torch.cat([state[n] for n in names])
                used.update(names)
            else:
                joined[key] = value
        return {key: value for key, value in joined.items() if key not in used}

    def parted(self, conversion: Conversion) -> Conversion:
        """The inverse of ``joined``, on weights that have their names already."""
        state: StateDict = {}
        for key, value in conversion.state.items():
            names = [_translated(key, self.whole, part) for part in self.parts]
            if not all(names):
                state[key] = value
                continue
            piece = len(value) // sum(self.shares)
            parts = value.split([piece * share for share in self.shares])
            state |= zip(names, parts, strict=True)
        return conversion._replace(state=state)


@dataclass(frozen=True)
class KeyMap:
    """Names of one family of networks in OpenMMLab and in another project.

    Attributes:
        title: What their names are called, for messages.
        rules: All weights that both have.
        theirs_only: What they have beyond that and a backbone does not need: classifiers, buffers.
        ours_only: What a backbone has beyond that and they do not need.
        before: What becomes of their weights before they get our names.
        decoded: What becomes of weights that have got our names.
        encoded: What becomes of weights that have got their names.
    """

    title: str
    rules: tuple[Rule, ...]
    theirs_only: re.Pattern = _NOTHING
    ours_only: re.Pattern = _NOTHING
    before: Callable[[StateDict], StateDict] = same
    decoded: Callable[[Conversion], Conversion] = same
    encoded: Callable[[Conversion], Conversion] = same

    def decode(self, state: StateDict) -> Conversion:
        """Give weights our names; a SettingError tells which have no counterpart."""
        table = tuple((rule.theirs, rule.ours, rule.decode) for rule in self.rules)
        names = 'OpenMMLab', self.title
        return self.decoded(_renamed(self.before(state), table, self.theirs_only.search, *names))

    def encode(self, state: StateDict) -> Conversion:
        """Give weights their names; a SettingError tells which have no counterpart."""
        table = tuple((rule.ours, rule.theirs, rule.encode) for rule in self.rules)

        def dropped(key: str) -> bool:
            return of_policy(key) or bool(self.ours_only.search(key))

        return self.encoded(_renamed(state, table, dropped, self.title, 'OpenMMLab'))


def with_leaves(
    pairs: Iterable[tuple[str, str]], ours: str = '', theirs: str = '', *transforms: Transform
) -> tuple[Rule, ...]:
    """Rules of a module's parts: each pair of names behind two prefixes, before ``.{leaf}``."""
    return tuple(
        Rule(f'{ours}{one}.{{leaf}}', f'{theirs}{other}.{{leaf}}', *transforms)
        for one, other in pairs
    )


def with_qkv_biases(conversion: Conversion) -> Conversion:
    """Add zero biases of query, key and value where the output has one and they have none.

    mmcv's attention has all of its biases or none.
    """
    state, added = {}, list(conversion.added)
    for key, value in conversion.state.items():
        state[key] = value
        bias = key.removesuffix('weight') + 'bias'
        lacks = key.endswith('.in_proj_weight') and bias not in conversion.state
        if lacks and bias.replace('in_proj_', 'out_proj.') in conversion.state:
            state[bias] = value.new_zeros(value.shape[0])
            added.append(bias)
    return conversion._replace(state=state, added=added)


def _renamed(
    state: StateDict,
    table: tuple[tuple[str, str, Transform], ...],
    is_dropped: Callable[[str], object],
    new_names: str,
    old_names: str,
) -> Conversion:
    renamed: StateDict = {}
    dropped: list[str] = []
    unknown: list[str] = []
    for key, value in state.items():
        for old, new, transform in table:
            if name := _translated(key, old, new):
                renamed[name] = transform(value)
                break
        else:
            (dropped if is_dropped(key) else unknown).append(key)
    if unknown:
        raise SettingError(
            f'{len(unknown)} of {len(state)} weights in {old_names} names have no counterpart in '
            f'{new_names} names: {shortened(unknown, 3)}; allowed: '
            f'{", ".join(old for old, _, _ in table)}'
        )
    return Conversion(renamed, dropped, [])


def _translated(key: str, old: str, new: str) -> str:
    """The name under the pattern ``new`` of a key that fits ``old``; '' for one that does not."""
    match = _compiled(old).fullmatch(key)
    if match is None:
        return ''
    values: dict[str, object] = {}
    for field, text in zip(_FIELD.findall(old), match.groups(), strict=True):
        if field in _TEXTS:
            values[field] = text
        else:
            name = field.removesuffix('+1')
            number = int(text) - (field != name)
            values |= {name: number, f'{name}+1': number + 1}
    return new.format_map(values)


@cache
def _compiled(pattern: str) -> re.Pattern:
    first, *rest = _FIELD.split(pattern)
    expression = re.escape(first)
    for field, text in zip(rest[::2], rest[1::2], strict=True):
        number = '[1-9][0-9]*' if field.endswith('+1') else '[0-9]+'
        expression += f'({_TEXTS.get(field, number)}){re.escape(text)}'
    return re.compile(expression)
