"""Imports inside the package point down, form no circle, and keep clear of mmdet and mmseg."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import idlevit_mm

ROOT = Path(idlevit_mm.__file__).parent
PACKAGE = 'idlevit_mm'

# What each part may import; the order is that of the map, from the ground up.
ALLOWED = {
    'version': set(),
    'errors': set(),
    'registry': set(),
    'ops': set(),
    'layers': {'ops', 'registry'},
    'policies': {'layers', 'ops', 'registry'},
    'blocks': {'policies', 'layers', 'ops', 'registry'},
    'checkpoints': {'errors'},
    'converters': {'checkpoints', 'layers', 'registry', 'errors'},
    'backbones': {
        *('blocks', 'policies', 'layers', 'ops', 'converters', 'checkpoints', 'registry', 'errors'),
    },
    'necks': {'layers', 'registry'},
    'losses': {'policies', 'layers', 'ops', 'checkpoints', 'registry', 'errors'},
    'visualization': set(),
    'hooks': {
        *('losses', 'policies', 'layers', 'ops', 'registry', 'backbones', 'errors'),
        'visualization',
    },
    'datasets': {'registry'},
    'engine': {
        *('hooks', 'losses', 'datasets', 'registry', 'backbones', 'checkpoints', 'version'),
        'errors',
    },
    'analysis': {
        *('engine', 'hooks', 'losses', 'datasets', 'necks', 'backbones', 'converters'),
        *('checkpoints', 'blocks', 'policies', 'layers', 'ops', 'registry', 'version', 'errors'),
        'visualization',
    },
}
# The parts that never import mmdet or mmseg, not even inside a function.
CORE = (
    *('errors', 'registry', 'ops', 'layers', 'policies', 'blocks', 'backbones', 'necks'),
    'checkpoints',
    'converters',
    'losses',
    'visualization',
)
FOREIGN = ('mmdet', 'mmseg')


def modules():
    """Dotted name and file of every module of the package."""
    for path in sorted(ROOT.rglob('*.py')):
        parts = path.relative_to(ROOT.parent).with_suffix('').parts
        yield '.'.join(parts[:-1] if parts[-1] == '__init__' else parts), path


MODULES = dict(modules())


def imports_of(name, path):
    """(imported dotted name, whether it runs when the module is imported) of every import."""
    package = name.split('.') if path.name == '__init__.py' else name.split('.')[:-1]

    def walk(node, at_import):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, at_import
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                base = [*base, *((child.module or '').split('.') if child.module else [])]
                for alias in child.names:
                    full = '.'.join([*base, alias.name])
                    yield (full if full in MODULES else '.'.join(base)), at_import
            elif isinstance(child, ast.If) and 'TYPE_CHECKING' in ast.dump(child.test):
                yield from ((target, False) for target, _ in walk(child, False))
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from walk(child, False)
            else:
                yield from walk(child, at_import)

    return list(walk(ast.parse(path.read_text(encoding='utf-8')), True))


IMPORTS = {name: imports_of(name, path) for name, path in MODULES.items()}


def part_of(name):
    return name.split('.')[1] if '.' in name else None


def test_the_walk_sees_imports():
    assert any(target.startswith('torch') for target, _ in IMPORTS[f'{PACKAGE}.backbones.swin'])
    assert any(target.startswith(PACKAGE) for target, _ in IMPORTS[f'{PACKAGE}.backbones.swin'])
    assert any(target.startswith(f'{PACKAGE}.backbones') for target, _ in IMPORTS[PACKAGE])


def test_every_part_has_a_place():
    parts = {part_of(name) for name in MODULES} - {None}
    assert parts <= set(ALLOWED), f'give {sorted(parts - set(ALLOWED))} a place in ALLOWED'
    assert {'registry', 'ops', 'layers', 'policies', 'blocks', 'backbones'} <= parts


@pytest.mark.parametrize('name', MODULES)
def test_imports_point_down(name):
    part = part_of(name)
    if part is None:
        return
    for target, _ in IMPORTS[name]:
        if target.split('.')[0] == PACKAGE:
            other = part_of(target)
            assert other is not None, f'{name} imports the whole package'
            assert other == part or other in ALLOWED[part], f'{name} imports {target}'


@pytest.mark.parametrize('name', MODULES)
def test_mmdet_and_mmseg_are_not_needed(name):
    for target, at_import in IMPORTS[name]:
        if target.split('.')[0] in FOREIGN:
            assert not at_import, f'{name} imports {target} when it is imported'
            assert part_of(name) not in CORE, f'{name} imports {target}'


def test_no_circle_between_modules():
    graph = {
        name: {
            target
            for target, at_import in targets
            if at_import and target in MODULES and target != name
        }
        for name, targets in IMPORTS.items()
    }
    done, path = set(), []

    def visit(name):
        if name in path:
            circle = [*path[path.index(name) :], name]
            raise AssertionError(f'circular import: {" -> ".join(circle)}')
        if name not in done:
            path.append(name)
            for target in sorted(graph[name]):
                visit(target)
            done.add(path.pop())

    for name in graph:
        visit(name)


@pytest.mark.parametrize('name', MODULES)
def test_every_module_imports(name):
    importlib.import_module(name)
    assert name in sys.modules
