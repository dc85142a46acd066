"""The set-up's logic, without network, compiler or package index."""

import ast
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from idlevit_mm.engine import doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def env():
    spec = importlib.util.spec_from_file_location('setup_env', ROOT / 'tools' / 'setup_env.py')
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)


# ------------------------------------------------------------------------------ choosing Python


def python_info(version, venv=True, headers=True):
    return {'version': version, 'executable': 'x', 'venv': venv, 'headers': headers}


def test_takes_the_first_python_that_is_complete(env):
    pythons = {
        'python3.11': python_info([3, 11, 2], headers=False),
        'python3.12': python_info([3, 12, 1]),
        'python3': python_info([3, 13, 0]),
    }
    assert env.find_python(describe=pythons.get)['version'] == [3, 12, 1]


def test_takes_a_python_without_headers_when_there_is_no_other(env):
    pythons = {'python3.10': python_info([3, 10, 4], headers=False)}
    assert env.find_python(describe=pythons.get)['version'] == [3, 10, 4]


@pytest.mark.parametrize(
    ('info', 'why'),
    [
        (None, 'not found'),
        (python_info([3, 9, 18]), '3.9.18'),
        (python_info([3, 13, 0]), '3.13.0'),
        (python_info([3, 11, 2], venv=False), 'without the venv module'),
    ],
)
def test_refuses_a_python_that_was_asked_for_and_does_not_fit(env, info, why):
    pythons = {'mine': info, 'python3.11': python_info([3, 11, 2])}
    with pytest.raises(env.SetupError, match='PYTHON=mine') as caught:
        env.find_python('mine', pythons.get)
    assert why in caught.value.what
    assert 'PYTHON=' in caught.value.advice


def test_describes_the_running_python(env):
    info = env.describe_python(sys.executable)
    assert info['version'] == list(sys.version_info[:3])
    assert env.describe_python('no-such-python-anywhere') is None
    assert env.describe_python('false') is None


def test_can_be_started_by_any_python_from_3_8(env):
    source = (ROOT / 'tools' / 'setup_env.py').read_text(encoding='utf-8')
    ast.parse(source, feature_version=(3, 8))


# --------------------------------------------------------------------------------- requirements


def requirement_names(name):
    lines = (ROOT / 'requirements' / name).read_text(encoding='utf-8').splitlines()
    return [line.split('#')[0].strip() for line in lines if line.split('#')[0].strip()]


def test_every_requirement_is_pinned():
    pinned = {line.split('==')[0] for line in requirement_names('constraints.txt')}
    parts = [path.name for path in (ROOT / 'requirements').glob('*.txt')]
    assert {name for part in parts for name in requirement_names(part) if '=' not in name} <= pinned
    assert all('==' in line for line in requirement_names('constraints.txt'))


@pytest.mark.parametrize('python', ['3.10', '3.11', '3.12'])
def test_every_pin_is_unambiguous_for_each_python(python):
    from packaging.requirements import Requirement

    names = [
        requirement.name
        for requirement in map(Requirement, requirement_names('constraints.txt'))
        if not requirement.marker or requirement.marker.evaluate({'python_version': python})
    ]
    assert len(names) == len(set(names))
    assert 'numpy' in names


def test_reads_the_pins(env):
    pins = env.read_pins(ROOT / 'requirements' / 'constraints.txt')
    assert pins['torch'] == '2.11.0'
    assert pins['mmcv'] == '2.1.0'
    assert pins['onedl-mmcv'] == '2.3.6'
    assert 'numpy' not in pins, 'it is pinned per Python version'


def test_the_package_requires_nothing_that_pip_could_replace():
    """Neither it nor its extras name a stack, or keep a package below a version."""
    from packaging.requirements import Requirement

    tree = ast.parse((ROOT / 'setup.py').read_text(encoding='utf-8'))
    keywords = {
        keyword.arg: keyword.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'setup'
        for keyword in node.keywords
    }
    assert ast.literal_eval(keywords['install_requires']) == []
    extras = ast.literal_eval(keywords['extras_require'])
    owned = {package for packages in doctor.PROVIDERS.values() for package in packages}
    owned |= {'openmim', 'onedl-mim'}
    for requirement in (Requirement(text) for texts in extras.values() for text in texts):
        assert requirement.name not in owned - {'timm'}
        assert {bound.operator for bound in requirement.specifier} <= {'>=', '!='}


def test_the_stacks_share_nothing_but_the_import_names(env):
    """A package that both listed would make one environment depend on the other's pins."""
    assert set(env.STACKS) == {'openmmlab', 'onedl'}
    lists = []
    for stack in env.STACKS.values():
        names = {*requirement_names(f'{stack.name}.txt'), *requirement_names(f'{stack.mmcv}.txt')}
        assert {stack.mmcv, stack.mmdet, stack.mmseg} < names
        assert all(name.startswith('onedl-') == (stack.name == 'onedl') for name in names)
        lists.append(names)
    assert not lists[0] & lists[1]
    assert len({stack.venv for stack in env.STACKS.values()}) == 2


# ---------------------------------------------------------------------------------------- state


def test_keys_change_with_own_files_and_with_earlier_steps(env, tmp_path):
    (tmp_path / 'a').write_text('1')
    (tmp_path / 'b').write_text('1')
    files = {'one': ('a',), 'two': ('b',), 'three': ()}
    before = env.chain_keys(files, ['3.11'], tmp_path)
    assert env.chain_keys(files, ['3.11'], tmp_path) == before
    (tmp_path / 'b').write_text('2')
    after = env.chain_keys(files, ['3.11'], tmp_path)
    assert [after[name] == before[name] for name in files] == [True, False, False]
    other = env.chain_keys(files, ['3.12'], tmp_path)
    assert not set(other.values()) & set(after.values())


def test_a_step_that_starts_takes_back_the_later_ones(env, tmp_path):
    path = tmp_path / 'state.json'
    state = env.State(path)
    for name in ('one', 'two', 'three'):
        assert not state.begin(name, ['one', 'two', 'three'])
        state.finish(name, 'key ' + name)
    assert not env.State(path).begin('two', ['one'])
    again = env.State(path)
    assert again.steps == {'one': 'key one'}
    assert again.running == 'two'
    assert again.begin('two', ['one']), 'it was begun before and not finished'


@pytest.mark.parametrize('text', ['', '{', '[]', '{"steps": 3}', 'null'])
def test_a_damaged_state_counts_as_nothing_done(env, tmp_path, text):
    path = tmp_path / 'state.json'
    path.write_text(text)
    assert env.State(path).steps == {}


# -------------------------------------------------------------------------- half-installed packages


def write_package(site, name, files, recorded=None):
    info = site / f'{name}-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Name: {name}\nVersion: 1.0\n')
    lines = []
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
        lines.append(f'{path},sha256=x,{len(text)}')
    lines += recorded or []
    (info / 'RECORD').write_text('\n'.join([*lines, f'{info.name}/RECORD,,']) + '\n')
    return info


def test_forgets_packages_that_were_left_incomplete(env, tmp_path):
    whole = write_package(tmp_path, 'whole', {'whole/a.py': 'x = 1', 'whole/b,c.py': 'y'})
    cut = write_package(tmp_path, 'cut', {'cut/a.py': 'x = 1'})
    (tmp_path / 'cut' / 'a.py').write_text('x')
    gone = write_package(tmp_path, 'gone', {}, recorded=['gone/a.py,sha256=x,5'])
    unrecorded = write_package(tmp_path, 'unrecorded', {'unrecorded.py': ''})
    (unrecorded / 'RECORD').unlink()
    (tmp_path / '~orch').mkdir()

    assert env.heal_site_packages(tmp_path) == ['cut-1.0', 'gone-1.0', 'unrecorded-1.0']
    assert whole.is_dir()
    assert not any(folder.exists() for folder in (cut, gone, unrecorded, tmp_path / '~orch'))


def test_files_that_two_packages_own_may_have_either_size(env, tmp_path):
    write_package(tmp_path, 'opencv_python', {'cv2/cv2.so': 'with windows'})
    write_package(tmp_path, 'opencv_python_headless', {'cv2/cv2.so': 'headless'})
    assert env.heal_site_packages(tmp_path) == []


def test_missing_bytecode_is_no_damage(env, tmp_path):
    write_package(tmp_path, 'whole', {'a.py': ''}, recorded=['__pycache__/a.cpython-311.pyc,,'])
    assert env.heal_site_packages(tmp_path) == []


# ----------------------------------------------------------------------------------- wheel cache


def test_cache_folder(env, tmp_path):
    home, xdg, own = tmp_path / 'home', tmp_path / 'xdg', tmp_path / 'own'
    names = {'HOME': str(home)}
    assert env.cache_root(names, tmp_path / 'f') == home / '.cache' / 'idlevit_mm'
    names['XDG_CACHE_HOME'] = str(xdg)
    assert env.cache_root(names, tmp_path / 'f') == xdg / 'idlevit_mm'
    names['IDLEVIT_MM_CACHE'] = str(own)
    assert env.cache_root(names, tmp_path / 'f') == own
    assert env.cache_root({}, tmp_path / 'f') == tmp_path / 'f'


def test_cache_folder_that_cannot_be_written(env, tmp_path):
    file = tmp_path / 'file'
    file.write_text('')
    assert env.cache_root({'HOME': str(file)}, tmp_path / 'f') == tmp_path / 'f'
    with pytest.raises(env.SetupError, match='IDLEVIT_MM_CACHE'):
        env.cache_root({'IDLEVIT_MM_CACHE': str(file / 'x')}, tmp_path / 'f')


def test_wheel_key_tells_every_build_apart(env):
    builds = [
        ('mmcv', '2.1.0', '2.11.0+cu130', (3, 11), 'cpu'),
        ('onedl-mmcv', '2.1.0', '2.11.0+cu130', (3, 11), 'cpu'),
        ('mmcv', '2.1.1', '2.11.0+cu130', (3, 11), 'cpu'),
        ('mmcv', '2.1.0', '2.11.0+cpu', (3, 11), 'cpu'),
        ('mmcv', '2.1.0', '2.11.0+cu130', (3, 12), 'cpu'),
        ('mmcv', '2.1.0', '2.11.0+cu130', (3, 11), 'cu130-sm90'),
    ]
    keys = [env.wheel_key(*build) for build in builds]
    assert len(set(keys)) == len(builds)
    assert all('/' not in key for key in keys)


def write_wheel(path, names=('mmcv/__init__.py', 'mmcv/_ext.cpython-311-x86_64-linux-gnu.so')):
    with zipfile.ZipFile(path, 'w') as archive:
        for name in names:
            archive.writestr(name, 'x' * 1000)
    return path


def test_a_wheel_that_is_damaged_or_has_no_ops_is_noticed(env, tmp_path):
    whole = write_wheel(tmp_path / 'whole.whl')
    assert env.wheel_problem(whole) == ''
    data = whole.read_bytes()
    cut = tmp_path / 'cut.whl'
    cut.write_bytes(data[: len(data) // 2])
    assert env.wheel_problem(cut)
    flipped = tmp_path / 'flipped.whl'
    flipped.write_bytes(data.replace(b'xxxx', b'yyyy', 1))
    assert 'damaged' in env.wheel_problem(flipped) or 'CRC' in env.wheel_problem(flipped)
    lite = write_wheel(tmp_path / 'lite.whl', ['mmcv/__init__.py'])
    assert 'no compiled ops' in env.wheel_problem(lite)
    assert env.wheel_problem(tmp_path / 'none.whl')


@pytest.mark.parametrize(
    ('seen', 'choice', 'toolkit', 'variant'),
    [
        ([], 'auto', '13.0', 'cpu'),
        (['90'], 'auto', '', 'cpu'),
        (['90'], 'auto', '12.8', 'cpu'),
        (['90'], 'auto', '13.1', 'cu130-sm90'),
        (['80', '90'], 'cuda', '13.0', 'cu130-sm80-sm90'),
        (['90'], 'cpu', '13.0', 'cpu'),
    ],
)
def test_which_ops_are_built(env, seen, choice, toolkit, variant):
    info = {'cuda': '13.0', 'cuda_home': '/cuda', 'capabilities': seen}
    assert env.cuda_variant(info, choice, lambda home: toolkit) == variant


def test_cuda_ops_that_cannot_be_built_are_refused_when_asked_for(env):
    info = {'cuda': '13.0', 'cuda_home': None, 'capabilities': []}
    with pytest.raises(env.SetupError, match='no GPU'):
        env.cuda_variant(info, 'cuda', lambda home: '')
    with pytest.raises(env.SetupError, match="'gpu'"):
        env.cuda_variant(info, 'gpu', lambda home: '')


@pytest.mark.parametrize(
    ('text', 'cores', 'gigabytes', 'jobs'),
    [('', 8, 64, 8), ('', 8, 7, 3), ('', 4, 1, 1), ('5', 2, 1, 5)],
)
def test_compilers_at_once(env, text, cores, gigabytes, jobs):
    assert env.compile_jobs({'MAX_JOBS': text}, cores, gigabytes * 1024**3) == jobs


@pytest.mark.parametrize('text', ['0', 'many', '-1', '1.5'])
def test_max_jobs_must_be_a_number(env, text):
    with pytest.raises(env.SetupError, match='MAX_JOBS'):
        env.compile_jobs({'MAX_JOBS': text}, 2, 2**34)


def test_a_lock_is_waited_for(env, tmp_path):
    order, waited = [], []
    with env.FileLock(tmp_path / 'a' / 'lock', lambda holder: None):

        def second():
            with env.FileLock(tmp_path / 'a' / 'lock', waited.append):
                order.append('second')

        thread = threading.Thread(target=second)
        thread.start()
        wait_until(lambda: waited)
        order.append('first')
    thread.join(timeout=20)
    assert order == ['first', 'second']
    assert waited[0] == str(os.getpid())


# ------------------------------------------------------------------- the cached wheel is provided


class FakeMmcv:
    """Stands for pip, the compiler and the check of the result."""

    def __init__(self, env, tmp_path, monkeypatch, stack):
        monkeypatch.setenv('IDLEVIT_MM_CACHE', str(tmp_path / 'cache'))
        (tmp_path / 'requirements').mkdir(exist_ok=True)
        pins = f'{stack.mmcv}==2.1.0\ntorch==2.11.0\n'
        (tmp_path / 'requirements' / 'constraints.txt').write_text(pins)
        self.setup = env.Setup(tmp_path, progress=env.Progress(7, io.StringIO()), stack=stack)
        self.setup.base = {'version': [3, 11, 7]}
        self.info = {'torch': '2.11.0+cu130'}
        self.built, self.installed, self.useless = [], [], set()
        self.env = env
        monkeypatch.setattr(self.setup, '_install_wheel', self.install)
        monkeypatch.setattr(self.setup, '_mmcv_problem', self.problem)
        monkeypatch.setattr(self.setup, '_build_mmcv', self.build)
        key = env.wheel_key(stack.mmcv, '2.1.0', '2.11.0+cu130', (3, 11), 'cpu')
        self.wheel = tmp_path / 'cache' / 'wheels' / key / 'mmcv-2.1.0.whl'

    def install(self, wheel):
        self.installed.append(wheel.read_bytes())

    def problem(self, variant):
        return 'undefined symbol' if self.installed[-1] in self.useless else ''

    def build(self, folder, work, variant):
        self.built.append(variant)
        return write_wheel(folder / 'mmcv-2.1.0.whl')

    def provide(self):
        return self.setup._provide_mmcv(self.info, 'cpu')


@pytest.fixture(params=['openmmlab', 'onedl'])
def stack(env, request):
    return env.STACKS[request.param]


@pytest.fixture
def mmcv(env, tmp_path, monkeypatch, stack):
    return FakeMmcv(env, tmp_path, monkeypatch, stack)


def test_builds_once_and_then_takes_the_wheel_from_the_cache(mmcv):
    assert mmcv.provide() == 'done'
    assert mmcv.wheel.is_file()
    assert mmcv.provide() == 'done, from the cache'
    assert mmcv.built == ['cpu']
    assert len(mmcv.installed) == 2


def test_a_truncated_wheel_is_built_again_without_being_installed(mmcv):
    mmcv.wheel.parent.mkdir(parents=True)
    mmcv.wheel.write_bytes(b'PK but not a wheel')
    assert mmcv.provide() == 'done'
    assert mmcv.built == ['cpu']
    assert len(mmcv.installed) == 1
    assert 'of no use' in mmcv.setup.progress.stream.getvalue()


def test_a_wheel_of_another_torch_is_built_again(mmcv):
    mmcv.wheel.parent.mkdir(parents=True)
    write_wheel(mmcv.wheel, ['mmcv/_ext.abi3.so'])
    mmcv.useless.add(mmcv.wheel.read_bytes())
    assert mmcv.provide() == 'done'
    assert mmcv.built == ['cpu']
    assert 'undefined symbol' in mmcv.setup.progress.stream.getvalue()


def test_a_fresh_wheel_that_does_not_work_is_not_kept(mmcv, monkeypatch):
    monkeypatch.setattr(mmcv.setup, '_mmcv_problem', lambda variant: 'undefined symbol')
    with pytest.raises(mmcv.env.SetupError, match='undefined symbol'):
        mmcv.provide()
    assert mmcv.built == ['cpu'], 'it is compiled once, not for ever'
    assert not mmcv.wheel.exists()


# ------------------------------------------------------------------------- running, and its end


def test_output_goes_to_the_log_and_to_the_listener(env, tmp_path):
    lines, log = [], tmp_path / 'logs' / 'x.log'
    code = 'import sys; print("out"); print("err", file=sys.stderr); sys.exit(3)'
    assert env.run_logged([sys.executable, '-c', code], log, lines.append) == 3
    assert sorted(lines) == ['err', 'out']
    text = log.read_text()
    assert 'out' in text
    assert 'exit status 3' in text


def test_an_interruption_ends_the_command_and_its_children(env, tmp_path):
    pid_file = tmp_path / 'pid'
    script = f'sleep 600 & echo $! > {pid_file}; wait'

    def on_tick():
        if pid_file.is_file() and pid_file.read_text().strip():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        env.run_logged(['sh', '-c', script], tmp_path / 'log', on_tick=on_tick)
    child = int(pid_file.read_text())

    def ended():
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return True
        # Where nobody reaps orphans, a process that has ended stays in the table.
        status = Path(f'/proc/{child}/stat')
        return status.is_file() and status.read_text().rsplit(')', 1)[1].split()[0] == 'Z'

    wait_until(ended)


def test_a_probe_tells_why_it_failed(env):
    assert env.probe(sys.executable, 'print(1 + 1)') == ('2\n', '')
    assert 'no module named' in env.probe(sys.executable, 'import no_such_module')[1].lower()
    crash = f'import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})'
    assert env.probe(sys.executable, crash)[1] == 'it crashed with signal 11'
    assert env.probe('/no/such/python', '')[1]


def test_nothing_from_outside_gets_onto_the_path_of_children(env, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', '/elsewhere')
    monkeypatch.setenv('PIP_INDEX_URL', "a mirror of one's own")
    found = env.clean_env({'MAX_JOBS': '1'})
    assert 'PYTHONPATH' not in found
    assert found['PIP_INDEX_URL'] == "a mirror of one's own", "pip's settings are the person's"
    assert found['MAX_JOBS'] == '1'


# --------------------------------------------------------------------- what the person gets to see


@pytest.mark.parametrize(
    ('log', 'advice'),
    [
        ('OSError: [Errno 28] No space left on device', 'disk is full'),
        ('c++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('fatal error: Python.h: No such file or directory', 'python3-dev'),
        ("error: command 'g++' failed: No such file or directory", 'C++ compiler'),
        ('/bin/sh: 1: c++: not found', 'C++ compiler'),
        ('SSLError(SSLCertVerificationError(1, ...))', 'certificate'),
        ('NewConnectionError: Failed to establish a new connection', 'network'),
        ('RuntimeError: operator torchvision::nms does not exist', '+cpu'),
        ('ERROR: No matching distribution found for torch==2.11.0', 'PYTHON='),
        ('something else', 'Read the log'),
    ],
)
def test_advice_for_known_failures(env, log, advice):
    assert advice in env.advice_for(log)


def test_a_failure_names_step_log_and_remedy(env, tmp_path):
    log = tmp_path / '5-mmcv.log'
    log.write_text('\n'.join(f'line {i}' for i in range(50)) + '\nNo space left on device\n')
    text = env.SetupError('pip ended with exit status 1', log=log).report('in step 5/7: mmcv')
    assert text.startswith('Set-up failed in step 5/7: mmcv\n')
    assert 'line 49' in text
    assert 'line 20\n' not in text
    assert str(log) in text
    assert 'The disk is full' in text


def test_progress_in_a_log_file(env):
    stream = io.StringIO()
    progress = env.Progress(7, stream, beat=0.0)
    progress.start(2, 'torch 2.11.0')
    progress.update('Downloading torch')
    progress.finish()
    progress.start(3, 'others')
    progress.finish('kept')
    lines = stream.getvalue().splitlines()
    assert lines[0] == '[2/7] torch 2.11.0 ... '
    assert lines[1].endswith('Downloading torch')
    assert lines[2].strip() == 'done (0 s)'
    assert lines[3] == '[3/7] others ... kept (0 s)'


def test_progress_on_a_terminal_stays_on_one_line(env):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = env.Progress(7, stream)
    progress.start(5, 'mmcv')
    for k in range(3):
        progress.update(f'compiled {k} of 77 files' + ' and more' * 100)
    progress.finish()
    assert stream.getvalue().count('\n') == 1
    assert stream.getvalue().endswith('[5/7] mmcv ... done (0 s)\n')
    assert max(map(len, stream.getvalue().split('\r'))) < 300


def test_compile_progress_reads_ninja(env):
    progress = env.CompileProgress()
    assert progress.text() == 'preparing'
    progress.feed("  building 'mmcv._ext' extension")
    assert 'compiling' in progress.text()
    for k in range(1, 6):
        progress.feed(f'  [{k}/77] c++ -MMD -MF x.d -c x.cpp -o x.o')
    assert progress.text().startswith('compiled 5 of 77 files, about ')
    progress.feed('  a warning: [9/99] is no progress')
    assert '5 of 77' in progress.text()
    progress.feed('  creating build/bdist.linux-x86_64')
    assert progress.text() == 'packing the wheel'


@pytest.mark.parametrize(
    ('seconds', 'text'), [(0, '0 s'), (59.4, '59 s'), (60, '1 min 00 s'), (545, '9 min 05 s')]
)
def test_durations(env, seconds, text):
    assert env.duration(seconds) == text


# ------------------------------------------------------------------------------- the whole set-up


STEPS = ('venv', 'torch', 'libraries', 'opencv', 'mmcv', 'package', 'check')


class Rehearsal:
    """A checkout whose steps only write down that they ran."""

    def __init__(self, env, root, monkeypatch, stack):
        self.env, self.root, self.stack, self.ran, self.failing = env, root, stack, [], ''
        for path in {path for paths in stack.files().values() for path in paths}:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text((ROOT / path).read_text(encoding='utf-8'))
        monkeypatch.setenv('IDLEVIT_MM_CACHE', str(root / 'cache'))
        monkeypatch.setattr(env, 'BYTES_NEEDED', 0)
        monkeypatch.setattr(env, 'find_compiler', lambda names: 'c++')
        info = env.describe_python(sys.executable) | {'headers': True, 'venv': True}
        monkeypatch.setattr(env, 'find_python', lambda wanted='': info)
        # The environment has the running Python as soon as it was made.
        monkeypatch.setattr(
            env,
            'describe_python',
            lambda command: info if Path(command).exists() else None,
        )
        for name in STEPS:
            monkeypatch.setattr(env.Setup, f'step_{name}', self.step(name))

    def step(self, name):
        def run(setup):
            self.ran.append(name)
            if name == 'venv':
                setup.state.made_here = True
            if name == self.failing:
                raise self.env.SetupError('it fails', 'try again')
            traces = [f'lib/python3.11/site-packages/{trace}'.replace('*', 'x')
                      for trace in setup.TRACES.get(name, ())]  # fmt: skip
            for trace in ['bin/python', *traces]:
                (setup.venv / trace).parent.mkdir(parents=True, exist_ok=True)
                (setup.venv / trace).touch()

        return run

    def set_up(self, **options):
        self.ran = []
        self.stream = io.StringIO()
        progress = self.env.Progress(7, self.stream)
        setup = self.env.Setup(self.root, progress=progress, stack=self.stack)
        return setup.run(**options)


@pytest.fixture
def rehearsal(env, tmp_path, monkeypatch, stack):
    return Rehearsal(env, tmp_path, monkeypatch, stack)


def test_runs_every_step_once(rehearsal):
    assert rehearsal.set_up()
    assert tuple(rehearsal.ran) == STEPS
    assert '[7/7] check of the whole ... done (0 s)' in rehearsal.stream.getvalue()
    assert not rehearsal.set_up()
    assert rehearsal.ran == []
    assert rehearsal.stream.getvalue() == ''
    assert rehearsal.set_up(force=True)
    assert tuple(rehearsal.ran) == STEPS


def test_goes_on_after_a_failure_where_it_failed(rehearsal):
    rehearsal.failing = 'mmcv'
    with pytest.raises(rehearsal.env.SetupError):
        rehearsal.set_up()
    assert tuple(rehearsal.ran) == STEPS[:5]
    rehearsal.failing = ''
    assert rehearsal.set_up()
    assert tuple(rehearsal.ran) == STEPS[4:]


@pytest.mark.parametrize(
    ('path', 'first'),
    [
        ('requirements/constraints.txt', 'torch'),
        ('requirements/dev.txt', 'libraries'),
        ('requirements/STACK.txt', 'libraries'),
        ('requirements/MMCV.txt', 'mmcv'),
        ('pyproject.toml', 'package'),
    ],
)
def test_repeats_what_a_changed_file_touches(rehearsal, path, first):
    rehearsal.set_up()
    path = path.replace('STACK', rehearsal.stack.name).replace('MMCV', rehearsal.stack.mmcv)
    with (rehearsal.root / path).open('a') as file:
        file.write('# changed\n')
    assert rehearsal.set_up()
    assert tuple(rehearsal.ran) == STEPS[STEPS.index(first) :]


def test_the_environments_of_both_stacks_stand_side_by_side(env, tmp_path, monkeypatch):
    rehearsals = [Rehearsal(env, tmp_path, monkeypatch, stack) for stack in env.STACKS.values()]
    for rehearsal in rehearsals:
        assert rehearsal.set_up()
    for rehearsal in rehearsals:
        assert not rehearsal.set_up()
        assert (tmp_path / rehearsal.stack.venv / env.STATE_NAME).is_file()


def test_notices_what_was_removed_by_hand(rehearsal):
    rehearsal.set_up()
    for path in rehearsal.root.glob(f'{rehearsal.stack.venv}/lib/*/site-packages/mmcv/_ext*'):
        path.unlink()
    assert rehearsal.set_up()
    assert tuple(rehearsal.ran) == STEPS[4:]


def test_leaves_an_environment_alone_that_somebody_else_made(rehearsal):
    keep = rehearsal.root / rehearsal.stack.venv / 'mine.txt'
    keep.parent.mkdir()
    keep.write_text('hours of work')
    with pytest.raises(rehearsal.env.SetupError, match='was not made by this set-up') as caught:
        rehearsal.set_up()
    assert 'remove it' in caught.value.advice
    assert keep.read_text() == 'hours of work'


def test_missing_compiler_is_noticed_before_anything_is_downloaded(rehearsal, monkeypatch):
    monkeypatch.setattr(rehearsal.env, 'find_compiler', lambda names: None)
    with pytest.raises(rehearsal.env.SetupError, match='no C\\+\\+ compiler'):
        rehearsal.set_up()
    assert rehearsal.ran == []


def test_full_disk_is_noticed_before_anything_is_downloaded(rehearsal, monkeypatch):
    monkeypatch.setattr(rehearsal.env, 'BYTES_NEEDED', 2**70)
    with pytest.raises(rehearsal.env.SetupError, match='are needed'):
        rehearsal.set_up()
    assert rehearsal.ran == []


def test_unusable_python_ends_with_a_message_not_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tools' / 'setup_env.py'), '--python', 'no-such-python'],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert 'PYTHON=no-such-python cannot be used' in done.stderr
    assert 'What to do:' in done.stderr
    assert 'Traceback' not in done.stderr


def test_help_of_make_names_the_targets():
    done = subprocess.run(
        ['make', '--no-print-directory', 'help'], cwd=ROOT, capture_output=True, text=True
    )
    names = [line.split()[1] for line in done.stdout.splitlines()]
    wanted = {'help', 'setup', 'setup-onedl', 'demo', 'test', 'test-onedl', 'lint', 'clean'}
    assert wanted <= set(names)


def test_state_file_is_json(rehearsal):
    rehearsal.set_up()
    venv = rehearsal.root / rehearsal.stack.venv
    state = json.loads((venv / rehearsal.env.STATE_NAME).read_text())
    assert set(state['steps']) == set(STEPS)
    assert state['running'] == ''
