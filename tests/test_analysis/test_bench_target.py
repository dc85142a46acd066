"""``make bench`` asks the benchmark for something that exists, and for little of it."""

import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOL = 'tools/analysis_tools/benchmark.py'


def make(*args):
    result = subprocess.run(
        ['make', '--no-print-directory', *args], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_it_ends_soon_and_compares_with_the_dense_class(tool):
    (line,) = [
        line for line in make('-n', 'bench').replace('\\\n', ' ').splitlines() if TOOL in line
    ]
    benchmark = tool('benchmark')
    arguments = benchmark.parse_args(shlex.split(line.split(TOOL)[1]))
    assert set(arguments.targets) <= set(benchmark.PRESETS)
    assert len(list(benchmark.cases_of('x', arguments))) == 1
    assert arguments.max_seconds * len(arguments.targets) <= 40
    assert arguments.device == 'cpu'
    assert 1.0 in arguments.keep_ratios


def test_it_is_among_the_targets_shown():
    assert 'make bench ' in make('help')


def test_ci_runs_it_after_the_tests():
    command = 'make --no-print-directory '
    steps = {
        line.split(command)[1].split()[0]: line
        for line in (ROOT / '.ci' / 'run').read_text().splitlines()
        if command in line
    }
    order = list(steps)
    assert order.index('test') < order.index('bench') < order.index('test-onedl')
    # Nothing hides an exit code.
    assert not any('||' in steps[name] for name in ('test', 'bench', 'test-onedl'))
