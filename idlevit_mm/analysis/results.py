"""The file of a benchmark: saved after every case, continued where it was interrupted."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from idlevit_mm.analysis.candidates import Target
from idlevit_mm.analysis.cases import Case
from idlevit_mm.analysis.measuring import Result
from idlevit_mm.analysis.runs import machine, versions
from idlevit_mm.errors import UsageError


@dataclass
class Results:
    """All cases measured so far.

    Attributes:
        about: 'runs': command, machine, versions and notes of each run that added cases.
        results: one per case, in the order measured.
    """

    about: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    def begin(self, arguments: Sequence[str], device: str, targets: Iterable[Target]) -> None:
        """Note the run that adds cases from now on."""
        run = {
            'command': shlex.join(['tools/analysis_tools/benchmark.py', *arguments]),
            'machine': _place(device),
            'versions': versions(),
            'notes': [note for target in targets for note in target.notes],
        }
        self.about['runs'] = [*self.about.get('runs', []), run]

    def described(self) -> list[str]:
        """Machines, versions and notes of all runs, each once."""
        lines: list[str] = []
        for run in self.about.get('runs', []):
            lines += [f'{run["machine"]}; {run["versions"]}', *run['notes']]
        return list(dict.fromkeys(lines))

    def add(self, result: Result) -> None:
        """Add a case; one of the same conditions is replaced."""
        self.results = [old for old in self.results if old.case != result.case]
        self.results.append(result)

    def has(self, case: Case, names: Iterable[str]) -> bool:
        """Whether a case is there with these candidates, none of them failed."""
        for result in self.results:
            if result.case == case and not result.failed:
                return {entry.label.name for entry in result.entries} >= set(names)
        return False

    def save(self, path: Path) -> None:
        """Write all to a JSON file, whole or not at all."""
        record = {**self.about, 'cases': [result.as_dict() for result in self.results]}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + '.new')
        unfinished.write_text(
            json.dumps(record, indent=1, ensure_ascii=False) + '\n', encoding='utf-8'
        )
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that ``save`` wrote.

        Raises:
            UsageError: there is no such file, or it is another one.
        """
        try:
            record = json.loads(path.read_text(encoding='utf-8'))
            cases = record.pop('cases')
            return cls(record, [Result.from_dict(case) for case in cases])
        except OSError as error:
            raise UsageError(f'{path} cannot be read: {error.strerror}') from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f'{path} is not a file that this tool wrote') from error


def _place(device: str) -> str:
    """The machine, with its GPU where that is what measures."""
    if torch.device(device).type != 'cuda':
        return machine()
    return f'{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda}), {machine()}'
