"""What is compared in a benchmark: the dense reference, timm's twin, and idle backbones.

Only functions that need mmdet, mmseg or timm import them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from idlevit_mm.analysis.models import (
    host_backbone,
    load_config,
    load_model,
    with_host_backbone,
    with_keep_ratios,
)
from idlevit_mm.analysis.presets import PRESETS, Preset, preset_of, timm_twin
from idlevit_mm.errors import UsageError, one_line

SCOPES = ('map', 'window_tokens', 'windows')
DENSE_KINDS = ('host', 'timm', 'dense')
_SWIN = 'IdleSwinTransformer'


@dataclass(frozen=True)
class Label:
    """Which candidate it is.

    Attributes:
        name: what it is called in tables.
        kind: 'host' (the class of mmdet or mmseg), 'timm', 'dense' (idle class, all tokens kept),
            'idle', or 'config' (as a config file has it).
        keep: keep ratio of all blocks; None where there is none, or not one.
        scope: the policy's scope, for 'idle'.
        target: the preset or config.
    """

    name: str
    kind: str
    keep: float | None = None
    scope: str | None = None
    target: str = ''


@dataclass(frozen=True)
class Candidate:
    """A model to be timed.

    Attributes:
        label: which one it is.
        build: the model for images of a size (H, W) in pixels, in eval mode on the CPU; the same
            object each time unless it depends on the size.
    """

    label: Label
    build: Callable[[tuple[int, int]], nn.Module]


@dataclass(frozen=True)
class Target:
    """A preset or config with all that is compared on it.

    Attributes:
        name: of the preset, or the config file's name without its ending.
        candidates: the reference first.
        notes: what a reader of the figures has to know.
    """

    name: str
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What to compare on each target.

    Attributes:
        keep_ratios: None for 1.0, 0.7 and 0.5 with presets, and for configs as they are.
        scopes: each ratio below 1 with each of them; None for the one that the policy has.
        part: 'backbone' or 'model'.
        timm: whether timm's twin takes part.
        host: whether the dense class of mmdet or mmseg takes part.
        cfg_options: overrides of config files.
    """

    keep_ratios: Sequence[float] | None = None
    scopes: Sequence[str] | None = None
    part: str = 'backbone'
    timm: bool = False
    host: bool = True
    cfg_options: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Refuse values that no target takes.

        Raises:
            UsageError: a ratio or scope is out of range, or timm is to be part of a whole model.
        """
        for ratio in self.keep_ratios or ():
            if not 0 < ratio <= 1:
                raise UsageError(f'--keep-ratios {ratio:g}: must lie above 0 and not above 1')
        for scope in self.scopes or ():
            if scope not in SCOPES:
                raise UsageError(f'--scopes {scope}: must be one of {", ".join(SCOPES)}')
        if self.timm and self.part == 'model':
            raise UsageError('--timm with --part model: timm has backbones only')


def load_target(spec: str, choice: Choice, checkpoint: str | Path | None = None) -> Target:
    """Build all that is compared on a preset or config.

    Args:
        spec: name of a preset, or path of a config file.
        choice: what to compare.
        checkpoint: weights of the config's model; random ones when None.

    Returns:
        The target, its models on the CPU in eval mode, sharing weights where they can.

    Raises:
        UsageError: there is no such preset or config, or the choice does not fit it.
    """
    choice.check()
    cfg, preset, name = _read(spec, choice, checkpoint)
    backbone_cfg = cfg.model.get('backbone', cfg.model)
    idle = str(backbone_cfg.get('type', '')).split('.')[-1].startswith('Idle')
    ratios, scopes = _checked(name, choice, preset is not None, idle, backbone_cfg)
    try:
        model = load_model(cfg, checkpoint)
    except (ImportError, KeyError) as error:  # KeyError: a class that no installed library has
        raise UsageError(f'{spec} cannot be built: {one_line(error)}') from error
    if choice.part == 'backbone':
        model_cfg = cfg
        model = getattr(model, 'backbone', model)
        model.cfg = model_cfg
    if not idle:
        label = Label('as configured', 'config', target=name)
        return Target(name, (Candidate(label, lambda shape: model),))

    preset = preset or preset_of(backbone_cfg)
    notes: list[str] = []
    candidates = []
    host = _host(model, choice, name, notes)
    if host is not None:
        candidates.append(host)
    if choice.part == 'backbone' and (choice.timm or host is None):
        twin = _timm(name, backbone_cfg, preset, choice.timm, notes)
        if twin is not None and (choice.timm or choice.host):
            candidates.append(twin)
    dense = _dense(model, name)
    if not candidates or (ratios is not None and 1.0 in ratios):
        candidates.append(dense)
    several = len(set(choice.scopes or ())) > 1
    candidates += _idle(model, cfg, name, ratios, scopes, several)
    if candidates[0].label.kind != 'host' and choice.host:
        notes.append(f'{name}: the reference is {candidates[0].label.name}')
    return Target(name, tuple(candidates), tuple(notes))


def together(targets: Sequence[Target]) -> Target:
    """All candidates of several targets in one, against the first one's reference."""
    candidates = []
    for target in targets:
        for candidate in target.candidates:
            label = candidate.label
            named = Label(
                f'{target.name} {label.name}', label.kind, label.keep, label.scope, target.name
            )
            candidates.append(Candidate(named, candidate.build))
    notes = tuple(note for target in targets for note in target.notes)
    return Target(' + '.join(target.name for target in targets), tuple(candidates), notes)


def _read(
    spec: str, choice: Choice, checkpoint: str | Path | None
) -> tuple[Config, Preset | None, str]:
    """Config, preset (None for a config file) and name of a target."""
    preset = PRESETS.get(spec)
    if preset is not None:
        if choice.part == 'model':
            raise UsageError(f'{spec} is a bare backbone: --part model takes config files')
        if checkpoint is not None:
            raise UsageError(f'--checkpoints: {spec} is a preset, which is timed with random ones')
        return Config(dict(model=copy.deepcopy(dict(preset.backbone)))), preset, spec
    path = Path(spec)
    if not path.is_file():
        raise UsageError(
            f'{spec} is neither a config file nor a preset; presets: {", ".join(PRESETS)}'
        )
    try:
        cfg = load_config(path, dict(choice.cfg_options or {}))
    except (OSError, SyntaxError, ImportError) as error:
        raise UsageError(f'{spec} is not a config file that can be read: {error}') from error
    if cfg.get('model') is None:
        raise UsageError(f'{spec} has no model')
    backbone = cfg.model.get('backbone')
    if checkpoint is None and backbone is not None and backbone.get('init_cfg') is not None:
        # Random weights do as well for timing; nothing is to be fetched.
        backbone.init_cfg = None
    return cfg, None, path.stem


def _checked(
    name: str, choice: Choice, is_preset: bool, idle: bool, backbone_cfg: Mapping[str, Any]
) -> tuple[list[float] | None, list[str | None]]:
    """Keep ratios (None: as configured) and scopes (None: the policy's own) for one target."""
    ratios = choice.keep_ratios
    if not idle:
        if ratios or choice.scopes:
            raise UsageError(
                f'{name} has backbone {backbone_cfg.get("type")}, which is not idle: it takes '
                'neither --keep-ratios nor --scopes'
            )
        return None, [None]
    if ratios is None and (is_preset or choice.scopes):
        ratios = (1.0, 0.7, 0.5)
    scopes: list[str | None] = list(dict.fromkeys(choice.scopes or (None,)))
    if str(backbone_cfg['type']).split('.')[-1] != _SWIN and scopes != [None]:
        if 'map' not in scopes:
            raise UsageError(
                f'--scopes {" ".join(map(str, scopes))}: {name} has scope map only; the others '
                'are for Swin'
            )
        scopes = ['map']
    return None if ratios is None else list(dict.fromkeys(ratios)), scopes


def _host(model: nn.Module, choice: Choice, name: str, notes: list[str]) -> Candidate | None:
    """The dense class of mmdet or mmseg, if it is wanted and can be had."""
    if not choice.host:
        return None
    try:
        if choice.part == 'model':
            dense = with_host_backbone(model)
            backbone = dense.backbone
        else:
            cfg = model.cfg.model  # type: ignore[union-attr]
            dense = backbone = host_backbone(model, cfg.get('backbone', cfg))
    except (ImportError, AssertionError, ValueError) as error:
        # AssertionError: what mmdet and mmseg raise where they do not like mmcv's version.
        notes.append(f'{name}: no dense class of mmdet or mmseg here: {error}')
        return None
    library = type(backbone).__module__.split('.')[0]
    label = Label(f"{library}'s dense", 'host', target=name)
    return Candidate(label, lambda shape: dense)


def _timm(
    name: str,
    backbone_cfg: Mapping[str, Any],
    preset: Preset | None,
    wanted: bool,
    notes: list[str],
) -> Candidate | None:
    """The twin in timm, if there is one."""
    if preset is None or preset.timm is None:
        if wanted:
            notes.append(f'{name}: timm has no twin of it')
        return None
    try:
        import timm  # noqa: F401
    except ImportError as error:
        if wanted:
            raise UsageError(f'--timm: timm cannot be imported: {error}') from error
        return None
    timm_name, rate = preset.timm, backbone_cfg.get('drop_path_rate', 0.1)
    notes.append(f"{name}: timm's twin is {timm_name}")
    build = functools.lru_cache(maxsize=1)(lambda shape: timm_twin(timm_name, shape, rate).eval())
    return Candidate(Label("timm's dense", 'timm', target=name), build)


def _dense(model: nn.Module, name: str) -> Candidate:
    """The idle class with all tokens kept."""
    dense = with_keep_ratios(model, 1.0)
    return Candidate(Label('keep 1', 'dense', 1.0, target=name), lambda shape: dense)


def _idle(
    model: nn.Module,
    cfg: Config,
    name: str,
    ratios: Sequence[float] | None,
    scopes: Sequence[str | None],
    scopes_named: bool,
) -> list[Candidate]:
    """The idle backbone with each ratio below 1 and each scope, or as configured."""

    def candidate(label: Label, module: nn.Module) -> Candidate:
        return Candidate(label, lambda shape: module)

    if ratios is None:
        return [candidate(Label('as configured', 'config', target=name), model)]
    candidates = []
    for scope in scopes:
        scoped = model if scope is None else _with_scope(model, cfg, scope)
        shown = f' {scope}' if scopes_named else ''
        for ratio in ratios:
            if ratio < 1:
                label = Label(f'keep {ratio:g}{shown}', 'idle', ratio, scope, name)
                candidates.append(candidate(label, with_keep_ratios(scoped, ratio)))
    return candidates


def _with_scope(model: nn.Module, cfg: Config, scope: str) -> nn.Module:
    """The same model with another scope of its policy, weights shared."""
    cfg = copy.deepcopy(cfg)
    backbone = cfg.model.get('backbone', cfg.model)
    backbone.policy = {**(backbone.get('policy') or {}), 'scope': scope}
    scoped = load_model(cfg)
    if not hasattr(model, 'backbone'):
        scoped = getattr(scoped, 'backbone', scoped)
    scoped.load_state_dict(model.state_dict(), strict=True, assign=True)
    return scoped
