"""Imports inside the package point down, form no circle, and keep clear of mmdet and mmseg."""

import ast
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import idlevit_mm

ROOT = Path(idlevit_mm.__file__).parent
PACKAGE = 'idlevit_mm'

# What each part may import; the order is that of the map, from the ground up.
ALLOWED = {
    'version': set(),
    'errors': set(),
    'registry': {'errors'},
    'ops': set(),
    'kernels': {'ops'},
    'layers': {'kernels', 'ops', 'registry', 'errors'},
    'policies': {'kernels', 'ops', 'registry'},
    'blocks': {'policies', 'kernels', 'ops'},
    'checkpoints': {'errors'},
    'converters': {'checkpoints', 'layers', 'registry', 'errors'},
    'backbones': {
        *('blocks', 'policies', 'layers', 'kernels', 'ops', 'converters', 'checkpoints'),
        *('registry', 'errors'),
    },
    'necks': {'layers', 'registry'},
    'heads': set(),
    'losses': {'kernels', 'ops', 'checkpoints', 'registry', 'errors'},
    'visualization': set(),
    'hooks': {'losses', 'policies', 'registry', 'backbones', 'errors', 'visualization'},
    'datasets': {'registry', 'errors'},
    'engine': {
        *('hooks', 'losses', 'datasets', 'registry', 'backbones', 'checkpoints', 'converters'),
        *('version', 'errors'),
    },
    'analysis': {
        *('engine', 'hooks', 'losses', 'datasets', 'necks', 'backbones', 'converters'),
        *('checkpoints', 'blocks', 'policies', 'layers', 'kernels', 'ops', 'registry', 'version'),
        *('errors', 'visualization'),
    },
}
# The parts that never import mmdet or mmseg, not even inside a function.
CORE = (
    *('errors', 'registry', 'ops', 'kernels', 'layers', 'policies', 'blocks', 'backbones'),
    'necks',
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


def test_imports_point_down():
    wrong = []
    for name in MODULES:
        part = part_of(name)
        for target, _ in IMPORTS[name] if part else ():
            if target.split('.')[0] == PACKAGE:
                other = part_of(target)
                if other is None or not (other == part or other in ALLOWED[part]):
                    wrong.append(f'{name} imports {target}')
    assert not wrong, wrong
    places = list(ALLOWED)
    above = {
        part: [one for one in allowed if places.index(one) > places.index(part)]
        for part, allowed in ALLOWED.items()
    }
    assert not any(above.values()), above


def test_mmdet_and_mmseg_are_not_needed():
    wrong = [
        f'{name} imports {target}' + (' when it is imported' if at_import else '')
        for name in MODULES
        for target, at_import in IMPORTS[name]
        if target.split('.')[0] in FOREIGN and (at_import or part_of(name) in CORE)
    ]
    assert not wrong, wrong


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


def test_every_module_imports():
    wrong = []
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            # Its kernels or heads need it, and nothing else imports them without it.
            if error.name not in ('triton', 'mmpretrain'):
                wrong.append(f'{name}: {error}')
    assert not wrong, wrong
    if find_spec('triton') and find_spec('mmpretrain'):
        assert set(MODULES) <= set(sys.modules)


# Who computes asks the kernels how, and never where it runs.
COMPUTING = ('ops', 'layers', 'policies', 'blocks', 'backbones', 'losses', 'necks')
QUESTIONS = {
    'is_tracing', 'is_compiling', 'is_in_onnx_export', 'is_dynamo_compiling', 'is_exporting',
    'FakeTensor', 'FakeTensorMode', 'get_proxy_mode', 'autocast', 'is_autocast_enabled',
    'is_autocast_cpu_enabled', 'is_cuda', 'is_cpu', 'is_mps', 'is_xpu', 'is_meta', 'mkldnn', 'cuda',
    'mps', 'xpu',
}  # fmt: skip
KINDS = {'cpu', 'cuda', 'mps', 'xpu', 'meta'}


def questions_of(path):
    """(line, question) of what asks for a kind of device, autocast, or a graph that is recorded."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        asked = None
        if isinstance(node, ast.Attribute):
            # A `site` has been asked already: its fields are the answers.
            site = ast.unparse(node.value).startswith('site')
            of_device = node.attr == 'type' and ast.unparse(node.value).endswith('device')
            asked = node.attr if (node.attr in QUESTIONS and not site) or of_device else None
        elif isinstance(node, ast.Name):
            asked = node.id if node.id in QUESTIONS else None
        elif isinstance(node, ast.alias):
            asked = node.name if node.name.split('.')[-1] in QUESTIONS else None
        elif isinstance(node, ast.Constant):
            asked = node.value if node.value in KINDS else None
        if asked is not None:
            yield getattr(node, 'lineno', 0), asked


# Tables are made of numbers alone, on the CPU, and kept where a mode of fake tensors is on.
TABLES = {'get_proxy_mode', 'cpu'}


def test_nobody_but_the_kernels_asks_where_it_runs():
    found = [
        f'{path.relative_to(ROOT)}:{line} asks for {question}'
        for part in COMPUTING
        for path in sorted((ROOT / part).rglob('*.py'))
        for line, question in questions_of(path)
        if not (path.name == 'geometry.py' and question in TABLES)
    ]
    assert not found, found
    assert list(questions_of(ROOT / 'kernels' / 'site.py')), 'the scan sees nothing'
