"""Write a tiny stand-in for COCO 2017 or ADE20K, in exactly the format of the real one."""

import argparse

from idlevit_mm.datasets.stand_in import write_ade20k_stand_in, write_coco_stand_in

WRITERS = {'coco': write_coco_stand_in, 'ade20k': write_ade20k_stand_in}
PLACES = {'coco': 'data/coco', 'ade20k': 'data/ade'}


def main() -> None:
    """Write the data set that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('dataset', choices=WRITERS, help='data set to stand in for')
    add('--out', help='folder to write (default: data/coco or data/ade)')
    add('--num-train', type=int, default=4, help='number of training images (default: 4)')
    add('--num-val', type=int, default=3, help='number of validation images (default: 3)')
    size_help = 'longer side of an image (default: 160)'
    add('--size', type=int, default=160, metavar='PIXELS', help=size_help)
    add('--seed', type=int, default=0, help='seed (default: 0)')
    args = parser.parse_args()
    out = args.out or PLACES[args.dataset]
    try:
        written = WRITERS[args.dataset](out, args.num_train, args.num_val, args.size, args.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    done = 'wrote' if written else 'already there:'
    images = f'{args.num_train} + {args.num_val} images'
    print(f'{done} stand-in for {args.dataset} of {images} in {out}')


if __name__ == '__main__':
    main()
