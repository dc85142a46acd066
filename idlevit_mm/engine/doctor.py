"""Looks at an installation: versions, compiled ops, devices, and the first thing that is wrong.

Only the standard library is imported here, so that `tools/doctor.py` can load this file where
torch is missing or broken. What may crash is tried in a child process.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

OK, NOTE, WRONG = 'ok', 'note', 'wrong'

# Import name -> packages that provide it. More than one of a row overwrite each other's files.
PROVIDERS: Mapping[str, tuple[str, ...]] = {
    'torch': ('torch',),
    'torchvision': ('torchvision',),
    'numpy': ('numpy',),
    'cv2': (
        *('opencv-python-headless', 'opencv-python'),
        *('opencv-contrib-python-headless', 'opencv-contrib-python'),
    ),
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'timm': ('timm',),
    'idlevit_mm': ('idlevit_mm',),
}
OPENMMLAB = ('mmengine', 'mmcv', 'mmdet', 'mmseg')
# Without these the backbones do not even import.
NEEDED = ('torch', 'numpy', 'cv2', 'mmengine', 'mmcv', 'idlevit_mm')
# What a child process runs for each import name; what it leaves in `said` is part of the report.
PROBES = {
    **{name: f'import {name}' for name in ('numpy', 'cv2', 'timm')},
    'torch': 'import torch; said = "built as " + torch.__version__',
    'torchvision': 'import torch, torchvision.ops as ops; '
    'assert ops.nms(torch.ones(2, 4), torch.ones(2), 0.5).tolist() == [0, 1], "nms is wrong"',
    'mmengine': 'from mmengine.utils.dl_utils import collect_env; said = dict(collect_env())',
    'mmcv': """
import torch
from mmcv.ops import nms
boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 9.], [20., 20., 30., 30.]])
said = 'ops work on'
for device in ['cpu', 'cuda'][: 1 + torch.cuda.is_available()]:
    kept = nms(boxes.to(device), torch.tensor([.9, .8, .7]).to(device), 0.5)[1].tolist()
    assert kept == [0, 2], f'nms keeps {kept} instead of [0, 2] on {device}'
    said += ' ' + device""",
    'mmdet': 'import mmdet.apis',
    'mmseg': 'import mmseg.apis',
    'idlevit_mm': """
import idlevit_mm
from mmengine.registry import MODELS
from idlevit_mm.kernels.cpu import native
said = ', '.join(sorted(name for name in MODELS.module_dict if name.startswith('Idle')))
said += '; kernels of the CPU: ' + (native.why_not() or 'compiled')""",
}
# Anything may be raised by a package that is broken, and printed by any.
RUN = """
import json, sys
answers, sys.stdout = sys.stdout, sys.stderr
for name, code in json.loads(sys.argv[1]).items():
    scope = {'said': ''}
    try:
        exec(code, scope)
        answer = {'said': str(scope['said'])}
    except BaseException as error:
        answer = {'error': type(error).__name__ + ': ' + ' '.join(str(error).split())}
    print(json.dumps([name, answer]), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report: under which heading, what was looked at, and what was found."""

    section: str
    name: str
    value: str
    status: str = OK  # or NOTE (works, but something is missing), or WRONG
    remedy: str = ''


def ask(probes: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Runs probes in a child process: what they said or their error; a crash costs one answer."""
    answers: dict[str, dict[str, str]] = {}
    while rest := {name: code for name, code in probes.items() if name not in answers}:
        command = [sys.executable, '-c', RUN, json.dumps(rest)]
        child = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in child.stdout.splitlines() if line.startswith('["')]
        answers |= dict(map(json.loads, lines))
        if crashed := list(rest)[len(lines) :]:
            code = child.returncode
            how = f'signal {-code}' if code < 0 else f'exit status {code}'
            answers[crashed[0]] = {'error': f'it ended the interpreter with {how}'}
    return answers


def installed(names: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(Exception):  # a damaged package may raise anything
            found[name] = importlib.metadata.version(name)
    return found


def check_stack(packages: Sequence[str], harm: bool) -> Iterator[Finding]:
    """Tells which stack is installed: packages of two are made for others, and may do harm."""
    forks = [package for package in packages if package.startswith('onedl-')]
    own = [package for package in packages if package not in forks]
    stacks = {"OpenMMLab's own packages": own, 'the forks onedl-*': forks}
    parts = [f'{title} ({", ".join(names)})' for title, names in stacks.items() if names]
    remedy = (
        f"'pip uninstall {' '.join(packages)}', then install one stack: 'make setup' and "
        "'make setup-onedl' do so, each in an environment of its own"
    )
    if len(parts) == 1:
        yield Finding('Packages', 'stack', parts[0])
    elif parts:
        mixed = f'mixed: {" and ".join(parts)} have the same import names'
        yield Finding('Packages', 'stack', mixed, WRONG if harm else NOTE, remedy)


def check_packages(
    answers: Mapping[str, Mapping[str, str]], versions: Mapping[str, Mapping[str, str]]
) -> Iterator[Finding]:
    """Tells of each import name which package provides it, and whether it works.

    Args:
        answers: What the probes said, by import name.
        versions: By import name, the installed packages that provide it and their versions.
    """
    stack = [package for name in OPENMMLAB for package in versions[name]]
    onedl = bool(stack) and all(package.startswith('onedl-') for package in stack)
    harm = any(len(versions[name]) > 1 or 'error' in answers[name] for name in OPENMMLAB)
    yield from check_stack(stack, harm)
    special = {
        'torchvision': 'reinstall torch and torchvision together, from one index',
        'mmcv': "'pip install mmcv-lite' (backbones only), or build it for this torch: "
        f"'pip install --no-build-isolation {'onedl-' * onedl}mmcv'; on a GPU with nvcc",
        'mmseg': f"'pip install {'onedl-' * onedl}mmsegmentation ftfy regex'",
        'idlevit_mm': "'pip install -e .'",
    }
    for name, providers in PROVIDERS.items():
        found, said = versions[name], answers[name].get('said')
        error = answers[name].get('error', '')
        missing = (re.findall(r"No module named '([^']+)'", error) or [''])[0]
        label = ' + '.join(f'{package} {version}' for package, version in found.items())
        package = next((p for p in providers if p.startswith('onedl-') == onedl), providers[0])
        remedy = special.get(name, f"'pip install {package}'")
        remedy = f"in a checkout: 'make setup{'-onedl' * onedl}'; elsewhere: {remedy}"
        status, value = OK, f'{label}, {said}' if said else label
        if name != 'cv2' and len(found) > 1:
            # The OpenCV packages are often installed twice, and then one of them simply wins.
            status, value = WRONG, f'{label}: they overwrite each other'
            remedy = f"'pip uninstall {' '.join(found)}', then install one of them"
        elif missing == name and not found:
            status, value = WRONG if name in NEEDED else NOTE, 'not installed'
        elif missing == 'mmcv._ext' and 'mmcv-lite' in found:
            status = WRONG if versions['mmdet'] else NOTE
            value = f'{label}, without ops: backbones and segmentors only'
        elif error:
            status, value = WRONG, f'{label or "not installed"}; does not work: {error}'
            if missing and missing != name:
                remedy += f'; or install what provides the module {missing}'
        yield Finding('Packages', name, value, status, remedy)


def check_system(collected: str) -> Iterator[Finding]:
    """Tells about Python and the machine, of which mmengine has ``collected`` a dict's text."""
    yield Finding('System', 'platform', f'{platform.platform()}, {os.cpu_count()} cores')
    value = f'{platform.python_version()}, {sys.executable}'
    status = WRONG if sys.version_info < (3, 10) else NOTE if sys.version_info >= (3, 13) else OK
    yield Finding('System', 'Python', value, status, 'use Python 3.10, 3.11 or 3.12')
    for key, text in re.findall(r"'((?:CUDA|GPU|NVCC|GCC)[^']*)': '?([^',}]*)", collected):
        yield Finding('System', key, text)


def examine() -> list[Finding]:
    """Looks at everything and returns the findings, in the order of the report."""
    versions = {name: installed(packages) for name, packages in PROVIDERS.items()}
    answers = ask(PROBES)
    system = check_system(answers['mmengine'].pop('said', ''))
    return [*system, *check_packages(answers, versions)]


def verdict(findings: Sequence[Finding]) -> tuple[str, int]:
    """Returns the closing lines, with the first thing that is wrong, and the exit status."""
    wrong = [finding for finding in findings if finding.status == WRONG]
    if not wrong:
        return 'Nothing is wrong.', 0
    text = f'Wrong: {wrong[0].name}: {wrong[0].value}\nWhat to do: {wrong[0].remedy}'
    if len(wrong) > 1:
        text = f'{len(wrong)} things are wrong; the first one may explain the others.\n{text}'
    return text, 1


def print_report(findings: Sequence[Finding]) -> int:
    """Prints the report and returns the exit status: 1 if something that is needed is broken."""
    width = max((len(finding.name) for finding in findings), default=0)
    marks = {OK: ' ', NOTE: '-', WRONG: '!'}
    for section, rows in groupby(findings, key=lambda finding: finding.section):
        print(section)
        for row in rows:
            print(f'{marks[row.status]} {row.name:<{width}}  {row.value}')
            if row.status != OK and row.remedy:
                print(f'  {"":<{width}}  {row.remedy}')
        print()
    closing, status = verdict(findings)
    print(closing)
    return status


if __name__ == '__main__':
    argparse.ArgumentParser(
        description='Tells what works, and the first thing that is wrong.'
    ).parse_args()
    sys.exit(print_report(examine()))
