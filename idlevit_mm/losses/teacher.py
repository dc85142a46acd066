"""The dense network that students are compared with; never a part of the student."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from ..checkpoints import compare, is_local, of_policy, read_weights
from ..errors import MissingFileError, SettingError
from .capture import Call, Step, captured

# What stands in the place of a description, and its checkpoint and config.
STUDENT = 'student'
_OF_ITSELF = '', STUDENT


class Teacher:
    """A network that sees the same images as the student.

    It runs at most once in each forward pass of the student, however many losses ask.

    Attributes:
        backbones: Names of the modules that get what the student's module of that name got.
        heads: Names of the modules whose ``forward`` gets the output of ``extract_feat``.
        parts: Names of modules of the backbones whose calls are wanted, too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()
        self.backbones: set[str] = set()
        self.heads: set[str] = set()
        self.parts: set[str] = set()
        self._step: Step | None = None
        self._calls: Mapping[str, Call] = {}

    def load(self, path: str) -> None:
        """Load the weights of all that will run; where no head does, let go of all but backbones.

        What will not run need not fit either, so a checkpoint may come from another version of a
        detector, and its heads take no memory. A SettingError tells what does not fit.
        """
        name = type(self.model).__name__
        given = read_weights(path)
        if not self.heads:
            self.model = only(self.model, sorted(self.backbones))
            prefixes = tuple(f'{backbone}.' for backbone in self.backbones)
            given = {key: value for key, value in given.items() if key.startswith(prefixes)}
        # A dense network has no weights of policies, and does not ask those of a checkpoint.
        report = compare(self.model.state_dict(), given, policy_too=False)
        report.unexpected = [key for key in report.unexpected if not of_policy(key)]
        if misfit := report.misfit():
            raise SettingError(
                f'teacher.checkpoint={path!r} does not fit {name}: it {misfit}; name the config it '
                'was trained with as teacher.config'
            )
        self.model.load_state_dict(given, strict=False)

    def calls(self, step: Step) -> Mapping[str, Call]:
        """Last call of each backbone and head, by name, for the images of a student's step."""
        if self._step is not step:
            self._step, self._calls = step, self._run(step)
        return self._calls

    def forget(self) -> None:
        """Let go of the last step and its tensors."""
        self._step, self._calls = None, {}

    @torch.no_grad()
    def _run(self, step: Step) -> Mapping[str, Call]:
        names = sorted(self.backbones | self.heads | self.parts)
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
        start: Checkpoint that the training started from: the teacher where none is described.
    """

    def __init__(
        self, student: nn.Module, backbones: Mapping[str, Any], start: str | None = None
    ) -> None:
        self.student = student
        self.backbones = backbones
        self.start = start
        self.built: dict[tuple[str, str], Teacher] = {}

    def get(self, described: tuple[str, str] | None) -> Teacher:
        """The teacher of a description, as ``check_description`` gives it.

        Its weights are loaded by ``load``, when all losses have said what they need of it.

        Raises:
            FileNotFoundError: Checkpoint or config do not exist.
            SettingError: There is no description, and training started from no checkpoint; or the
                student is to teach itself, and its weights are sharded.
        """
        key = described or (self.start or '', '')
        if not any(key):
            raise SettingError(
                'teacher=None is the checkpoint that training starts from, but there is none: '
                "set load_from, or teacher=dict(checkpoint='...')"
            )
        if key not in self.built:
            self.built[key] = Teacher(self._build(*key))
        return self.built[key]

    def load(self) -> None:
        """Load the weights of all teachers; see ``Teacher.load``."""
        device = next(self.student.parameters()).device
        for (checkpoint, _), teacher in self.built.items():
            if checkpoint:  # the student itself has its weights
                teacher.load(checkpoint)
            teacher.model.to(device)

    def forget(self) -> None:
        """Let all teachers let go of the last step."""
        for teacher in self.built.values():
            teacher.forget()

    def _build(self, checkpoint: str, config: str) -> nn.Module:
        """A frozen network; or the student itself, with its own weights."""
        if (checkpoint, config) == _OF_ITSELF:
            # As tensors of torch.distributed are, which need not be there.
            if any(hasattr(weight, 'full_tensor') for weight in self.student.parameters()):
                raise SettingError(
                    f'teacher={STUDENT!r} needs the weights whole, and FSDP has them in shards; '
                    "allowed: teacher=dict(checkpoint='...')"
                )
            # In-place distillation (Yu and Huang, arXiv 1903.05134): of one set of weights, its
            # largest network teaches the others.
            return self._all_active(shared_copy(self.student))
        for key, path in dict(checkpoint=checkpoint, config=config).items():
            if path and is_local(path) and not Path(path).is_file():
                raise MissingFileError(f'teacher.{key}={path!r} does not exist')
        if config:
            cfg = Config.fromfile(config)
            model = MODELS.build({'_scope_': cfg.get('default_scope'), **cfg.model})
        else:
            # A copy of the model is a copy of its config, and also works for models built in code.
            model = self._all_active(copy.deepcopy(self.student))
        return model.requires_grad_(False)

    def _all_active(self, model: nn.Module) -> nn.Module:
        for name in self.backbones:
            model.get_submodule(name).set_keep_ratios(1.0)
        return model


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that has its parameters and buffers instead of doubling them."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def only(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """A module with these submodules of a model under their names, and nothing else."""
    root = nn.Module()
    for name in names:
        *path, leaf = name.split('.')
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, model.get_submodule(name))
    return root


def check_description(description: Any) -> tuple[str, str] | None:
    """Checkpoint and config ('' where none is given) of a description; None of None.

    Of the student itself there is no checkpoint.

    Raises:
        TypeError: The description is no dict of paths, or has an unknown key.
    """
    if description is None:
        return None
    if description == STUDENT:
        return _OF_ITSELF
    allowed = (
        f"allowed: None, {STUDENT!r}, dict(checkpoint='...'), dict(config=..., checkpoint=...)"
    )
    if not isinstance(description, dict) or set(description) - {'checkpoint', 'config'}:
        raise TypeError(f'teacher={description!r}; {allowed}')
    checkpoint, config = description.get('checkpoint'), description.get('config')
    if not checkpoint or not all(isinstance(v, (str, Path)) for v in description.values() if v):
        raise TypeError(f'teacher={description!r} must name a checkpoint; {allowed}')
    return str(checkpoint), str(config or '')


def find_modules(model: nn.Module, names: tuple[str, ...], argument: str, whose: str) -> None:
    """Raise a SettingError where a model has no module of one of these names."""
    have = dict(model.named_modules())
    for name in names:
        if name not in have:
            children = ', '.join(child for child, _ in model.named_children())
            raise SettingError(
                f'{argument} names {name!r}, which the {whose} {type(model).__name__} does not '
                f'have; it has {children}'
            )
