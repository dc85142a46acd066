"""Convert the weights of a backbone, detector or segmentor to the names of another project.

Reads .pth and .safetensors files, addresses, and timm models by name (timm://NAME); tells from
the names of the weights what they are. Of a whole detector or segmentor, mmdet and mmseg keep
necks and heads; the other formats take the backbone alone.
"""

import argparse

from mmengine.registry import MODELS

from idlevit_mm.analysis.models import load_config
from idlevit_mm.checkpoints import compare, split_backbone
from idlevit_mm.converters import OPENMMLAB, TARGETS, convert_file
from idlevit_mm.engine.launch import run_tool


def convert() -> None:
    """Do what the command line asks for, and print what became of the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('source', help='file, address, or timm:// and the name of a timm model')
    add('target', help='.pth or .safetensors file to write; it must not exist')
    add('--to', required=True, choices=TARGETS, help='whose names to give')
    add('--window-size', type=int, help="resize Swin's relative position tables to this window")
    size_help = 'resize absolute position tables to images of this side, or height and width'
    add('--img-size', type=int, nargs='+', metavar='PIXELS', help=size_help)
    head_help = "keep a release's classifier, for mmpretrain's ImageClassifier (plain ViT)"
    add('--with-head', action='store_true', help=head_help)
    add('--config', help='also compare what is written with the model of this config file')
    args = parser.parse_args()
    if args.config is not None and TARGETS[args.to] != OPENMMLAB:
        parser.error('--config goes with --to mmdet or --to mmseg')
    if args.img_size is not None and len(args.img_size) > 2:
        parser.error(f'--img-size takes one number or two, not {len(args.img_size)}')
    if args.config is not None:
        # What is wrong with it shows before anything is written.
        model = MODELS.build(load_config(args.config).model)
    size = args.img_size and (args.img_size[0], args.img_size[-1])
    how = args.window_size, size, args.with_head
    converted = convert_file(args.source, args.target, args.to, *how)
    print(f'{args.source}: {converted.source.title}')
    print(f'{args.target}: {converted.target.title}')
    print('\n'.join(converted.report.lines()))
    if args.config is not None:
        print(f'compared with the model of {args.config}:')
        state, others = split_backbone(converted.weights)
        if others:
            report = compare(model.state_dict(), converted.weights)
        else:  # of a backbone alone
            backbone = getattr(model, 'backbone', model)
            report = compare(backbone.state_dict(), state, policy_too=False)
        print('\n'.join(report.lines()))


if __name__ == '__main__':
    run_tool(convert)
