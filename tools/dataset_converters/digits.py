"""Write scikit-learn's handwritten digits as images in a folder for each class.

Splits are those of digit scenes: 1,347 images to train, and 450 by other hands to validate.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from digit_scenes import encoded
from scenes import SPLITS, digit_pool
from sklearn.datasets import load_digits

_INK = 16  # of a pixel that is covered


def write_digits(out_dir: Path, size: int = 32) -> int:
    """Write ``<split>/<class>/<row in scikit-learn's table>.png``, and return how many.

    Files of that name are replaced; ``size`` is the side of an image in pixels.

    Raises:
        ValueError: An image would be smaller than a digit of the table.
    """
    table = load_digits()
    images, labels = table.images, table.target
    if size < images.shape[1]:
        raise ValueError(f'size={size} must be at least {images.shape[1]}')
    for split in SPLITS:
        for row in digit_pool(split):
            path = out_dir / split / str(labels[row]) / f'{row:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            large = cv2.resize(images[row] * (255 / _INK), (size, size))
            path.write_bytes(encoded('.png', np.rint(large).astype(np.uint8)))
    return len(labels)


def main() -> None:
    """Write the data set that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('out_dir', type=Path, help='folder to write, for example data/digits')
    parser.add_argument('--size', type=int, default=32, help='side of an image in pixels')
    args = parser.parse_args()
    try:
        count = write_digits(args.out_dir, args.size)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f'wrote {count} digits in {args.out_dir}')


if __name__ == '__main__':
    main()
