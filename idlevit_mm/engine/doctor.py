"""Looks at an installation: versions, compiled ops, CUDA, data, and the first thing that is wrong.

Only the standard library is imported here, so that `tools/doctor.py` can load this file where
torch is missing or broken. What may crash is tried in a child process, which runs this same file.
"""

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

OK, NOTE, WRONG = 'ok', 'note', 'wrong'

# Import name -> packages that provide it. More than one of a row overwrite each other's files.
PROVIDERS: Mapping[str, tuple[str, ...]] = {
    'torch': ('torch',),
    'torchvision': ('torchvision',),
    'numpy': ('numpy',),
    'cv2': (
        'opencv-python-headless',
        'opencv-python',
        'opencv-contrib-python-headless',
        'opencv-contrib-python',
    ),
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'timm': ('timm',),
    'idlevit_mm': ('idlevit_mm',),
}
# Without these the backbones do not even import.
NEEDED = ('torch', 'numpy', 'cv2', 'mmengine', 'mmcv', 'idlevit_mm')
PROBE_SECONDS = 300


@dataclass(frozen=True)
class Stack:
    """Packages that are made for each other: OpenMMLab's own, or the forks of the same names.

    Attributes:
        title: What the report calls it.
        target: The target of make that installs it.
        remedies: By import name, what brings a package that is missing.
    """

    title: str
    target: str
    remedies: Mapping[str, str]

    @property
    def setup(self) -> str:
        """The first half of a remedy; the second one is for other environments."""
        return f"in a checkout: 'make {self.target}'; in an environment of your own: "


OPENMMLAB = Stack(
    "OpenMMLab's own packages",
    'setup',
    {
        'mmengine': "'pip install mmengine'",
        'mmcv': "'pip install mmcv-lite' (backbones only) or a build of mmcv for this torch",
        'mmdet': "'pip install mmdet' (3.3.0 asks for mmcv below 2.2), for detectors",
        'mmseg': "'pip install mmsegmentation ftfy regex', for segmentors",
    },
)
ONEDL = Stack(
    'the forks onedl-*',
    'setup-onedl',
    {
        'mmengine': "'pip install onedl-mmengine'",
        'mmcv': "'pip install --no-build-isolation onedl-mmcv', which compiles its ops",
        'mmdet': "'pip install onedl-mmdetection', for detectors",
        'mmseg': "'pip install onedl-mmsegmentation', for segmentors",
    },
)


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        section: Heading that it stands under.
        name: What was looked at.
        value: What was found.
        status: `ok`, `note` (works, but something is missing) or `wrong`.
        remedy: What to do about it, empty where nothing has to be done.
    """

    section: str
    name: str
    value: str
    status: str = OK
    remedy: str = ''


# ---------------------------------------------------------------------- tried in a child process


def probe_import(name: str) -> str:
    """Imports a module and returns its version, empty if it has none."""
    return str(getattr(importlib.import_module(name), '__version__', ''))


def probe_torchvision() -> str:
    """Runs one of torchvision's compiled operators."""
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0]])
    if torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() != [0]:
        raise RuntimeError('torchvision.ops.nms gives a wrong result')
    return str(torchvision.__version__)


def probe_ops(device: str) -> str:
    """Runs one of mmcv's compiled operators on a device."""
    import torch
    from mmcv.ops import nms

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.0], [20.0, 20.0, 30.0, 30.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    kept = nms(boxes.to(device), scores.to(device), 0.5)[1].tolist()
    if kept != [0, 2]:
        raise RuntimeError(f'mmcv.ops.nms keeps {kept} instead of [0, 2]')
    return 'works'


def probe_cuda() -> dict[str, Any]:
    """Returns what torch sees of CUDA."""
    import torch

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 1024**3
            devices.append(f'{torch.cuda.get_device_name(index)}, {memory:.0f} GiB')
    return {
        'built': torch.version.cuda,
        'devices': devices,
        'cudnn': torch.backends.cudnn.version() if devices else None,
    }


def probe_backends() -> list[str]:
    """Returns the distributed backends that torch was built with."""
    import torch.distributed as dist

    if not dist.is_available():
        return []
    names = ('gloo', 'nccl', 'mpi')
    return [name for name in names if getattr(dist, f'is_{name}_available')()]


def probe_registry() -> list[str]:
    """Returns the backbones that importing the package registers."""
    from mmengine.registry import MODELS

    importlib.import_module('idlevit_mm')

    return sorted(name for name in MODELS.module_dict if name.startswith('Idle'))


PROBES: Mapping[str, Callable[[], Any]] = {
    'torch': lambda: probe_import('torch'),
    'numpy': lambda: probe_import('numpy'),
    'cv2': lambda: probe_import('cv2'),
    'torchvision': probe_torchvision,
    'mmengine': lambda: probe_import('mmengine'),
    'mmcv': lambda: probe_import('mmcv'),
    'ops on cpu': lambda: probe_ops('cpu'),
    'mmdet': lambda: probe_import('mmdet') and probe_import('mmdet.apis') or '',
    'mmseg': lambda: probe_import('mmseg') and probe_import('mmseg.apis') or '',
    'timm': lambda: probe_import('timm'),
    'idlevit_mm': probe_registry,
    'cuda': probe_cuda,
    'ops on cuda': lambda: probe_ops('cuda'),
    'backends': probe_backends,
}


def run_probes(names: Sequence[str], stream: TextIO) -> None:
    """Runs probes one after the other; each writes two lines of JSON, before and after it."""
    for name in names:
        stream.write(json.dumps({'begin': name}) + '\n')
        stream.flush()
        try:
            answer: dict[str, Any] = {'end': name, 'value': PROBES[name]()}
        except BaseException as error:
            # A package that is broken may raise anything, SystemExit too.
            text = ' '.join(str(error).split()) or type(error).__name__
            answer = {
                'end': name,
                'error': f'{type(error).__name__}: {text}',
                'missing': getattr(error, 'name', None)
                if isinstance(error, ModuleNotFoundError)
                else None,
            }
        stream.write(json.dumps(answer) + '\n')
        stream.flush()


def ask(names: Sequence[str], command: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Runs probes in child processes; one that crashes costs only its own answer.

    Args:
        names: Names of probes.
        command: Command that runs the probes named after it, by default this file.

    Returns:
        For each name a dict with `value`, or with `error` and `missing`.
    """
    answers: dict[str, dict[str, Any]] = {}
    rest = list(names)
    while rest:
        why = ''
        try:
            done = subprocess.run(
                [*(command or [sys.executable, str(Path(__file__).resolve())]), *rest],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors='replace',
                timeout=PROBE_SECONDS,
                check=False,
            )
            output = done.stdout
            if done.returncode < 0:
                why = f'it crashed the interpreter with signal {-done.returncode}'
            elif done.returncode:
                why = f'the interpreter ended with exit status {done.returncode}'
        except subprocess.TimeoutExpired as error:
            raw = error.stdout or b''
            output = raw if isinstance(raw, str) else raw.decode(errors='replace')
            why = f'no answer within {PROBE_SECONDS} s'
        except OSError as error:
            output, why = '', str(error)
        begun = ''
        for line in output.splitlines():
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if not isinstance(message, dict):
                continue
            if 'begin' in message:
                begun = message['begin']
            elif message.get('end') in rest:
                answers[message['end']] = message
        rest = [name for name in rest if name not in answers]
        if rest:
            # Whatever happened, the list gets shorter with every round.
            culprit = begun if begun in rest else rest[0]
            answers[culprit] = {'error': why or 'no answer', 'missing': None}
            rest.remove(culprit)
    return answers


# ----------------------------------------------------------------------------------- the report


def installed(names: Iterable[str]) -> dict[str, str]:
    """Returns the versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except Exception:  # a damaged package may raise anything
            continue
    return found


def stack_of(package: str) -> Stack:
    """Returns the stack that a package belongs to."""
    return ONEDL if package.startswith('onedl-') else OPENMMLAB


def group_stacks(versions: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Returns the installed packages of each stack, by the stack's title.

    Args:
        versions: By import name, the installed packages that provide it and their versions.
    """
    groups: dict[str, list[str]] = {}
    for name in OPENMMLAB.remedies:
        for package in versions.get(name, {}):
            groups.setdefault(stack_of(package).title, []).append(package)
    return groups


def likely_stack(versions: Mapping[str, Mapping[str, str]]) -> Stack:
    """Returns the stack that remedies speak of: the forks where nothing but forks is installed."""
    return ONEDL if list(group_stacks(versions)) == [ONEDL.title] else OPENMMLAB


def check_stack(
    answers: Mapping[str, Mapping[str, Any]], versions: Mapping[str, Mapping[str, str]]
) -> list[Finding]:
    """Returns a finding on whose packages are installed, none where there are none.

    Two packages that own the same folder are always wrong. Others of two stacks are made for other
    versions of each other, but may work.

    Args:
        answers: What the probes said, by import name.
        versions: By import name, the installed packages that provide it and their versions.
    """
    groups = group_stacks(versions)
    if len(groups) < 2:
        return [Finding('Packages', 'stack', title) for title in groups]
    parts = [f'{title} ({", ".join(packages)})' for title, packages in groups.items()]
    names = list(OPENMMLAB.remedies)
    harm = any(
        len(versions.get(name, {})) > 1 or 'error' in answers.get(name, {}) for name in names
    )
    packages = ' '.join(package for group in groups.values() for package in group)
    return [
        Finding(
            'Packages',
            'stack',
            f'mixed: {" and ".join(parts)} have the same import names',
            WRONG if harm else NOTE,
            f"'pip uninstall {packages}', then install one stack: 'make {OPENMMLAB.target}' and "
            f"'make {ONEDL.target}' do so, each in an environment of its own",
        )
    ]


def check_packages(
    answers: Mapping[str, Mapping[str, Any]], versions: Mapping[str, Mapping[str, str]]
) -> list[Finding]:
    """Returns a finding for each package.

    Args:
        answers: What the probes said, by import name.
        versions: By import name, the installed packages that provide it and their versions.
    """
    stack = likely_stack(versions)
    remedies = {
        'torch': "'pip install torch torchvision'",
        'torchvision': "reinstall torch and torchvision together, from one index: a '+cpu' build "
        'of one does not load the other',
        'numpy': "'pip install numpy'",
        'cv2': "'pip install --force-reinstall opencv-python-headless'",
        **stack.remedies,
        'timm': "'pip install timm', to read timm's checkpoints",
        'idlevit_mm': "'pip install -e .'",
    }
    findings = check_stack(answers, versions)
    for name, remedy in remedies.items():
        packages = versions.get(name, {})
        label = ' + '.join(f'{package} {version}' for package, version in packages.items())
        answer = answers.get(name, {})
        if name != 'cv2' and len(packages) > 1:
            # The OpenCV packages are often installed twice, and then one of them simply wins.
            finding = Finding(
                'Packages',
                name,
                f'{label}: they overwrite each other',
                WRONG,
                f"'pip uninstall {' '.join(packages)}', then install one of them",
            )
        elif 'error' in answer and answer.get('missing') == name and not packages:
            status = WRONG if name in NEEDED else NOTE
            finding = Finding('Packages', name, 'not installed', status, stack.setup + remedy)
        elif 'error' in answer:
            value = f'{label or "not installed"}; does not import: {answer["error"]}'
            if answer.get('missing') and answer['missing'] != name:
                remedy = f"'pip install' what provides the module {answer['missing']}"
            finding = Finding('Packages', name, value, WRONG, stack.setup + remedy)
        elif name == 'idlevit_mm':
            value = f'{label or "from the working directory"}: {", ".join(answer["value"])}'
            finding = Finding('Packages', name, value)
        else:
            # torch's own version has the tag that its package's version lacks: 2.11.0+cu130.
            local = f', built as {answer["value"]}' if '+' in str(answer.get('value', '')) else ''
            value = label + local if label else str(answer.get('value', ''))
            finding = Finding('Packages', name, value)
        findings.append(finding)
    return findings


def check_ops(
    answers: Mapping[str, Mapping[str, Any]], versions: Mapping[str, Mapping[str, str]]
) -> list[Finding]:
    """Returns findings on mmcv's compiled operators and on CUDA."""
    findings, stack = [], likely_stack(versions)
    lite = [name for name in versions.get('mmcv', {}) if name.endswith('-lite')]
    answer = answers['ops on cpu']
    needed_by = [name for name in ('mmdet',) if versions.get(name)]
    if 'error' not in answer:
        findings.append(Finding('Compiled ops', 'mmcv.ops on CPU', 'work'))
    elif lite:
        findings.append(
            Finding(
                'Compiled ops',
                'mmcv.ops on CPU',
                f'{lite[0]} has none: backbones and segmentors only',
                WRONG if needed_by else NOTE,
                'mmdet needs compiled ops: replace it by a build of mmcv for this torch',
            )
        )
    else:
        findings.append(
            Finding(
                'Compiled ops',
                'mmcv.ops on CPU',
                answer['error'],
                WRONG,
                'mmcv was built for another torch, or without ops: '
                + stack.setup
                + 'build it again (MMCV_WITH_OPS=1, pip install --no-build-isolation)',
            )
        )

    cuda = answers['cuda']
    if 'error' in cuda:
        findings.append(Finding('CUDA', 'CUDA', f'unknown: {cuda["error"]}', NOTE))
        return findings
    built, devices = cuda['value']['built'], cuda['value']['devices']
    text = f'torch is built with CUDA {built}' if built else 'torch is built without CUDA'
    if not devices:
        findings.append(Finding('CUDA', 'CUDA', f'{text}; no device: everything runs on the CPU'))
        return findings
    findings.append(Finding('CUDA', 'CUDA', f'{text}, cuDNN {cuda["value"]["cudnn"]}'))
    findings += [Finding('CUDA', f'device {i}', name) for i, name in enumerate(devices)]
    answer = answers['ops on cuda']
    if 'error' not in answer:
        findings.append(Finding('CUDA', 'mmcv.ops on CUDA', 'work'))
    elif not lite:
        findings.append(
            Finding(
                'CUDA',
                'mmcv.ops on CUDA',
                answer['error'],
                WRONG,
                f'mmcv was built for the CPU only: with the CUDA toolkit {built}, '
                f"'make {stack.target} IDLEVIT_MM_OPS=cuda'; or train on the CPU with "
                "CUDA_VISIBLE_DEVICES=''",
            )
        )
    return findings


def check_system(answers: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Returns findings on Python, the compiler and the distributed backends."""
    version = platform.python_version()
    findings = [Finding('System', 'platform', f'{platform.platform()}, {os.cpu_count()} cores')]
    if (3, 10) <= sys.version_info[:2] <= (3, 12):
        findings.append(Finding('System', 'python', f'{version}, {sys.executable}'))
    else:
        status = WRONG if sys.version_info < (3, 10) else NOTE
        remedy = 'use Python 3.10, 3.11 or 3.12'
        findings.append(Finding('System', 'python', f'{version}: not tested', status, remedy))
    compiler = next((path for path in map(shutil.which, ('c++', 'g++')) if path), None)
    if compiler:
        findings.append(Finding('System', 'C++ compiler', compiler))
    else:
        remedy = 'torch.compile and building mmcv need one: install g++'
        findings.append(Finding('System', 'C++ compiler', 'none', NOTE, remedy))
    answer = answers['backends']
    names = ', '.join(answer.get('value') or []) or 'none'
    findings.append(Finding('System', 'distributed backends', names))
    return findings


def count_images(folder: Path) -> int:
    """Returns the number of pictures in a folder."""
    suffixes = ('.jpg', '.jpeg', '.png')
    with os.scandir(folder) as entries:
        return sum(entry.name.lower().endswith(suffixes) for entry in entries)


def check_data(root: Path) -> list[Finding]:
    """Returns a finding for each data set that the configs know.

    Args:
        root: Folder that holds `coco`, `ade` and `digit_scenes`.
    """
    ade_parts = [f'{kind}/{split}' for kind in ('images', 'annotations')
                 for split in ('training', 'validation')]  # fmt: skip
    digits = "'python tools/dataset_converters/digit_scenes.py data/digit_scenes' writes it"
    wanted = {
        'COCO': (
            'coco',
            ['annotations/instances_train2017.json', 'annotations/instances_val2017.json']
            + ['train2017', 'val2017'],
            'needed only for configs/coco; see: python tools/prepare_data.py coco',
        ),
        'ADE20K': (
            'ade/ADEChallengeData2016',
            ade_parts,
            'needed only for configs/ade20k; see: python tools/prepare_data.py ade20k',
        ),
        'digit scenes, COCO layout': (
            'digit_scenes/coco',
            ['annotations/instances_train.json', 'annotations/instances_val.json', 'train', 'val'],
            digits,
        ),
        'digit scenes, ADE20K layout': ('digit_scenes/ade', ade_parts, digits),
    }
    findings = []
    for name, (folder, parts, remedy) in wanted.items():
        place = root / folder
        if not place.is_dir():
            findings.append(Finding('Data', name, f'not at {place}', NOTE, remedy))
            continue
        missing = [part for part in parts if not (place / part).exists()]
        if missing:
            value = f'{place} is incomplete: {", ".join(missing)} missing'
            findings.append(Finding('Data', name, value, NOTE, remedy))
            continue
        counts = []
        try:
            for part in parts:
                if (place / part).is_dir() and not part.startswith('annotations/'):
                    counts.append(f'{part} {count_images(place / part)}')
        except OSError as error:
            findings.append(Finding('Data', name, f'cannot be read: {error}', NOTE, remedy))
            continue
        findings.append(Finding('Data', name, f'{place} (images: {", ".join(counts)})'))
    return findings


def examine(data_root: str | Path = 'data') -> list[Finding]:
    """Looks at everything.

    Args:
        data_root: Folder that holds the data sets.

    Returns:
        The findings, in the order of the report.
    """
    versions = {name: installed(packages) for name, packages in PROVIDERS.items()}
    answers = ask([name for name in PROBES if name != 'ops on cuda'])
    if answers['cuda'].get('value', {}).get('devices'):
        answers.update(ask(['ops on cuda']))
    return [
        *check_system(answers),
        *check_packages(answers, versions),
        *check_ops(answers, versions),
        *check_data(Path(data_root)),
    ]


def verdict(findings: Sequence[Finding]) -> tuple[str, int]:
    """Returns the closing lines, with the first thing that is wrong, and the exit status."""
    wrong = [finding for finding in findings if finding.status == WRONG]
    if not wrong:
        return 'Nothing is wrong.', 0
    first = wrong[0]
    lines = [f'Wrong: {first.name}: {first.value}', f'What to do: {first.remedy}']
    if len(wrong) > 1:
        lines.insert(0, f'{len(wrong)} things are wrong; the first one may explain the others.')
    return '\n'.join(lines), 1


def print_report(findings: Sequence[Finding], plain: bool = False) -> int:
    """Prints the report, with rich where it is installed.

    Args:
        findings: What was found.
        plain: Do without rich.

    Returns:
        The exit status: 1 if something that is needed is broken.
    """
    closing, status = verdict(findings)
    if plain or not _print_rich(findings):
        width = max((len(finding.name) for finding in findings), default=0)
        section = ''
        for finding in findings:
            if finding.section != section:
                section = finding.section
                print(f'\n{section}' if finding is not findings[0] else section)
            mark = {OK: ' ', NOTE: '-', WRONG: '!'}[finding.status]
            print(f'{mark} {finding.name:<{width}}  {finding.value}')
            if finding.status != OK and finding.remedy:
                print(f'  {"":<{width}}  {finding.remedy}')
        print()
    print(closing)
    return status


def _print_rich(findings: Sequence[Finding]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except Exception:  # missing or broken: the plain report says the same
        return False
    colours = {OK: 'green', NOTE: 'yellow', WRONG: 'red'}
    table = Table(show_header=False, box=None, padding=(0, 1))
    section = ''
    for finding in findings:
        if finding.section != section:
            if section:
                table.add_row()
            section = finding.section
            table.add_row(Text(section, style='bold'))
        value = Text(finding.value, overflow='fold')
        if finding.status != OK and finding.remedy:
            value.append(f'\n{finding.remedy}', style='dim')
        status = Text(finding.status, style=colours[finding.status])
        table.add_row(Text(f'  {finding.name}'), status, value)
    console = Console()
    console.print(table)
    console.print()
    return True


if __name__ == '__main__':
    # This folder must not be on the path: its modules would hide others of the same name.
    sys.path[:] = [
        entry for entry in sys.path if Path(entry or '.').resolve() != Path(__file__).parent
    ]
    # Nothing that a package prints while it is imported may get between the answers.
    answer_stream = os.fdopen(os.dup(1), 'w', encoding='utf-8')
    os.dup2(2, 1)
    run_probes(sys.argv[1:], answer_stream)
