"""The doctor: it never crashes, and it names the first thing that is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from idlevit_mm.engine import doctor

ROOT = Path(__file__).resolve().parents[2]


def fine_answers(**changes):
    answers = {name: {'value': '1.0'} for name in doctor.PROBES}
    answers['idlevit_mm'] = {'value': ['IdleSwinTransformer']}
    answers['cuda'] = {'value': {'built': '13.0', 'devices': [], 'cudnn': None}}
    answers['backends'] = {'value': ['gloo']}
    return {**answers, **changes}


def fine_versions(**changes):
    versions = {name: {packages[0]: '1.0'} for name, packages in doctor.PROVIDERS.items()}
    return {**versions, **changes}


def missing(name):
    return {'error': f"ModuleNotFoundError: No module named '{name}'", 'missing': name}


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_nothing_is_wrong_with_a_good_environment():
    answers, versions = fine_answers(), fine_versions()
    findings = doctor.check_packages(answers, versions) + doctor.check_ops(answers, versions)
    assert {finding.status for finding in findings} == {doctor.OK}
    assert doctor.verdict(findings) == ('Nothing is wrong.', 0)


@pytest.mark.parametrize(
    ('name', 'status'), [('torch', 'wrong'), ('mmengine', 'wrong'), ('mmdet', 'note')]
)
def test_missing_packages(name, status):
    findings = doctor.check_packages(
        fine_answers(**{name: missing(name)}), fine_versions(**{name: {}})
    )
    finding = by_name(findings)[name]
    assert finding.status == status
    assert 'pip install' in finding.remedy
    assert doctor.verdict(findings)[1] == (status == 'wrong')


def test_a_package_that_lacks_another_one_names_it():
    answers = fine_answers(mmseg=missing('ftfy'))
    finding = by_name(doctor.check_packages(answers, fine_versions()))['mmseg']
    assert finding.status == doctor.WRONG
    assert 'ftfy' in finding.remedy


OFFICIAL = {'mmengine': 'mmengine', 'mmcv': 'mmcv', 'mmdet': 'mmdet', 'mmseg': 'mmsegmentation'}
FORKS = {
    'mmengine': 'onedl-mmengine',
    'mmcv': 'onedl-mmcv',
    'mmdet': 'onedl-mmdetection',
    'mmseg': 'onedl-mmsegmentation',
}


def stack_versions(packages):
    return fine_versions(**{name: {package: '1.0'} for name, package in packages.items()})


@pytest.mark.parametrize(
    ('packages', 'title', 'target'),
    [(OFFICIAL, 'OpenMMLab', "'make setup'"), (FORKS, 'onedl-', "'make setup-onedl'")],
    ids=['official', 'forks'],
)
def test_either_stack_is_recognised(packages, title, target):
    versions = stack_versions(packages)
    stack = by_name(doctor.check_packages(fine_answers(), versions))['stack']
    assert stack.status == doctor.OK
    assert title in stack.value
    for name, package in packages.items():
        rest = {**versions, name: {}}
        found = by_name(doctor.check_packages(fine_answers(**{name: missing(name)}), rest))[name]
        assert target in found.remedy
        assert package in found.remedy


@pytest.mark.parametrize('name', list(OFFICIAL))
def test_two_packages_in_one_folder_are_wrong(name):
    both = {OFFICIAL[name]: '0.10.7', FORKS[name]: '0.10.12'}
    versions = {**stack_versions(OFFICIAL), name: both}
    findings = doctor.check_packages(fine_answers(), versions)
    found = by_name(findings)
    assert found[name].status == doctor.WRONG
    assert 'overwrite each other' in found[name].value
    assert f'{FORKS[name]} 0.10.12' in found[name].value
    assert found['stack'].status == doctor.WRONG
    assert doctor.verdict(findings)[0].count('mixed') == 1, 'the first thing that is wrong'


@pytest.mark.parametrize('broken', [False, True])
@pytest.mark.parametrize('name', list(OFFICIAL))
def test_packages_of_both_stacks_are_told(name, broken):
    versions = stack_versions({**OFFICIAL, name: FORKS[name]})
    error = {'error': 'AssertionError: MMCV==2.3.6 is used but incompatible'}
    answers = fine_answers(mmdet=error) if broken else fine_answers()
    stack = by_name(doctor.check_packages(answers, versions))['stack']
    assert stack.status == (doctor.WRONG if broken else doctor.NOTE)
    assert FORKS[name] in stack.value
    assert all(package in stack.remedy for package in (FORKS[name], 'pip uninstall'))


def test_forks_are_named():
    versions = fine_versions(mmdet={'onedl-mmdetection': '3.4.0'})
    finding = by_name(doctor.check_packages(fine_answers(), versions))['mmdet']
    assert finding.status == doctor.OK
    assert finding.value == 'onedl-mmdetection 3.4.0'


@pytest.mark.parametrize(('mmdet', 'status'), [({}, 'note'), ({'mmdet': '3.3.0'}, 'wrong')])
def test_mmcv_lite_is_enough_without_mmdet(mmdet, status):
    answers = fine_answers(**{'ops on cpu': missing('mmcv._ext')})
    versions = fine_versions(mmcv={'mmcv-lite': '2.1.0'}, mmdet=mmdet)
    assert doctor.check_ops(answers, versions)[0].status == status


def test_ops_of_another_torch_are_wrong():
    answers = fine_answers(**{'ops on cpu': {'error': 'ImportError: undefined symbol: _ZN2at'}})
    finding = doctor.check_ops(answers, fine_versions())[0]
    assert finding.status == doctor.WRONG
    assert 'another torch' in finding.remedy


def test_a_device_without_cuda_ops_is_wrong():
    cuda = {'value': {'built': '13.0', 'devices': ['a GPU, 80 GiB'], 'cudnn': 91900}}
    answers = fine_answers(cuda=cuda, **{'ops on cuda': {'error': 'no implementation for cuda:0'}})
    findings = by_name(doctor.check_ops(answers, fine_versions()))
    assert findings['device 0'].value == 'a GPU, 80 GiB'
    assert findings['mmcv.ops on CUDA'].status == doctor.WRONG


def test_the_first_wrong_thing_comes_last_on_the_screen(capsys):
    findings = [
        doctor.Finding('A', 'one', 'fine'),
        doctor.Finding('A', 'two', 'broken', doctor.WRONG, 'mend it'),
        doctor.Finding('B', 'three', 'broken too', doctor.WRONG, 'mend that'),
    ]
    for plain in (True, False):
        assert doctor.print_report(findings, plain) == 1
        text = capsys.readouterr().out
        assert text.rstrip().endswith('Wrong: two: broken\nWhat to do: mend it')
        assert '2 things are wrong' in text
        assert 'three' in text


# A child that stands for a broken installation: what it does depends on the probe's name.
CHILD = """
import json, os, signal, sys
for name in sys.argv[1:]:
    print(json.dumps({'begin': name}), flush=True)
    if name == 'crash':
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == 'exit':
        sys.exit(7)
    print('noise, [1, 2]', flush=True)
    print(json.dumps({'end': name, 'value': name.upper()}), flush=True)
"""


def test_a_crash_costs_only_its_own_answer():
    answers = doctor.ask(['a', 'crash', 'b', 'exit', 'c'], [sys.executable, '-c', CHILD])
    assert {name: answer.get('value') for name, answer in answers.items()} == {
        'a': 'A',
        'crash': None,
        'b': 'B',
        'exit': None,
        'c': 'C',
    }
    assert 'signal 11' in answers['crash']['error']
    assert 'exit status 7' in answers['exit']['error']


def test_an_interpreter_that_does_not_start_is_an_answer():
    assert doctor.ask(['a', 'b'], ['/no/such/python']).keys() == {'a', 'b'}


def test_exceptions_of_any_kind_are_answers(monkeypatch, tmp_path):
    def leave():
        raise SystemExit(3)

    monkeypatch.setattr(doctor, 'PROBES', {'leave': leave, 'work': lambda: 5})
    with (tmp_path / 'out').open('w+') as stream:
        doctor.run_probes(['leave', 'work'], stream)
        stream.seek(0)
        messages = [json.loads(line) for line in stream]
    assert messages[1]['error'] == 'SystemExit: 3'
    assert messages[3] == {'end': 'work', 'value': 5}


def test_data_sets(tmp_path):
    folder = tmp_path / 'digit_scenes' / 'coco'
    for part in ('annotations', 'train', 'val'):
        (folder / part).mkdir(parents=True)
    (folder / 'train' / '1.jpg').touch()
    (folder / 'annotations' / 'instances_train.json').touch()
    findings = by_name(doctor.check_data(tmp_path))
    assert findings['COCO'].status == doctor.NOTE
    digits = findings['digit scenes, COCO layout']
    assert digits.status == doctor.NOTE
    assert 'instances_val.json missing' in digits.value
    (folder / 'annotations' / 'instances_val.json').touch()
    digits = by_name(doctor.check_data(tmp_path))['digit scenes, COCO layout']
    assert digits.status == doctor.OK
    assert 'train 1, val 0' in digits.value
    assert doctor.verdict(list(findings.values()))[1] == 0, 'missing data is nothing broken'


def test_without_any_package_it_still_reports(tmp_path):
    subprocess.run(
        [sys.executable, '-m', 'venv', '--without-pip', str(tmp_path / 'bare')], check=True
    )
    done = subprocess.run(
        [str(tmp_path / 'bare' / 'bin' / 'python'), str(ROOT / 'tools' / 'doctor.py')],
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
