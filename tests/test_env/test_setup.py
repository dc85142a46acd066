"""The set-up: what is pinned, which wheel of mmcv is taken, and what stops it in one line."""

import os
import re
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from idlevit_mm.engine import doctor
from idlevit_mm.version import __version__

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
STACKS = {'openmmlab': ('.venv', 'mmcv'), 'onedl': ('.venv-onedl', 'onedl-mmcv')}


def toml(name):
    return tomllib.loads((ROOT / name).read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def lock():
    return {package['name']: package for package in toml('uv.lock')['package']}


# ------------------------------------------------------------------------------------- the lock


def test_lock_has_both_stacks_and_public_addresses_only(lock):
    groups = lock['idlevit-mm']['dev-dependencies']
    names = {stack: {entry['name'] for entry in groups[stack]} for stack in STACKS}
    for stack in STACKS:
        assert {'torch', 'torchvision', 'timm', 'opencv-python-headless'} <= names[stack]
    assert {'mmcv', 'mmengine', 'mmdet', 'mmsegmentation'} <= names['openmmlab']
    assert {f'onedl-{name}' for name in ('mmcv', 'mmengine', 'mmdetection')} <= names['onedl']
    assert not any(name.startswith('onedl') for name in names['openmmlab'])
    assert not names['onedl'] & {'mmcv', 'mmengine', 'mmdet', 'mmsegmentation'}

    text = (ROOT / 'uv.lock').read_text(encoding='utf-8')
    addresses = set(re.findall(r'\b[a-z+]+://[^/"]*/', text))
    assert addresses == {'https://pypi.org/', 'https://files.pythonhosted.org/'}
    assert 'path = ' not in text


def test_lock_follows_pyproject(lock):
    requirements = {
        entry
        for group in toml('pyproject.toml')['dependency-groups'].values()
        for entry in group
        if isinstance(entry, str) and '==' in entry
    }
    assert 'torch==2.11.0' in requirements
    for requirement in requirements:
        name, version = requirement.split('==')
        assert lock[name]['version'] == version, 'run `uv lock`'


def test_docs_name_the_versions_of_the_lock(lock):
    text = (ROOT / 'docs' / 'stacks.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `\w+` \| (\S+) (\S+) \| (\S+) (\S+) \|$', text, flags=re.MULTILINE)
    pairs = [pair for row in rows for pair in (row[:2], row[2:])]
    assert len(pairs) == 10
    assert {name: lock[name]['version'] for name, _ in pairs} == dict(pairs)


def test_the_package_requires_nothing_that_pip_could_replace():
    project = toml('pyproject.toml')['project']
    assert project['dependencies'] == []
    owned = {package for packages in doctor.PROVIDERS.values() for package in packages}
    extras = {name for names in project['optional-dependencies'].values() for name in names}
    assert not extras & (owned - {'timm'})


# ------------------------------------------------------------------------------- wheels of mmcv


@pytest.fixture
def build_mmcv(monkeypatch, tmp_path):
    monkeypatch.setenv('IDLEVIT_MM_CACHE', str(tmp_path / 'cache'))
    spec = util.spec_from_file_location('build_mmcv', ROOT / 'tools' / 'build_mmcv.py')
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake(build_mmcv, monkeypatch):
    """Builds and installs are noted; a wheel works if its text says so."""
    calls, outcomes = [], []

    def build(package, version, ops, folder, unity):
        calls.append(f'{ops} unity' if unity else f'{ops} plain')
        outcome = outcomes.pop(0) if outcomes else 'works'
        if outcome == 'clash':
            raise RuntimeError('redefinition of min')
        wheel = folder / 'mmcv.whl'
        wheel.write_text(outcome)
        return wheel

    def run(command, **options):
        if command[1] == '-c':
            return SimpleNamespace(returncode=0, stderr='')
        text = Path(command[-1]).read_text()
        calls.append(f'install {text}')
        return SimpleNamespace(returncode=text != 'works', stderr=f'noise\nit is {text}\n')

    monkeypatch.setattr(build_mmcv, 'build', build)
    monkeypatch.setattr(build_mmcv.subprocess, 'run', run)
    return SimpleNamespace(calls=calls, outcomes=outcomes, provide=build_mmcv.provide)


def test_every_build_has_a_folder_of_its_own(build_mmcv, tmp_path):
    first = ('mmcv', '2.1.0', '2.11.0+cu130', 'cpu')
    others = [
        *[('onedl-mmcv', *first[1:]), ('mmcv', '2.2.0', *first[2:])],
        *[(*first[:2], '2.11.0+cpu', 'cpu'), (*first[:3], 'cu13.0-sm90')],
    ]
    folders = {build_mmcv.wheel_folder(*names) for names in (first, *others)}
    assert len(folders) == 5
    python = 'cp{}{}'.format(*sys.version_info)
    assert all(folder.parent == tmp_path / 'cache' / 'wheels' for folder in folders)
    assert all(python in folder.name for folder in folders)


def test_a_wheel_is_built_once(fake):
    for _ in range(2):
        fake.provide('mmcv', '2.1.0', 'cpu')
    assert fake.calls == ['cpu unity', 'install works', 'install works']


@pytest.mark.parametrize('damage', ['truncated', 'of another torch'])
def test_a_wheel_that_does_not_work_is_built_again(fake, build_mmcv, capsys, damage):
    folder = build_mmcv.wheel_folder('mmcv', '2.1.0', build_mmcv.torch.__version__, 'cpu')
    folder.mkdir(parents=True)
    (folder / 'mmcv.whl').write_text(damage)
    fake.provide('mmcv', '2.1.0', 'cpu')
    assert fake.calls == [f'install {damage}', 'cpu unity', 'install works']
    assert (folder / 'mmcv.whl').read_text() == 'works'
    assert f'it is {damage}' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('ops', 'outcomes', 'builds'),
    [
        ('cpu', ['clash'], ['cpu unity', 'cpu plain']),
        ('cpu', ['wrong'], ['cpu unity', 'cpu plain']),
        ('cu13.0-sm90', [], ['cu13.0-sm90 plain']),
        ('cu13.0-sm90', ['clash'], ['cu13.0-sm90 plain', 'cpu unity']),
    ],
)
def test_another_build_where_one_fails(fake, capsys, ops, outcomes, builds):
    fake.outcomes += outcomes
    fake.provide('mmcv', '2.1.0', ops)
    assert [call for call in fake.calls if not call.startswith('install')] == builds
    assert len(capsys.readouterr().out.splitlines()) == len(outcomes), 'one line says so'


def test_a_fresh_wheel_that_does_not_work_is_not_kept(fake, build_mmcv):
    fake.outcomes += ['wrong', 'wrong']
    with pytest.raises(RuntimeError, match='it is wrong'):
        fake.provide('mmcv', '2.1.0', 'cpu')
    assert not list(Path(os.environ['IDLEVIT_MM_CACHE']).rglob('*.whl'))


def test_sources_are_included_into_few_files(build_mmcv, tmp_path):
    top = tmp_path / 'mmcv' / 'ops' / 'csrc' / 'pytorch'
    (top / 'cpu').mkdir(parents=True)
    for name in ('nms', 'psamask', 'pybind', 'cpu/nms', 'cpu/psamask', 'cpu/deform_conv'):
        (top / f'{name}.cpp').touch()
    build_mmcv.unify(tmp_path)
    assert {path.name for path in top.glob('*.cpp')} == {'unity.cpp', 'pybind.cpp'}
    assert {path.name for path in top.glob('cpu/*.cpp')} == {'unity.cpp', 'psamask.cpp'}
    included = re.findall('#include "(.*)"', (top / 'unity.cpp').read_text())
    assert included == ['nms.inc', 'psamask.inc']
    assert all((top / name).is_file() for name in included)


@pytest.mark.parametrize(
    ('said', 'remedy'),
    [
        ("error: command 'g++' failed: No such file or directory", 'apt install g++'),
        ('x.cpp:1: fatal error: Python.h: No such file or directory', 'python3-dev'),
        ('OSError: [Errno 28] No space left on device', 'make room'),
        ('c++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('ERROR: No matching distribution found for mmcv==2.1.0', 'pip config list'),
    ],
)
def test_a_known_failure_ends_in_one_line_with_its_remedy(build_mmcv, tmp_path, said, remedy):
    code = f'print({said!r}); raise SystemExit(1)'
    with pytest.raises(SystemExit) as error:
        build_mmcv.run([sys.executable, '-c', code], tmp_path / 'log', {}, 'mmcv 2.1.0')
    assert remedy in str(error.value)
    assert '\n' not in str(error.value)
    assert said in (tmp_path / 'log').read_text()


def test_progress_and_unknown_failures(build_mmcv, tmp_path, capsys):
    code = "print('[1/2] c++ a.cpp'); print('error: a clash'); print('[2/2] c++ b.cpp'); exit(1)"
    with pytest.raises(RuntimeError, match='error: a clash'):
        build_mmcv.run([sys.executable, '-c', code], tmp_path / 'log', {}, 'mmcv 2.1.0')
    assert 'mmcv 2.1.0: 2 of 2 files, 0 s' in capsys.readouterr().out


def test_compilers_fit_cores_and_memory(build_mmcv, monkeypatch):
    assert 1 <= build_mmcv.compile_jobs() <= os.cpu_count()
    with pytest.raises(SystemExit, match="IDLEVIT_MM_OPS is 'gpu': cpu and cuda are allowed"):
        build_mmcv.choose_ops('gpu')
    assert build_mmcv.choose_ops('cpu') == 'cpu'


# ------------------------------------------------------------------------------------- setup.sh

UV = """#!/bin/bash
echo "$* index=$UV_DEFAULT_INDEX links=$UV_FIND_LINKS" >>calls
case $1 in
  python) echo "$FAKES/python3" ;;
  venv) mkdir -p "${@: -1}/bin" && cp "$FAKES/python3" "${@: -1}/bin/python" ;;
  cache) echo "$FAKES" ;;
esac
"""
PYTHON = f"""#!/bin/bash
case "$*" in
  *'pip config list'*)
    echo "global.index-url='https://mirror/simple'"
    echo ":env:.find-links='/a /b'" ;;
  *build_mmcv.py*)
    mkdir -p "$(dirname "$0")/../lib/python3.11/site-packages/mmcv"
    touch "$(dirname "$0")/../lib/python3.11/site-packages/mmcv/_ext.so" ;;
  *sysconfig*|*cp%d*) exec {sys.executable} -S "$@" ;;
esac
"""
COMMANDS = 'awk bash cat cksum cp df dirname flock grep head mkdir rm sed tail touch'


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose uv and Python only note what they are asked for."""
    root, fakes = tmp_path / 'checkout', tmp_path / 'fakes'
    for folder in (root / 'tools', root / 'idlevit_mm', fakes / 'archive-v0'):
        folder.mkdir(parents=True)
    for name in ('uv.lock', 'setup.py', 'tools/setup.sh', 'tools/build_mmcv.py'):
        shutil.copy2(ROOT / name, root / name)
    for name, text in (('uv', UV), ('python3', PYTHON), ('c++', '#!/bin/bash\n')):
        (fakes / name).write_text(text)
        (fakes / name).chmod(0o755)
    for name in COMMANDS.split():
        (fakes / name).symlink_to(shutil.which(name))

    def set_up(stack='openmmlab', **env):
        (root / 'calls').write_text('')
        env = {'PATH': str(fakes), 'FAKES': str(fakes), 'HOME': str(tmp_path), **env}
        command = [str(fakes / 'bash'), 'tools/setup.sh', stack]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        return done.returncode, done.stderr, (root / 'calls').read_text().splitlines()

    return SimpleNamespace(root=root, fakes=fakes, set_up=set_up)


@pytest.mark.parametrize('stack', list(STACKS))
def test_set_up_once(checkout, stack):
    venv, mmcv = STACKS[stack]
    status, errors, calls = checkout.set_up(stack)
    assert (status, errors) == (0, '')
    assert f'--group {stack} ' in calls[0]
    assert f'--no-emit-package {mmcv} ' in calls[0]
    assert any(call.startswith(f'pip install --python {venv}') for call in calls)
    assert all(call.endswith('index=https://mirror/simple links=/a,/b') for call in calls)
    assert checkout.set_up(stack) == (0, '', []), 'there is nothing to do'
    (checkout.root / 'uv.lock').write_text('changed')
    assert checkout.set_up(stack)[2], 'there is something to do'


def test_an_interrupted_set_up_starts_over(checkout):
    venv = checkout.root / '.venv'
    (checkout.fakes / 'c++').unlink()
    assert checkout.set_up()[0] == 1
    (venv / 'half').touch()
    (checkout.fakes / 'c++').touch(0o755)
    assert checkout.set_up()[0] == 0
    assert not (venv / 'half').exists()


def test_an_environment_keeps_its_python(checkout):
    python = str(checkout.fakes / 'python3')
    venv = checkout.root / '.venv'
    assert f'--python {python} .venv' in checkout.set_up(PYTHON=python)[2][1]
    (venv / 'mine').touch()
    assert checkout.set_up() == (0, '', [])
    (checkout.root / 'uv.lock').write_text('changed')
    assert not any(call.startswith('venv') for call in checkout.set_up()[2])
    assert (venv / 'mine').exists(), 'it was brought up to date'
    assert checkout.set_up(PYTHON='python3')[0] == 0
    assert not (venv / 'mine').exists(), 'it was made anew'


def one_line(errors):
    assert errors.startswith('Set-up stopped: ')
    assert errors.count('\n') == 1
    return errors


def test_an_environment_of_somebody_else_is_left_alone(checkout):
    (checkout.root / '.venv' / 'mine').mkdir(parents=True)
    status, errors, _ = checkout.set_up()
    assert status == 1
    assert 'move it away' in one_line(errors)
    assert (checkout.root / '.venv' / 'mine').exists()


def test_what_is_missing_is_told_before_any_download(checkout):
    (checkout.fakes / 'c++').unlink()
    status, errors, calls = checkout.set_up()
    assert status == 1
    assert 'apt install g++' in one_line(errors)
    assert not any(call.startswith('pip') for call in calls)

    assert 'openmmlab and onedl are' in one_line(checkout.set_up('other')[1])


def test_help_of_make_names_the_targets():
    done = subprocess.run(['make', '-C', ROOT, 'help'], capture_output=True, text=True, check=True)
    names = re.findall(r'^  make (\S+)', done.stdout, flags=re.MULTILINE)
    assert {'setup', 'setup-onedl', 'demo', 'test', 'lint', 'doctor', 'clean'} <= set(names)


def test_the_citation_names_this_version_and_ci_calls_what_ci_runs():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == __version__
    assert [one['url'] for one in citation['references']] == [
        f'https://arxiv.org/abs/{number}'
        for number in ('2310.05654', '2202.07800', '2108.01390', '2303.17605')
    ]
    workflow = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())
    assert workflow['jobs']['ci']['steps'][-1] == {'run': 'bash .ci/run'}
