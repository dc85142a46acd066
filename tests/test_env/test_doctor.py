"""The doctor: it never crashes, and it names the first thing that is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from idlevit_mm.engine import doctor

ROOT = Path(__file__).resolve().parents[2]
OFFICIAL = {'mmengine': 'mmengine', 'mmcv': 'mmcv', 'mmdet': 'mmdet', 'mmseg': 'mmsegmentation'}
FORKS = {
    'mmengine': 'onedl-mmengine',
    'mmcv': 'onedl-mmcv',
    'mmdet': 'onedl-mmdetection',
    'mmseg': 'onedl-mmsegmentation',
}


def examine(packages=OFFICIAL, errors=(), **versions):
    """Findings by name, for packages of a stack and errors of probes by import name."""
    found = {name: {owners[0]: '1.0'} for name, owners in doctor.PROVIDERS.items()}
    found |= {name: {package: '1.0'} for name, package in packages.items()} | versions
    errors = dict(errors)
    answers = {
        name: {'error': errors[name]} if name in errors else {'said': f'{name} works'}
        for name in doctor.PROBES
    }
    findings = list(doctor.check_packages(answers, found))
    return {finding.name: finding for finding in findings}, doctor.verdict(findings)


def missing(name):
    return f"ModuleNotFoundError: No module named '{name}'"


@pytest.mark.parametrize(
    ('packages', 'title', 'target'),
    [(OFFICIAL, 'OpenMMLab', "'make setup'"), (FORKS, 'onedl-', "'make setup-onedl'")],
    ids=['official', 'forks'],
)
def test_either_stack_is_recognised(packages, title, target):
    findings, closing = examine(packages)
    assert {finding.status for finding in findings.values()} == {doctor.OK}
    assert closing == ('Nothing is wrong.', 0)
    assert title in findings['stack'].value
    assert 'mmcv works' in findings['mmcv'].value
    for name, package in packages.items():
        finding = examine(packages, {name: missing(name)}, **{name: {}})[0][name]
        assert target in finding.remedy
        assert package in finding.remedy


@pytest.mark.parametrize(
    ('name', 'status'), [('torch', 'wrong'), ('mmengine', 'wrong'), ('mmdet', 'note')]
)
def test_missing_packages(name, status):
    findings, closing = examine(OFFICIAL, {name: missing(name)}, **{name: {}})
    assert (findings[name].value, findings[name].status) == ('not installed', status)
    assert 'pip install' in findings[name].remedy
    assert closing[1] == (status == 'wrong')


def test_a_package_that_lacks_another_one_names_it():
    finding = examine(OFFICIAL, {'mmseg': missing('ftfy')})[0]['mmseg']
    assert finding.status == doctor.WRONG
    assert 'the module ftfy' in finding.remedy


def test_packages_of_both_stacks_are_told():
    for name, fork in FORKS.items():
        both, closing = examine(**{name: {OFFICIAL[name]: '0.10.7', fork: '0.10.12'}})
        assert both[name].status == both['stack'].status == doctor.WRONG
        assert f'{fork} 0.10.12: they overwrite each other' in both[name].value
        assert closing[0].count('mixed') == 1, 'the first thing that is wrong'

        mixed = examine({**OFFICIAL, name: fork})[0]['stack']
        assert mixed.status == doctor.NOTE, 'it works'
        assert fork in mixed.value
        assert 'pip uninstall' in mixed.remedy
        assert fork in mixed.remedy
        error = {'mmdet': 'AssertionError: MMCV==2.3.6 is used but incompatible'}
        assert examine({**OFFICIAL, name: fork}, error)[0]['stack'].status == doctor.WRONG


@pytest.mark.parametrize(('mmdet', 'status'), [({}, 'note'), ({'mmdet': '3.3.0'}, 'wrong')])
def test_mmcv_lite_is_enough_without_mmdet(mmdet, status):
    errors, lite = {'mmcv': missing('mmcv._ext')}, {'mmcv-lite': '2.1.0'}
    assert examine(OFFICIAL, errors, mmcv=lite, mmdet=mmdet)[0]['mmcv'].status == status


def test_ops_of_another_torch_or_without_cuda_are_wrong():
    for error in ('ImportError: undefined symbol: _ZN2at', 'RuntimeError: no nms for cuda:0'):
        finding = examine(OFFICIAL, {'mmcv': error})[0]['mmcv']
        assert finding.status == doctor.WRONG
        assert error in finding.value
        assert '--no-build-isolation' in finding.remedy


def test_the_first_wrong_thing_comes_last_on_the_screen(capsys):
    findings = [
        doctor.Finding('A', 'one', 'fine'),
        doctor.Finding('A', 'two', 'broken', doctor.WRONG, 'mend it'),
        doctor.Finding('B', 'three', 'broken too', doctor.WRONG, 'mend that'),
    ]
    assert doctor.print_report(findings) == 1
    text = capsys.readouterr().out
    assert text.rstrip().endswith('Wrong: two: broken\nWhat to do: mend it')
    assert '2 things are wrong' in text
    assert '! three  broken too' in text


def test_a_crash_costs_only_its_own_answer():
    answers = doctor.ask(
        {
            'a': 'print("noise"); said = 5',
            'crash': 'import os; os.kill(os.getpid(), 11)',
            'raise': 'raise SystemExit(3)',
            'exit': 'import os; os._exit(7)',
            'b': 'import no_such_module',
        }
    )
    assert answers == {
        'a': {'said': '5'},
        'crash': {'error': 'it ended the interpreter with signal 11'},
        'raise': {'error': 'SystemExit: 3'},
        'exit': {'error': 'it ended the interpreter with exit status 7'},
        'b': {'error': "ModuleNotFoundError: No module named 'no_such_module'"},
    }


def test_without_any_package_it_still_reports(tmp_path):
    bare = tmp_path / 'bare'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', bare], check=True)
    done = subprocess.run(
        [bare / 'bin' / 'python', ROOT / 'tools' / 'doctor.py'],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={'PATH': os.environ.get('PATH', '')},
    )
    assert done.returncode == 1
    assert done.stderr == ''
    lines = done.stdout.rstrip().splitlines()
    assert lines[-2] == 'Wrong: torch: not installed'
    assert 'make setup' in lines[-1]
    assert any('mmdet' in line and 'not installed' in line for line in lines)
