"""Draw what a trained model saw, found and left idle: one picture per image."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import mmcv
import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, TRANSFORMS
from PIL import Image
from torch import nn

from idlevit_mm.analysis.models import idle_backbone, load_model
from idlevit_mm.analysis.results import exit_code
from idlevit_mm.engine.options import Overrides
from idlevit_mm.visualization.data_samples import content_size, prediction_of, truth_of
from idlevit_mm.visualization.sheets import Sheet, active_shares, draw_sheet

# Title of its prediction and model, a detector or segmentor from `load_model`. Active tokens are
# drawn of those that idle, and of the last one, which has an idle backbone; its config names data
# set and pipeline.
Models = Mapping[str, nn.Module]
FRAME_MS = 700


def draw(
    models: Models,
    out_dir: str | Path,
    images: Sequence[str | Path] | None = None,
    count: int = 8,
    gif: bool = False,
    **options: Any,
) -> list[Path]:
    """Draw sheets for image files, or for images spread evenly over the test data set.

    Args:
        models: See ``Models``.
        out_dir: Folder of the pictures.
        images: Image files, which are shown without ground truth; None for the data set.
        count: How many images of the data set.
        gif: Whether to draw an animation instead, whose frames are the blocks.
        **options: Those of ``sheet_of``.

    Returns:
        The paths of the pictures.

    Raises:
        FileNotFoundError: one of the files does not exist.
    """
    cfg = list(models.values())[-1].cfg.test_dataloader.dataset
    if images is None:
        dataset = DATASETS.build(cfg)
        places = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
        items = [dataset[int(place)] for place in places]
    else:
        if missing := [str(path) for path in images if not Path(path).is_file()]:
            raise FileNotFoundError(f'images={missing} are not files')
        steps = [step for step in cfg.pipeline if 'LoadAnnotations' not in str(step['type'])]
        pipeline = Compose([TRANSFORMS.build(step) for step in steps])
        files = [{'img_path': str(path), 'seg_fields': []} for path in images]
        items = [pipeline({**file, 'img_id': number}) for number, file in enumerate(files)]
    paths = []
    for number, data in enumerate(items):
        prefix = '' if images is None else f'{number:03d}_'
        path = Path(out_dir) / f'{prefix}{Path(data["data_samples"].img_path).stem}.png'
        path = path.with_suffix('.gif') if gif else path
        path.parent.mkdir(parents=True, exist_ok=True)
        if gif:
            sheets = frames_of(sheet_of(models, data, **{**options, 'per': 'block'}))
        else:
            sheets = [sheet_of(models, data, **options)]
        first, *more = (Image.fromarray(draw_sheet(sheet)) for sheet in sheets)
        moving: dict[str, Any] = (
            dict(save_all=True, append_images=more, duration=FRAME_MS, loop=0) if gif else {}
        )
        first.save(path, **moving)
        paths.append(path)
    return paths


def sheet_of(
    models: Models,
    data: dict[str, Any],
    score_threshold: float = 0.3,
    per: Literal['stage', 'block'] = 'stage',
) -> Sheet:
    """Run the models on one item of a data set and collect what a sheet shows.

    ``data`` is what the pipeline returned; its ground truth is shown if it loads it. Boxes with a
    lower score are left out. There is a panel of active tokens for each stage or each block.
    """
    found, active = [], []
    *_, idle = models.values()
    for title, model in models.items():
        with torch.no_grad():
            batch = model.data_preprocessor(pseudo_collate([data]), False)
            result = model(**batch, mode='predict')[0]
        found.append((title, prediction_of(result, score_threshold)))
        ratios = getattr(model.backbone, 'keep_ratios', [[1.0]])
        if min(min(stage) for stage in ratios) < 1.0 or model is idle:
            active.append((title, active_shares(idle_backbone(model).keep_masks, per=per)))
    image = mmcv.imread(result.img_path, channel_order='rgb')
    truth = truth_of(data['data_samples'], image.shape[:2])
    if not getattr(model, 'dataset_meta', None):
        # Class names and colours, for which the data set needs no data on disk.
        cfg = dict(model.cfg.test_dataloader.dataset, lazy_init=True)
        model.dataset_meta = DATASETS.build(cfg).metainfo
    shown: list[Any] = [('Ground truth', truth), *found]
    return Sheet(
        image=image,
        classes=model.dataset_meta['classes'],
        input_size=tuple(batch['inputs'].shape[-2:]),
        content_size=content_size(result),
        found=[pair for pair in shown if pair[1] is not None],
        active=[
            (name if len(active) == 1 else f'{title}, {name.lower()}', share)
            for title, shares in active
            for name, share in shares
        ],
        palette=model.dataset_meta.get('palette'),
    )


def frames_of(sheet: Sheet) -> list[Sheet]:
    """A sheet for each block, with the active tokens of all models beside each other."""
    blocks: dict[str, list[Any]] = {}
    for name, share in sheet.active:
        blocks.setdefault(', '.join(name.lower().split(', ')[-2:]), []).append((name, share))
    return [replace(sheet, found=(), active=active) for active in blocks.values()]


@exit_code
def main() -> None:
    """Draw and print the paths."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', type=Path)
    add('checkpoint', type=Path)
    add('--out-dir', type=Path, required=True)
    add('--images', nargs='+', help='image files (default: images of the test data set)')
    add('--count', type=int, default=8, help='how many images of the data set')
    add('--score-thr', type=float, default=0.3, help='lowest score of a box')
    per_help = 'one picture of tokens for each'
    add('--per', choices=['stage', 'block'], default='stage', help=per_help)
    add('--gif', action='store_true', help='an animation over the blocks')
    dense_help = 'the dense model, whose predictions are shown beside'
    add('--dense', nargs=2, metavar=('CONFIG', 'CHECKPOINT'), help=dense_help)
    beside_help = 'another idle model or policy, shown beside with its active tokens'
    add('--beside', nargs=2, metavar=('CONFIG', 'CHECKPOINT'), help=beside_help)
    add('--device', default='cpu')
    add('--cfg-options', nargs='+', action=Overrides, help='overrides')
    args = parser.parse_args()
    sources = {'Idle' if args.dense else 'Prediction': (args.config, args.checkpoint)}
    if args.beside:
        sources = {Path(args.beside[0]).stem: args.beside, args.config.stem: sources.popitem()[1]}
    if args.dense:
        sources = {'Dense': args.dense, **sources}
    models = {
        title: load_model(*source, args.device, args.cfg_options)
        for title, source in sources.items()
    }
    options = {'score_threshold': args.score_thr, 'per': args.per, 'gif': args.gif}
    print(*draw(models, args.out_dir, args.images, args.count, **options), sep='\n')


if __name__ == '__main__':
    sys.exit(main())
