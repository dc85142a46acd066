"""Broken images, masks and annotation files: left out by name, or one clear line; work is kept."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose, ConcatDataset, RepeatDataset
from mmengine.registry import DATASETS, DefaultScope, init_default_scope
from PIL import Image

from idlevit_mm.engine import BadSampleError, SettingError, bad_samples, data_sets
from idlevit_mm.engine.bad_samples import guard
from idlevit_mm.engine.data_checks import mask_problem
from idlevit_mm.engine.data_sets import check_built, class_counts, naming_the_data
from idlevit_mm.engine.launch import evaluate_from_config, run_tool, train_from_config

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

ROOT = Path(__file__).parents[2]
SPLITS = {'train': 'training', 'val': 'validation'}


@pytest.fixture
def place(scenes, tmp_path):
    """A copy of the scenes, to be damaged: 90 pixels wide and 70 high."""
    return Path(shutil.copytree(scenes, tmp_path / 'digit_scenes'))


def image_of(place, task, split, number=1):
    names = {'det': f'coco/{split}', 'seg': f'ade/images/{SPLITS[split]}'}
    return place / names[task] / f'{number:06d}.jpg'


def mask_of(place, split, number=1):
    return place / f'ade/annotations/{SPLITS[split]}/{number:06d}.png'


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(change, suffix='.png'):
    """Reads, changes and writes a picture; its name stays, whatever its format becomes."""

    def apply(path):
        image = change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
        path.write_bytes(cv2.imencode(suffix, image)[1].tobytes())

    return apply


def to_cmyk(path):
    with Image.open(path) as image:
        converted = image.convert('CMYK')
    converted.save(path, 'JPEG')


def set_corner(value):
    def change(mask):
        mask[0, 0] = value
        return mask

    return rewrite(change)


BAD_IMAGES = {
    'cut off': (cut, 'cannot be read (not an image, or cut off)'),
    'empty': (lambda path: path.write_bytes(b''), 'is empty'),
    'not an image': (lambda path: path.write_text('<html>'), 'cannot be read'),
    'missing': (Path.unlink, 'does not exist'),
    'one pixel': (rewrite(lambda image: image[:1, :1]), '1x1'),
    'one row': (rewrite(lambda image: image[:1]), '90x1'),
}
BAD_MASKS = {
    'cut off': (cut, 'cannot be read'),
    'empty': (lambda path: path.write_bytes(b''), 'is empty'),
    'missing': (Path.unlink, 'does not exist'),
    # 11 classes, of which ADE20K's coding makes 1 to 11; 0 and 255 are ignored.
    'value 12': (set_corner(12), 'holds the value 12, but with 11 classes the largest is 11'),
    'value 200': (set_corner(200), 'holds the value 200'),
    'another size': (rewrite(lambda mask: mask[:-5]), 'is 90x65, but its image'),
    'three channels': (rewrite(lambda mask: np.stack([mask] * 3, -1)), 'has 3 channels'),
}
GOOD_IMAGES = {
    'grey': rewrite(lambda image: cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), '.jpg'),
    'CMYK': to_cmyk,
    '16 bits': rewrite(lambda image: image.astype(np.uint16) * 257),
    'opacity': rewrite(lambda image: cv2.cvtColor(image, cv2.COLOR_BGR2BGRA)),
}
BASES = {'det': 'digit_scenes_instance.py', 'seg': 'digit_scenes_semantic.py'}
FOLDERS = {'det': 'coco', 'seg': 'ade'}
SCOPES = {'det': 'mmdet', 'seg': 'mmseg'}


@pytest.fixture
def build(place):
    """Builds a data set of the damaged scenes by the shipped config, guarded."""

    def build(task, split, guarded=True):
        config = Config.fromfile(ROOT / 'configs' / '_base_' / 'datasets' / BASES[task])
        config = config[f'{split}_dataloader'].dataset
        config.data_root = str(place / FOLDERS[task])
        before = DefaultScope.get_current_instance()
        init_default_scope(SCOPES[task])
        try:
            dataset = DATASETS.build(config)
        finally:
            init_default_scope(before.scope_name if before else 'mmengine')
        if guarded:
            guard(dataset, training=split == 'train')
        return dataset

    return build


@pytest.fixture
def said(monkeypatch):
    """What is logged: level and text."""
    said = []
    for module in (bad_samples, data_sets):
        monkeypatch.setattr(
            module, 'print_log', lambda text, logger, level: said.append((level, text))
        )
    return said


@pytest.mark.parametrize(
    ('task', 'part', 'faults'),
    [
        ('det', 'image', BAD_IMAGES),
        ('seg', 'image', {kind: BAD_IMAGES[kind] for kind in ('cut off', 'missing')}),
        ('seg', 'mask', BAD_MASKS),
    ],
)
def test_bad_samples(place, build, said, task, part, faults):
    datasets = {split: build(task, split, guarded=False) for split in SPLITS}
    pipelines = {split: dataset.pipeline for split, dataset in datasets.items()}
    paths = {s: image_of(place, task, s) if part == 'image' else mask_of(place, s) for s in SPLITS}
    for split, path in paths.items():
        records = [str(datasets[split].get_data_info(i)) for i in range(len(datasets[split]))]
        assert sum(str(path) in record for record in records) == 1
    train, val = datasets.values()
    named, refused = {}, {}
    for kind, (apply, message) in faults.items():
        said.clear()
        originals = {path: path.read_bytes() for path in paths.values()}
        for split, path in paths.items():
            datasets[split].pipeline = pipelines[split]
            guard(datasets[split], training=split == 'train')
            apply(path)
        # Training: others take its place, and it is named once.
        shapes = {train[index]['inputs'].shape for index in [*range(len(train))] * 3}
        assert shapes == {(3, 70, 90)}, kind
        ((level, text),) = said
        assert level == logging.WARNING
        assert text.startswith('left out of training: ')
        assert '000001' in text
        named[kind] = message if message in text else text

        # Validation: an error, also from another process, and the others are still read.
        loader = torch.utils.data.DataLoader(val, num_workers=int(kind == 'empty'), collate_fn=list)
        with pytest.raises(BadSampleError) as error:
            list(loader)
        assert str(paths['val']) in str(error.value), kind
        assert '\n' not in str(error.value), kind
        refused[kind] = message if message in str(error.value) else str(error.value)
        assert val[0]['inputs'].shape == (3, 70, 90)
        for path, content in originals.items():
            path.write_bytes(content)
    assert named == refused == {kind: message for kind, (_, message) in faults.items()}


def swap_sizes(place, split):
    """Exchanges height and width of every image in an annotation file."""
    path = place / f'coco/annotations/instances_{split}.json'
    content = json.loads(path.read_text())
    for image in content['images']:
        image['height'], image['width'] = image['width'], image['height']
    path.write_text(json.dumps(content))


@pytest.mark.parametrize('split', SPLITS)
def test_wrong_sizes_in_the_annotations_matter_to_masks_only(place, build, said, split):
    swap_sizes(place, split)
    dataset = build('det', split, guarded=False)
    transforms = dataset.pipeline.transforms
    (annotations,) = (t for t in transforms if type(t).__name__ == 'LoadAnnotations')
    assert annotations.with_mask
    annotations.with_mask = False
    guard(dataset, training=split == 'train')
    for index in range(len(dataset)):
        assert dataset[index]['inputs'].shape == (3, 70, 90)
    # Once for the data set, not for each of its images.
    ((level, text),) = said
    assert level == logging.WARNING
    assert 'is 90x70, but the annotation file says 70x90. It is used' in text
    annotations.with_mask = True
    dataset.pipeline = Compose(transforms)
    guard(dataset, training=split == 'train')
    message = 'is 90x70, but the annotation file says 70x90'
    with pytest.raises(BadSampleError, match=message):
        dataset[0]


@pytest.mark.parametrize('task', BASES)
def test_other_kinds_of_images_are_fine(place, build, task):
    dataset, path = build(task, 'val'), image_of(place, task, 'val')
    expected, original = dataset[1]['inputs'].float(), path.read_bytes()
    for kind, apply in GOOD_IMAGES.items():
        path.write_bytes(original)
        apply(path)
        inputs = dataset[1]['inputs']
        assert inputs.dtype == torch.uint8
        assert inputs.shape == expected.shape
        if kind in ('16 bits', 'opacity'):
            # JPEG's losses are not repeated: these are the same pixels.
            assert torch.allclose(inputs.float(), expected, atol=1), kind
        else:
            grey = expected.mean(0, keepdim=True) if kind == 'grey' else expected
            assert (inputs.float() - grey).abs().mean() < 30, kind


class Records(BaseDataset):
    """Data set of numbered files, every one of which `broken` may refuse."""

    METAINFO = dict(classes=('one',))

    def __init__(self, number, broken):
        self.number, self.broken = number, broken
        super().__init__(pipeline=[])
        self.pipeline = Compose([LoadRecord(broken)])

    def load_data_list(self):
        return [dict(img_path=f'{i}.jpg') for i in range(self.number)]


class LoadRecord:
    def __init__(self, broken):
        self.broken = broken

    def __call__(self, data):
        if self.broken(int(data['img_path'].split('.')[0])):
            raise OSError('is broken')
        return data


class Fails:
    def __call__(self, data):
        raise ZeroDivisionError('a fault of the code')


def read(dataset, number):
    guard(dataset, training=True)
    for index in range(number):
        dataset[index % len(dataset)]
    return dataset.pipeline


@pytest.mark.parametrize(
    ('size', 'broken', 'fails'),
    [
        (4, lambda i: i == 2, False),
        (4, lambda i: True, True),
        (2000, lambda i: i % 200 == 0, False),
        (2000, lambda i: i % 50 == 0, True),
        (100, lambda i: i < 11, True),
        (100, lambda i: i < 10, False),
    ],
)
def test_few_are_left_out_but_not_many(size, broken, fails):
    dataset = Records(size, broken)
    if not fails:
        pipeline = read(dataset, 2 * size)
        assert len(pipeline.bad) == sum(map(broken, range(size)))
        return
    with pytest.raises(BadSampleError, match=r'too many to leave them out; the last: \d+\.jpg'):
        read(dataset, 2 * size)


def test_other_transforms_keep_their_errors():
    dataset = Records(3, lambda i: False)
    dataset.pipeline = Compose([LoadRecord(lambda i: False), Fails()])
    with pytest.raises(ZeroDivisionError, match='a fault of the code'):
        read(dataset, 1)


def test_a_pipeline_may_give_up_in_training_only():
    for training in (True, False):
        dataset = Records(2, lambda i: False)
        dataset.max_refetch = 3
        dataset.pipeline = Compose([lambda data: None])
        guard(dataset, training)
        if training:
            with pytest.raises(Exception, match='Cannot find valid image after 3'):
                dataset[0]
            assert not dataset.pipeline.bad
        else:
            with pytest.raises(BadSampleError, match=r'0\.jpg was given up'):
                dataset[0]


def test_wrapped_data_sets_are_guarded_and_travel_to_workers(build):
    parts = [build('seg', 'train', guarded=False) for _ in range(2)]
    guard(ConcatDataset(parts), training=True)
    repeated = build('seg', 'train', guarded=False)
    guard(RepeatDataset(repeated, 2), training=True)
    for part in (*parts, repeated):
        copied = pickle.loads(pickle.dumps(part.pipeline))
        assert copied.training
        assert copied.num_classes == 11


def test_the_text_of_a_workers_traceback_is_left_behind():
    text = (
        'Caught BadSampleError in DataLoader worker process 0.\nOriginal Traceback (most recent '
        'call last):\n  File "x.py"\nidlevit_mm.errors.BadSampleError: a.jpg is empty\n'
    )
    assert str(BadSampleError(text)) == 'a.jpg is empty'
    assert str(BadSampleError('a.jpg is empty')) == 'a.jpg is empty'


def test_programming_errors_while_building_pass():
    with pytest.raises(ZeroDivisionError), naming_the_data('train', {}):
        1 / 0  # noqa: B018
    with (
        pytest.raises(SettingError, match=r'val_dataloader .*ann_file a\.json.*KeyError.*images'),
        naming_the_data('val', dict(dataset=dict(ann_file='a.json'))),
    ):
        raise KeyError('images')


def numbered(number):
    """A module that has classes."""
    module = torch.nn.Module()
    module.num_classes = number
    return module


def nested(**children):
    """A module of modules."""
    parent = torch.nn.Module()
    for name, child in children.items():
        setattr(parent, name, child)
    return parent


def test_heads_that_count_classes():
    model = nested(
        backbone=numbered(1000),
        rpn_head=numbered(1),
        roi_head=nested(
            bbox_head=torch.nn.ModuleList([numbered(80), numbered(80)]), mask_head=numbered(80)
        ),
        semantic_head=numbered(183),
    )
    assert class_counts(model) == {
        'roi_head.bbox_head.0': 80,
        'roi_head.bbox_head.1': 80,
        'roi_head.mask_head': 80,
    }


class Named:
    """As much of a data set as the check of classes looks at."""

    def __init__(self, **metainfo):
        self.metainfo = metainfo


def test_more_classes_than_the_data_have_are_warned_of(said):
    data = Named(classes=tuple('abcde'))
    check_built(data, nested(bbox_head=numbered(5)), 'train')
    assert not said
    check_built(data, nested(bbox_head=numbered(6)), 'train')
    ((level, text),) = said
    assert level == logging.WARNING
    assert 'model.bbox_head.num_classes=6, but Named of train_dataloader has 5 classes' in text
    assert '(a, b, c and 2 more)' in text
    with pytest.raises(SettingError, match=r'num_classes=4, but .* 5 classes'):
        check_built(data, nested(bbox_head=numbered(4)), 'train')


class OfSomebodyElse(torch.nn.Module):
    num_classes = 2


def agnostic():
    module = numbered(1)
    module.class_agnostic = True
    return module


@pytest.mark.parametrize(
    ('model', 'phase'),
    [
        (nested(auxiliary_head=numbered(2)), 'train'),
        (nested(auxiliary_head=torch.nn.ModuleList([numbered(5), numbered(2)])), 'train'),
        (nested(boundary_head=numbered(1)), 'train'),
        (nested(roi_head=nested(mask_head=agnostic())), 'train'),
        (nested(bbox_head=OfSomebodyElse()), 'train'),
        (nested(decode_head=numbered(2)), 'val'),
    ],
)
def test_heads_with_fewer_classes_that_can_run_are_warned_of(said, model, phase):
    check_built(Named(classes=tuple('abcde')), model, phase)
    assert 'has 5 classes' in said[0][1]


def test_proposals_have_one_class(said):
    check_built(Named(classes=tuple('abcde')), nested(rpn_head=numbered(1)), 'train')
    assert not said


@pytest.mark.parametrize('owner', ['data set', 'head'])
def test_any_label_may_be_ignored(owner):
    leaf = Named(classes=tuple('abc'))
    leaf.pipeline = Compose([])
    head = torch.nn.Module()
    (leaf if owner == 'data set' else head).ignore_index = 254
    guard(leaf, True, nested(decode_head=head))
    assert leaf.pipeline.ignored == {254, 255}
    labels = np.array([[0, 254], [255, 2]])
    wrong = np.array([[0, 253], [255, 2]])
    arguments = ((2, 2), 'mask', 'image', 3, 0)
    assert mask_problem(labels, *arguments, leaf.pipeline.ignored) is None
    assert 'value 253' in mask_problem(wrong, *arguments, leaf.pipeline.ignored)


def test_the_entry_of_an_annotation_file_is_named(tmp_path):
    table = dict(images=[dict(id=1, height=2, width=2)], annotations=[], categories=[])
    (tmp_path / 'a.json').write_text(json.dumps(table))
    data = dict(type='CocoDataset', data_root=str(tmp_path), ann_file='a.json')
    with (
        pytest.raises(SettingError, match=r"a\.json.*without 'file_name': images\[0\]"),
        naming_the_data('val', dict(dataset=data)),
    ):
        raise KeyError('file_name')


def test_heads_of_boxes_know_things_only_and_texts_say_what_classes_are():
    for name in ('language_model', 'text_encoder'):
        text = nested(**{name: torch.nn.Linear(1, 1)}, bbox_head=numbered(2))
        check_built(Named(classes=tuple('abcde')), text, 'train')
    data = Named(classes=tuple('abcde'), thing_classes=tuple('abc'))
    model = nested(
        roi_head=nested(bbox_head=numbered(3)), panoptic_head=numbered(5), semantic_head=numbered(3)
    )
    check_built(data, model, 'train')
    with pytest.raises(SettingError, match=r'model.roi_head.bbox_head.num_classes=2.* 3 classes'):
        check_built(data, nested(roi_head=nested(bbox_head=numbered(2))), 'train')
    with pytest.raises(SettingError, match=r'model.panoptic_head.num_classes=3.* 5 classes'):
        check_built(data, nested(panoptic_head=numbered(3)), 'train')
    # Classes of a person's own: mmdet's things are not among them.
    data = Named(classes=tuple('xyzvw'), thing_classes=tuple('abc'))
    check_built(data, nested(roi_head=nested(bbox_head=numbered(2))), 'train')


# -------------------------------------------------------------------- through tools/train.py

LOADERS = """
data_root = '{data}'
train_dataloader = dict(
    batch_size=2, num_workers={workers}, persistent_workers=False, dataset=dict(data_root=data_root)
)
val_dataloader = dict(
    batch_size=1, num_workers={workers}, persistent_workers=False, dataset=dict(data_root=data_root)
)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1, val_interval=1)
work_dir = '{work}'
visualizer = dict(name='{name}')
experiment_name = '{name}'
"""
CONFIGS = {
    'det': """
_base_ = '{root}/configs/digit_scenes/retinanet_idle-swin_digits.py'
val_evaluator = dict(ann_file='{data}/annotations/instances_val.json')
test_evaluator = val_evaluator
model = dict(test_cfg=dict(score_thr=0.0))
""",
    'seg': """
_base_ = '{root}/configs/digit_scenes/fpn_idle-pvtv2_digits.py'
""",
}


@pytest.fixture
def train(place, tmp_path, capfd):
    """Trains an epoch as the tool does; returns exit code, checkpoints, and what was said."""

    def train(task, workers=0, function=train_from_config, **options):
        values = dict(
            root=ROOT,
            data=place / FOLDERS[task],
            work=tmp_path / 'work',
            workers=workers,
            # mmengine keeps visualisers and message hubs by name for good.
            name=f'{tmp_path.parent.name}_{tmp_path.name}',
        )
        config = tmp_path / 'config.py'
        config.write_text((CONFIGS[task] + LOADERS).format(**values))
        code = 0
        try:
            run_tool(function, config=str(config), **options)
        except SystemExit as stop:
            code = stop.code
        said = capfd.readouterr()
        work = {path.name for path in (tmp_path / 'work').glob('epoch_*.pth')}
        return code, sorted(work), said.out + said.err

    return train


@pytest.mark.parametrize('task', CONFIGS)
def test_a_broken_file_ends_no_training_and_is_named_in_validation(place, train, task):
    learned, measured = (image_of(place, task, split) for split in SPLITS)
    cut(learned)
    cut(measured)
    # Data are read by other processes, whose errors arrive here as tracebacks.
    code, checkpoints, said = train(task, workers=1)
    assert code == 2
    assert f'left out of training: {learned}' in said
    assert checkpoints == ['epoch_1.pth']
    assert f'error: {measured} cannot be read' in said.splitlines()[-1]
    assert 'Traceback' not in said
    if task == 'det':
        arguments = dict(checkpoint=str(place.parent / 'work' / 'epoch_1.pth'))
        code, _, said = train(task, function=evaluate_from_config, **arguments)
        assert code == 2
        assert f'error: {measured} cannot be read' in said.splitlines()[-1]


def test_too_few_classes_are_told_before_training(train):
    code, checkpoints, said = train('det', cfg_options={'model.bbox_head.num_classes': 5})
    assert code == 2
    assert not checkpoints
    assert 'error: model.bbox_head.num_classes=5, but ' in said.splitlines()[-1]


ANNOTATIONS = {
    'empty file': (lambda content: '', 'does not build (ann_file'),
    'no tables': (lambda content: {}, "no key 'categories'"),
    'no annotations': (lambda content: {**content, 'annotations': []}, None),
    'no images': (lambda content: {**content, 'images': [], 'annotations': []}, 'no image is left'),
    'other names': (
        lambda content: {
            **content,
            'categories': [
                {'id': c['id'], 'name': f'a {c["name"]}'} for c in content['categories']
            ],
        },
        None,
    ),
    'the first class missing': (
        lambda content: {**content, 'categories': content['categories'][1:]},
        'categories of these names for 9 only',
    ),
}


@pytest.mark.parametrize('split', SPLITS)
def test_annotation_files(place, build, split):
    path = place / f'coco/annotations/instances_{split}.json'
    original = json.loads(path.read_text())
    found, wanted = {}, {}
    for kind, (change, message) in ANNOTATIONS.items():
        content = change(original)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        config = dict(dataset=dict(ann_file=str(path)))
        with pytest.raises(SettingError) as error:  # noqa: PT012 (either of two steps may refuse)
            with naming_the_data(split, config):
                dataset = build('det', split)
            check_built(dataset, torch.nn.Module(), split)
        assert str(path) in str(error.value), kind
        assert '\n' not in str(error.value), kind
        # Training filters images without boxes away first, validation keeps them.
        if message is None:
            message = (
                'no image is left'
                if split == 'train'
                else {'no annotations': 'no box in any', 'other names': 'for 0 only'}[kind]
            )
        wanted[kind] = message
        found[kind] = message if message in str(error.value) else str(error.value)
    assert found == wanted


def test_missing_last_classes_shift_no_label(place, build, said):
    path = place / 'coco/annotations/instances_val.json'
    content = json.loads(path.read_text())
    content['categories'] = content['categories'][:-1]
    path.write_text(json.dumps(content))
    dataset = build('det', 'val')
    assert list(dataset.cat2label.values()) == list(range(9))
    check_built(dataset, torch.nn.Module(), 'val')
    assert 'categories of these names for 9 only' in said[0][1]


def test_masks_without_an_image_are_named(place, build, said):
    dataset = build('seg', 'val')
    check_built(dataset, torch.nn.Module(), 'val')
    assert not said
    image_of(place, 'seg', 'val').unlink()
    check_built(build('seg', 'val'), torch.nn.Module(), 'val')
    ((_, text),) = said
    assert 'of val_dataloader: 1 masks of ' in text
    assert text.endswith('are not used: 000001.png')


def shrink(place, split):
    """Makes the first image of a split a single pixel, rightly annotated, without a box."""
    pixel = cv2.imencode('.jpg', np.full((1, 1, 3), 90, np.uint8))[1]
    image_of(place, 'det', split, 0).write_bytes(pixel.tobytes())
    path = place / f'coco/annotations/instances_{split}.json'
    content = json.loads(path.read_text())
    content['images'][0].update(height=1, width=1)
    number = content['images'][0]['id']
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != number]
    path.write_text(json.dumps(content))


def test_one_pixel_images_and_batches_without_boxes(place, train):
    for split in SPLITS:
        shrink(place, split)
    # Each batch is one image, and the first has no box.
    options = {
        'train_dataloader.batch_size': 1,
        'train_dataloader.dataset.filter_cfg.filter_empty_gt': False,
    }
    code, checkpoints, said = train('det', cfg_options=options)
    assert code == 0, said
    assert len(checkpoints) == 1
    assert 'left out' not in said
    state = torch.load(place.parent / 'work' / checkpoints[-1], weights_only=True)['state_dict']
    assert all(bool(torch.isfinite(value.float()).all()) for value in state.values())


def test_masks_that_mmseg_cannot_load(place, build, said):
    for shape in ((1, 1), (1, 40), (40, 1)):
        said.clear()
        for split in SPLITS:
            image = np.full((*shape, 3), 90, np.uint8)
            image_of(place, 'seg', split).write_bytes(cv2.imencode('.jpg', image)[1].tobytes())
            cv2.imwrite(str(mask_of(place, split)), np.ones(shape, np.uint8))
        assert build('seg', 'train')[1]['inputs'].shape == (3, 70, 90)
        ((_, text),) = said
        assert text.endswith('000001.png is one pixel high or wide, which mmseg cannot load')
        with pytest.raises(BadSampleError, match='one pixel high or wide'):
            build('seg', 'val')[1]
