"""The dense network that students are compared with; never a part of the student."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from ..checkpoints import compare, is_local, of_policy, read_weights
from ..errors import MissingFileError, SettingError
from .capture import Call, Step, captured

_KEYS = ('checkpoint', 'config')


class Teacher:
    """A frozen network that sees the same images as the student.

    It runs at most once in each forward pass of the student, however many losses ask.

    Args:
        model: The network, in the form and on the device it shall have.

    Attributes:
        backbones: Names of the modules that get what the student's module of that name got.
        heads: Names of the modules whose ``forward`` gets the output of ``extract_feat``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self.backbones: set[str] = set()
        self.heads: set[str] = set()
        self._step: Step | None = None
        self._calls: Mapping[str, Call] = {}

    def calls(self, step: Step) -> Mapping[str, Call]:
        """Last call of each backbone and head, by name, for the images of a student's step."""
        if self._step is not step:
            self._calls = self._run(step)
            self._step = step
        return self._calls

    def forget(self) -> None:
        """Let go of the last step and its tensors."""
        self._step, self._calls = None, {}

    @torch.no_grad()
    def _run(self, step: Step) -> Mapping[str, Call]:
        names = sorted(self.backbones | self.heads)
        modules = {name: self.model.get_submodule(name) for name in names}
        with captured(modules) as calls:
            if self.heads:
                features = self.model.extract_feat(step.inputs)
                for name in sorted(self.heads):
                    modules[name].forward(features)
            else:
                for name in sorted(self.backbones):
                    modules[name](*step.calls[name].args, **step.calls[name].kwargs)
        return calls


class Teachers:
    """Builds teachers of a student; the same description gives the same teacher.

    Args:
        student: The model that trains, without wrappers.
        backbones: Its idle backbones by name.
    """

    def __init__(self, student: nn.Module, backbones: Mapping[str, Any]) -> None:
        self.student = student
        self.backbones = backbones
        self.built: dict[tuple[str, str], Teacher] = {}

    def get(self, description: Any) -> Teacher:
        """The teacher of a description: ``dict(checkpoint=...)``, optionally with ``config``.

        Raises:
            FileNotFoundError: Checkpoint or config do not exist.
            TypeError: The description is no dict of paths, or has an unknown key.
            ValueError: The weights are not those of the teacher.
        """
        checkpoint, config = check_description(description)
        key = checkpoint, config
        if key not in self.built:
            self.built[key] = Teacher(self._build(checkpoint, config))
        return self.built[key]

    def forget(self) -> None:
        """Let all teachers let go of the last step."""
        for teacher in self.built.values():
            teacher.forget()

    def _build(self, checkpoint: str, config: str) -> nn.Module:
        _check_file('teacher.checkpoint', checkpoint)
        if config:
            _check_file('teacher.config', config)
            cfg = Config.fromfile(config)
            model = MODELS.build({'_scope_': cfg.get('default_scope'), **cfg.model})
        else:
            # A copy of the model is a copy of its config, and also works for models built in code.
            model = copy.deepcopy(self.student)
            for name in self.backbones:
                model.get_submodule(name).set_keep_ratios(1.0)
        _load(model, checkpoint)
        return model.to(next(self.student.parameters()).device)


def check_description(description: Any) -> tuple[str, str]:
    """Checkpoint and config of a teacher's description; the config is '' where none is given.

    Raises:
        TypeError: The description is no dict of paths, or has an unknown key.
    """
    allowed = "allowed: dict(checkpoint='...') or dict(config='...', checkpoint='...')"
    if not isinstance(description, dict) or set(description) - set(_KEYS):
        raise TypeError(f'teacher={description!r}; {allowed}')
    checkpoint, config = description.get('checkpoint'), description.get('config')
    if not checkpoint or not all(isinstance(v, (str, Path)) for v in description.values() if v):
        raise TypeError(f'teacher={description!r} must name a checkpoint; {allowed}')
    return str(checkpoint), str(config or '')


def _check_file(argument: str, path: str) -> None:
    if is_local(path) and not Path(path).is_file():
        raise MissingFileError(f'{argument}={path!r} does not exist')


def _load(model: nn.Module, path: str) -> None:
    """Load all weights of the teacher, or say in one line why these are others."""
    given = read_weights(path)
    # A dense network has no weights of policies, and does not ask those of a checkpoint.
    report = compare(model.state_dict(), given, policy_too=False)
    report.unexpected = [name for name in report.unexpected if not of_policy(name)]
    if misfit := report.misfit():
        raise SettingError(
            f'teacher.checkpoint={path!r} does not fit {type(model).__name__}: it {misfit}; name '
            'the config it was trained with as teacher.config'
        )
    model.load_state_dict(given, strict=False)


def find_modules(model: nn.Module, names: tuple[str, ...], argument: str, whose: str) -> None:
    """Check that a model has all modules of these names.

    Raises:
        SettingError: One is missing.
    """
    have: Callable[[str], bool] = dict(model.named_modules()).__contains__
    for name in names:
        if not have(name):
            children = ', '.join(child for child, _ in model.named_children())
            raise SettingError(
                f'{argument} names {name!r}, which the {whose} {type(model).__name__} does not '
                f'have; it has {children}'
            )
