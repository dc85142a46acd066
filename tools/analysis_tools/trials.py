"""One checkpoint under many settings: each is scored as tools/test.py does, timed and counted."""

import argparse
import contextlib
import hashlib
import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import measures
import torch
from benchmark import call_of, positive
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from torch import nn

from idlevit_mm.analysis.export import fixed
from idlevit_mm.analysis.flops import model_multiply_adds
from idlevit_mm.analysis.int8 import in_int8
from idlevit_mm.analysis.models import (
    idle_backbone,
    load_config,
    load_model,
    noise_image,
    parse_shapes,
    with_keep_ratios,
)
from idlevit_mm.analysis.results import Line, read_lines
from idlevit_mm.engine.checks import leaf_datasets
from idlevit_mm.engine.faults import naming_the_remedy
from idlevit_mm.engine.launch import runner_of_test
from idlevit_mm.engine.options import Overrides
from idlevit_mm.errors import UsageError
from idlevit_mm.policies import KeepRatios

METRICS = ('bbox_mAP', 'mIoU')


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what all tools of trials have."""
    add = parser.add_argument
    add('config', help='config of a detector or segmentor with an idle backbone')
    add('checkpoint', type=Path, help='its trained weights')
    few = 'of the test data the first N images alone; of -N the last (default: all)'
    add('--num-images', type=int, metavar='N', help=few)
    add('--metric', help=f'as the evaluator calls it (default: {" or ".join(METRICS)})')
    add('--shape', default='512x512', metavar='HxW', help='pixels of the image that is timed')
    add('--part', default='model', choices=('backbone', 'model'), help='what is timed and counted')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--threads', type=positive, help='computing threads')
    add('--rounds', type=positive, default=15, help='of timing')
    add('--max-seconds', type=float, default=60.0, help='of timing, after three rounds')
    add('--work-dir', type=Path, help='for logs (default: work_dirs/<name of the config>)')
    add('--cfg-options', nargs='+', action=Overrides, metavar='KEY=VALUE', help='overrides')


class Trials:
    """The settings of one checkpoint on one device.

    Args:
        args: Options of ``add_options``.

    Raises:
        UsageError: Anything is missing or does not fit.

    Attributes:
        about: All that figures depend on, besides the setting.
        model: The model as configured.
        counts: Name of the metric that counts, once it has been measured.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        if args.num_images == 0:
            raise UsageError('--num-images 0: allowed are N, the first, or -N, the last')
        self.args, (self.shape,) = args, parse_shapes([args.shape])
        self.counts = ''
        self.device = measures.started(args.device, args.threads)
        measures.keep_freed_memory()
        self.cfg = load_config(args.config, args.cfg_options)
        self.work_dir = args.work_dir or Path('work_dirs', Path(args.config).stem)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self.model = load_model(self.cfg, args.checkpoint, self.device)
        fixed(self.model, self.shape)
        config = json.dumps(self.cfg.to_dict(), sort_keys=True, default=str).encode()
        files = dict(config_sha256=config, checkpoint_sha256=args.checkpoint.read_bytes())
        self.about: Line = {key: hashlib.sha256(d).hexdigest()[:12] for key, d in files.items()}
        self.about |= dict(num_images=args.num_images, part=args.part, shape=list(self.shape))
        self.about |= dict(device=args.device, threads=torch.get_num_threads(), metric=args.metric)

    @cached_property
    def runner(self) -> Runner:
        """What tests; it is slow to make, so that what can be wrong with a setting comes before.

        Raises:
            UsageError: Data are missing, or the config cannot be tested.
        """
        data, count = (self.cfg.get('test_dataloader') or {}).get('dataset'), self.args.num_images
        few = {
            f'{key}.indices': count
            for key, _ in leaf_datasets(data, 'test_dataloader.dataset')
            if count
        }
        options = {'log_level': 'WARNING', **(self.args.cfg_options or {}), **few}
        files = self.args.config, str(self.args.checkpoint), str(self.work_dir)
        runner = runner_of_test(*files, cfg_options=options)
        # It would put the weights of the file into any model.
        runner._has_loaded = True
        with contextlib.redirect_stdout(io.StringIO()):
            loop = runner.test_loop
            data = loop.dataloader.dataset
        for metric in loop.evaluator.metrics:
            # COCO's takes images that were not shown for images without boxes.
            if count and hasattr(metric, 'img_ids'):
                metric.img_ids = [data.get_data_info(at)['img_id'] for at in range(len(data))]
        return runner

    @cached_property
    def images(self) -> torch.Tensor:
        """The image that is timed: (1, channels, height, width)."""
        return noise_image(self.shape, self.device, self.model)

    def of_policy(self, policy: Any) -> nn.Module:
        """The model with another policy, a name or its config, for the same weights.

        Raises:
            ValueError: It is unknown, or the backbone cannot follow it.
            UsageError: Its scorer learns, and the checkpoint has not learnt it.
        """
        wanted = dict(type=policy) if isinstance(policy, str) else dict(policy)
        cfg = self.cfg.copy()
        cfg.model.backbone.policy = ConfigDict(wanted)
        return load_model(cfg, self.args.checkpoint, self.device)

    def variant(
        self, keep: KeepRatios | None, model: nn.Module | None = None, int8: bool = False
    ) -> nn.Module:
        """A model with other keep ratios, or those that it has; weights are shared.

        What a search finds may have ratios of attention as well.
        """
        model = self.model if model is None else model
        ratios: Any = idle_backbone(model).keep_ratios if keep is None else keep
        if not (isinstance(ratios, Mapping) and 'attention_ratios' in ratios):
            ratios = dict(keep_ratios=ratios)
        model = with_keep_ratios(model, **ratios)
        return in_int8(model) if int8 else model

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """What tools/test.py prints of a model."""
        self.runner.model = model
        with contextlib.redirect_stdout(io.StringIO()):
            found = naming_the_remedy(self.runner.test)
        return {name: float(value) for name, value in found.items()}

    def score(self, metrics: Mapping[str, float]) -> tuple[str, float]:
        """Name and value of the metric that counts.

        Raises:
            UsageError: There is no such metric.
        """
        wanted = (self.args.metric,) if self.args.metric else METRICS
        for name, value in metrics.items():
            if name in wanted or name.rpartition('/')[2] in wanted:
                self.counts = name
                return name, float(value)
        # COCO's measures nothing where nothing was found.
        if self.counts and not metrics:
            return self.counts, 0.0
        measured = ', '.join(metrics) or 'none, as the model finds nothing in these images'
        raise UsageError(f'--metric {" or ".join(wanted)} is not measured; allowed: {measured}')

    def call(self, model: nn.Module) -> Callable[[], Any]:
        """One prediction of the image that is timed, by the model or its backbone."""
        case = dict(mode='inference', part=self.args.part, compile='none', dtype='float32')
        return call_of(model, self.images, case)

    def multiply_adds(self, model: nn.Module) -> int:
        """Those of the image that is timed."""
        *_, total = model_multiply_adds(model, self.shape, self.args.part == 'backbone').values()
        return total

    def seconds(
        self,
        calls: dict[str, Callable[[], Any]],
        timer: Callable[[Callable[[], Any]], float] | None = None,
    ) -> dict[str, list[float]]:
        """Those of each round; all take turns."""
        return measures.compare(calls, self.args.rounds, 1, self.args.max_seconds, timer)

    def read(self, path: Path) -> list[Line]:
        """Lines of a file that were measured under the same circumstances."""
        lines = read_lines(path) if path.is_file() else []
        return [line for line in lines if self.about.items() <= line.items()]

    def origin(self, tool: str, argv: Sequence[str] | None) -> str:
        """Where figures come from, for a document: the command and what they depend on."""
        command = shlex.join([tool, *(sys.argv[1:] if argv is None else argv)])
        place = f'{self.args.part} at {"×".join(map(str, self.shape))}, {self.args.device}'
        threads = f'threads: {torch.get_num_threads()}'
        return f'`{command}`: {place}, {threads}. {measures.machine()}; {measures.versions()}'


def progress(items: Collection[Any], what: Callable[[Any], str]) -> Iterator[Any]:
    """Say before each item which one it is, and how much time is left."""
    begun = time.monotonic()
    for number, item in enumerate(items):
        spent = time.monotonic() - begun
        left = f', about {spent / number * (len(items) - number):.0f} s left' if number else ''
        print(f'{number + 1}/{len(items)} {what(item)}{left}', flush=True)
        yield item
