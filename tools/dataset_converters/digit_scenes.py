"""Digit scenes: a small detection and segmentation data set made of what ships with scikit-learn.

Handwritten digits are upscaled, coloured and alpha-blended on crops of two photographs. Boxes,
instance masks and semantic maps are all derived from one map that says which digit owns each
pixel, so they agree exactly. Digits and photo regions of the two splits are disjoint.
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils
from rich.progress import track
from scenes import LAYOUTS, SPLITS, DigitScenesParams, Scene, render_scene

CLASSES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
MARKER = 'digit_scenes.json'
# Raised whenever the same parameters would give other files than before.
FORMAT = 1
_TABLES = 'coco/annotations/instances_{}.json'


def write_digit_scenes(
    out_dir: str | os.PathLike[str], *, progress: bool = True, **parameters: Any
) -> bool:
    """Write a digit-scenes data set, unless the same one is already there.

    A marker file holds the parameters and whether writing was finished; an interrupted set is
    written anew. Files that are not part of it are never touched.

    Args:
        out_dir: Folder to write; created if missing.
        progress: Show a progress bar.
        parameters: Of :class:`DigitScenesParams`.

    Returns:
        True if the set was written, False if it was already there.

    Raises:
        ValueError: A parameter is outside what is allowed.
        FileExistsError: The folder holds other files, or a set with other parameters.
    """
    params, root = DigitScenesParams(**parameters), Path(out_dir)
    if root.exists() and not root.is_dir():
        raise FileExistsError(f'{root} is not a folder')
    new = json.loads(json.dumps(asdict(params)))  # lists for tuples, as in the marker
    about = {'name': 'digit scenes', 'format': FORMAT, 'complete': True, 'parameters': new}
    marker = _read_marker(root)
    counts = zip(SPLITS, (params.num_train, params.num_val), strict=True)
    scenes = [(split, index) for split, count in counts for index in range(count)]
    tables = {_TABLES.format(split) for split in SPLITS if 'coco' in params.layouts}
    wanted = tables.union(*(_image_files(params, *scene) for scene in scenes))
    if marker == about and all((root / name).is_file() for name in wanted):
        return False
    present = next((path for path in root.rglob('*') if not path.is_dir()), None)
    if marker is None and present is not None:
        raise FileExistsError(
            f'{root} holds files that no digit-scenes set left there, such as '
            f'{present.relative_to(root).as_posix()!r}; nothing was written, choose another folder'
        )
    if marker is not None and (old := marker['parameters']) != new:
        differing = [f'{k} {old.get(k)} instead of {new[k]}' for k in new if old.get(k) != new[k]]
        raise FileExistsError(
            f'{root} holds a digit-scenes set with other parameters ({", ".join(differing)}); '
            'choose another folder, or delete this one'
        )
    for folder in {(root / name).parent for name in wanted}:
        folder.mkdir(parents=True, exist_ok=True)
    # From here to the last line the marker says "not complete", whatever happens in between.
    _write_marker(root, {**about, 'complete': False})
    contents: dict[str, dict[str, Any]] = {
        split: {
            'info': {'description': f'digit scenes, {split}', 'parameters': new},
            'images': [],
            'annotations': [],
            'categories': [{'id': i + 1, 'name': name} for i, name in enumerate(CLASSES)],
        }
        for split in SPLITS
    }
    for split, index in track(scenes, 'digit scenes', disable=not progress, transient=True):
        scene = render_scene(params, split, index)
        for name in _image_files(params, split, index):
            picture = scene.image if name.endswith('.jpg') else scene.semantic_map()
            (root / name).write_bytes(encoded(name[-4:], picture))
        _add_to_table(contents[split], scene, index)
    for split in SPLITS if tables else ():
        (root / _TABLES.format(split)).write_bytes(compact_json(contents[split]))
    _write_marker(root, about)
    return True


def encoded(suffix: str, image: np.ndarray) -> bytes:
    """Content of a ``'.jpg'`` or ``'.png'`` file of an image, (H, W, 3) BGR or (H, W) uint8."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if suffix == '.jpg' else []
    return cv2.imencode(suffix, image, options)[1].tobytes()


def compact_json(content: Any) -> bytes:
    """Content of a ``'.json'`` file without spaces."""
    return json.dumps(content, separators=(',', ':')).encode()


def _image_files(params: DigitScenesParams, split: str, index: int) -> list[str]:
    """Relative paths of the files of one image."""
    name, ade = f'{index:06d}', {'train': 'training', 'val': 'validation'}[split]
    of_layout = {
        'coco': [f'coco/{split}/{name}.jpg'],
        'ade': [f'ade/images/{ade}/{name}.jpg', f'ade/annotations/{ade}/{name}.png'],
    }
    return [file for layout in params.layouts for file in of_layout[layout]]


def _add_to_table(table: dict[str, Any], scene: Scene, index: int) -> None:
    """Enter an image and its digits."""
    height, width = scene.owner.shape
    about = {'id': index, 'file_name': f'{index:06d}.jpg', 'height': height, 'width': width}
    table['images'].append(about)
    for digit, label in enumerate(scene.labels):
        mask = scene.mask(digit)
        # Run lengths, because polygons cannot state a pixel mask exactly.
        rle = mask_utils.encode(np.asfortranarray(mask))
        table['annotations'].append(
            {
                # COCO's evaluation takes annotation id 0 for "unmatched", so ids start at 1.
                'id': len(table['annotations']) + 1,
                'image_id': index,
                'category_id': label + 1,
                'bbox': list(scene.box(digit)),
                'area': int(mask.sum()),
                'iscrowd': 0,
                'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode('ascii')},
            }
        )


def _write_marker(root: Path, marker: dict[str, Any]) -> None:
    # Replaced in one step, so that a crash leaves the old marker or the new one, never half.
    temporary = root / f'{MARKER}.tmp'
    temporary.write_text(json.dumps(marker, indent=2) + '\n')
    temporary.replace(root / MARKER)


def _read_marker(root: Path) -> dict | None:
    """The marker of a digit-scenes set, or None if there is none that can be read."""
    try:
        marker = json.loads((root / MARKER).read_text(encoding='utf-8'))
        known = marker['name'] == 'digit scenes' and isinstance(marker['parameters'], dict)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return marker if known else None


def main() -> None:
    """Write the data set that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    pair: dict[str, Any] = dict(nargs=2, type=int, metavar=('MIN', 'MAX'))
    add('out_dir', help='folder to write, for example data/digit_scenes')
    layout_help = 'layouts to write'
    add('--layout', nargs='+', dest='layouts', choices=LAYOUTS, default=LAYOUTS, help=layout_help)
    size_help = 'image side, or height and width'
    add('--size', nargs='+', type=int, default=[128], metavar='PIXELS', help=size_help)
    add('--num-train', type=int, default=2000, help='number of training images')
    add('--num-val', type=int, default=400, help='number of validation images')
    add('--seed', type=int, default=0, help='seed')
    add('--num-digits', **pair, default=[1, 5], help='number of digits in an image')
    add('--digit-scale', **pair, default=[20, 56], help='height of a digit in pixels')
    args = parser.parse_args()
    if len(args.size) > 2:
        parser.error(f'--size takes one or two numbers, got {args.size}')
    args.size = [args.size[0], args.size[-1]]
    try:
        written = write_digit_scenes(**vars(args))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    done = 'wrote' if written else 'already there:'
    print(f'{done} {args.num_train + args.num_val} digit scenes in {args.out_dir}')


if __name__ == '__main__':
    main()
