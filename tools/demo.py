"""From nothing to an idle model that is faster than its dense self, by this project's own tools.

Writes data, trains a dense model of mmdet's or mmseg's classes, writes its idle config, trains both
on for the same time, and tests, times and draws them. A command whose file is there is done, so the
demo goes on where it was interrupted.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SCENES = (
    'python tools/dataset_converters/digit_scenes.py data/demo_scenes --size 256 --num-train 600 '
    '--num-val 100 --num-digits 12 24 --digit-scale 20 34'
)
TREES = 'python tools/dataset_converters/trees.py data/deepforest-2.1.0-py3-none-any.whl data/trees'
SIZES = '256x256 512x512 800x1344'
PROGRESS = re.compile(r'\[(\d+)\]\[\s*(\d+)/(\d+)\].*?eta: (\d+):(\d+):(\d+).*?\bloss: (\S+)')


class Story(NamedTuple):
    """A dense config, how it idles, its epochs, those of going on, data, and the metric."""

    config: str
    keep: str  # the first stage sees the picture for the first time
    policy: str
    epochs: int
    more: int
    data: str
    key: str
    metric: str


EVO = '--policy EvoViT --scorer local_contrast'
# Close to what tools/search.py found on the dense model: docs/studies/demo.md.
FOUND = '1.0 [0.5,0.5,0.4] [0.4,0.3,0.3] 0.1'
HALF = '1.0 0.5 0.5 0.5'
COCO = 'coco/bbox_mAP'
STORIES = {
    'detector': Story(
        'demo/retinanet_pvt_scenes',
        FOUND,
        f'{EVO} --random-ratios 0.3 1.0',
        2,
        1,
        SCENES,
        COCO,
        'box AP',
    ),
    'segmentor': Story('demo/segformer-head_swin_scenes', HALF, '', 2, 1, SCENES, 'mIoU', 'mIoU'),
    'trees': Story('trees/retinanet_pvt_trees', HALF, EVO, 20, 8, TREES, f'{COCO}_50', 'box AP50'),
}


class Step(NamedTuple):
    """Commands that run side by side.

    Attributes:
        title: What they do.
        seconds: About how long that takes on two cores.
        commands: By the file (a pattern) that each leaves at its end; '' if the tool sees for
            itself what is done.
    """

    title: str
    seconds: float
    commands: Mapping[str, str]

    def left(self) -> list[str]:
        """The commands that are not done yet."""
        return [own for file, own in self.commands.items() if not (file and glob(file))]


def steps_of(story: Story, work: str, keep: str, options: str = '') -> list[Step]:
    """All steps in their order, below a folder; ``options`` are overrides of all trainings."""
    config, idle = f'configs/{story.config}.py', f'{work}/{folder_of(keep)}'
    dense, last = f'{work}/dense/epoch_{story.epochs}.pth', f'epoch_{story.more}.pth'
    pair = {f'{work}/continued': config, idle: f'{idle}.py'}
    again = f'train_cfg.max_epochs={story.more} param_scheduler.1.end={story.more} {options}'
    again = f'load_from={dense} optim_wrapper.optimizer.lr=0.0005 {again}'
    # Two processes of one thread each are a half faster than one of two.
    first, halves = f'bash tools/dist_train.sh {config} 2', 'train_dataloader.batch_size=1'
    if shutil.which('nvidia-smi'):
        first, halves = f'python tools/train.py {config}', 'train_dataloader.batch_size=2'
    first += f' --work-dir {work}/dense --resume --cfg-options {halves} {options}'

    def train(folder: str, config: str) -> str:
        where = f'--work-dir {folder} --resume'
        return f'python tools/train.py {config} {where} --cfg-options {again}'

    def test(folder: str, config: str) -> str:
        return f'python tools/test.py {config} {folder}/{last} --work-dir {folder}/test'

    def bench(part: str) -> str:
        what = f'{idle}.py --checkpoints {idle}/{last} --keep-ratios 1.0 --as-configured'
        how = f'--part {part} --device cpu --warmup 1 --max-seconds 3 --out {idle}/{part}.jsonl'
        out = f'--shapes {SIZES} --resume --markdown {idle}/{part}.md'
        return f'python tools/analysis_tools/benchmark.py {what} {how} {out}'

    swap = f'{config} --keep {keep} --idle-where pays {story.policy} --load-from {dense}'
    swap += f' --distill --out {idle}.py'
    draw = f'{idle}.py {idle}/{last} --dense {config} {work}/continued/{last} --count 4'
    draw = f'python tools/analysis_tools/draw_active_tokens.py {draw} --out-dir {idle}/pictures'
    tests = {f'{k}/test/*/*.json': test(k, c) for k, c in pair.items()}
    return [
        Step('write data', 12, {'': story.data}),
        Step('train dense', 115, {dense: first}),
        Step('write the idle config', 10, {f'{idle}.py': f'python tools/idle_config.py {swap}'}),
        Step('train on both', 90, {f'{k}/{last}': train(k, c) for k, c in pair.items()}),
        Step('test and draw', 28, {**tests, f'{idle}/pictures/*.png': draw}),
        Step('time backbones', 30, {f'{idle}/backbone.md': bench('backbone')}),
        Step('time whole models', 30, {f'{idle}/model.md': bench('model')}),
    ]


def folder_of(keep: str) -> str:
    """Name of the folder for models with these keep ratios."""
    return '-'.join(['keep', *re.findall(r'[\d.]+', keep)])


class Screen:
    """Runs steps under a line that says what is done and how much is left.

    Without a terminal such a line is printed every ten seconds.
    """

    def __init__(self, console: Console, steps: Sequence[Step]) -> None:
        self.console, self.status = console, console.status('')
        self.left = sum(step.seconds for step in steps)
        self.begun = self.said = time.monotonic()
        # Of the steps that were run: seconds that they took, and were said to take.
        self.spent = self.planned = 1.0

    def run(self, step: Step, work: Path) -> None:
        """Run what is left of a step, each command on its share of the cores; logs go to ``work``.

        Raises:
            RuntimeError: A command failed; the others were ended.
        """
        started = time.monotonic()
        logs: list[Path] = []
        running: list[subprocess.Popen[bytes]] = []
        commands = step.left()
        self.left -= step.seconds
        processes = sum(2 if command.startswith('bash') else 1 for command in commands)
        threads = str(max(1, (os.cpu_count() or 1) // processes))
        environment = {'OMP_NUM_THREADS': threads, **os.environ, 'PYTHONUNBUFFERED': '1'}
        environment['PYTHON'] = sys.executable
        (work / 'logs').mkdir(parents=True, exist_ok=True)
        try:
            for number, command in enumerate(commands):
                self.console.print(f'$ {command}', style='dim', soft_wrap=True)
                logs.append(work / 'logs' / f'{step.title.replace(" ", "-")}-{number}.log')
                with logs[-1].open('wb') as file:
                    start = command.replace('python ', f'{sys.executable} ', 1).split()
                    running.append(
                        subprocess.Popen(start, env=environment, stdout=file, stderr=file)
                    )
            while None in (states := [process.poll() for process in running]) or any(states):
                for state, log in zip(states, logs, strict=True):
                    if state:
                        lines = '\n  '.join(end_of(log).splitlines()[-12:])
                        raise RuntimeError(f'{step.title}: status {state}, {log}:\n  {lines}')
                self.show(step, time.monotonic() - started, [end_of(log) for log in logs])
                time.sleep(0.25)
        finally:
            for process in running:
                process.terminate()
                process.wait()
        self.planned += step.seconds
        self.spent += time.monotonic() - started

    def show(self, step: Step, seconds: float, ends: Sequence[str]) -> None:
        """Say how far a step is after some seconds, by the ends of its logs."""
        now, pace = time.monotonic(), self.spent / self.planned
        found = [matches[-1].groups() for end in ends if (matches := [*PROGRESS.finditer(end)])]
        own = [3600 * int(h) + 60 * int(m) + int(s) for *_, h, m, s, _ in found]
        left = max([step.seconds * pace - seconds, 1.0] if len(own) < len(ends) else own)
        state = ', '.join(f'epoch {e} {i}/{n} loss {loss}' for e, i, n, *_, loss in found)
        about = f'about {clock(left + self.left * pace)} left'
        text = f'{clock(now - self.begun)} {step.title}, {about}  {state}'
        self.status.update(text)
        if not self.console.is_terminal and now - self.said >= 10:
            self.said = now
            self.console.print(text, soft_wrap=True)


def end_of(log: Path, size: int = 4096) -> str:
    """The last lines of a log."""
    with log.open('rb') as file:
        file.seek(max(0, log.stat().st_size - size))
        return file.read().decode(errors='replace')


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


def report(story: Story, work: Path, keep: str) -> tuple[str, Table, str]:
    """The scores, a table of times, and what to know about them."""
    kinds = ('continued', folder_of(keep))
    tests = [max((work / kind / 'test').glob('*/*.json')) for kind in kinds]
    scores = [json.loads(path.read_text())[story.key] for path in tests]
    # In the logs, COCO's metrics are shares and mmseg's are points of 100.
    dense, idle = (score * (100 if story.key.startswith('coco') else 1) for score in scores)
    table = Table(box=box.MARKDOWN)
    table.add_column('milliseconds', no_wrap=True)
    for title in ('dense', 'keep 1', 'idle', 'idle / keep 1', 'idle / dense'):
        table.add_column(title, justify='right')
    for part in ('backbone', 'model'):
        about, *cases = map(json.loads, (work / kinds[1] / f'{part}.jsonl').open())
        for case in [case for case in cases if 'candidates' in case]:
            times = {candidate['kind']: candidate['ms'] for candidate in case['candidates']}
            full, own, host = times['dense'], times['config'], times.get('host', float('nan'))
            figures = f'{host:.1f} {full:.1f} {own:.1f} {own / full:.2f} {own / host:.2f}'.split()
            table.add_row(f'{part}, {"×".join(map(str, case["shape"]))}', *figures)
    note = (
        f'Idle: keep ratio {keep}; keep 1: all tokens; dense: the class of the config; with the '
        'same weights. Medians of rounds in which all take turns, an image at a time. '
        f'{about["machine"]}; {about["versions"]}'
    )
    score = f'{story.metric}: dense {dense:.1f}, idle {idle:.1f} ({idle - dense:+.1f} points)'
    return score, table, note


def main() -> int:
    """Run what is not done yet and print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('story', nargs='?', choices=STORIES, default='detector')
    parser.add_argument('--keep', nargs='+', help='keep ratio, or one for each stage')
    parser.add_argument('--fresh', action='store_true', help='forget an earlier run')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='overrides of all trainings')
    args = parser.parse_args()
    story, console = STORIES[args.story], Console(highlight=False)
    work, keep = Path('work_dirs/demo', args.story), ' '.join(args.keep or [story.keep])
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if args.fresh:
        shutil.rmtree(work, ignore_errors=True)
    steps = steps_of(story, str(work), keep, ' '.join(args.cfg_options))
    screen = Screen(console, steps := [step for step in steps if step.left()])
    try:
        with screen.status:
            for step in steps:
                screen.run(step, work)
    except RuntimeError as error:
        console.print(f'The demo failed. {error}', style='bold red', markup=False)
        return 2
    except KeyboardInterrupt:
        console.print('Interrupted; the same command goes on from here.')
        return 130
    with (work / folder_of(keep) / 'results.md').open('w') as file:
        for target in (console, Console(file=file, width=100)):
            target.print(*report(story, work, keep), sep='\n\n')
    console.print(f'\nEverything is in {work}; {clock(time.monotonic() - screen.begun)} minutes.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
