"""The stand-ins are what mmdet, mmseg and pycocotools expect of COCO 2017 and ADE20K."""

import runpy
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from stand_in import image_size, paint, write_stand_in

from idlevit_mm.datasets.formats import COCO_CATEGORIES

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'dataset_converters' / 'stand_in.py'
WRITERS = {name: partial(write_stand_in, name) for name in ('coco', 'ade20k')}


def contents(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob('*')
        if path.is_file()
    }


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    pytest.importorskip('mmseg')
    folder = tmp_path_factory.mktemp('stand_in')
    for name, write in WRITERS.items():
        assert write(folder / name)
    return folder


@pytest.mark.parametrize('name', WRITERS)
def test_arguments_alone_make_the_bytes_and_other_files_are_never_touched(written, tmp_path, name):
    write = WRITERS[name]
    assert not write(written / name)
    assert write(tmp_path)
    before = contents(tmp_path)
    assert before == contents(written / name)
    for options in (dict(seed=1), dict(num_val=2)):
        with pytest.raises(FileExistsError, match='nothing was written'):
            write(tmp_path, **options)
    assert contents(tmp_path) == before
    sorted(tmp_path.rglob('*.jpg'))[0].unlink()
    assert write(tmp_path)
    assert contents(tmp_path) == before


def test_categories_are_mmdets():
    METAINFO = pytest.importorskip('mmdet.datasets').CocoDataset.METAINFO
    assert tuple(c.name for c in COCO_CATEGORIES) == METAINFO['classes']
    ids = [c.id for c in COCO_CATEGORIES]
    # The ten ids that COCO published no boxes for.
    assert sorted(set(range(1, 91)) - set(ids)) == [12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    assert ids == sorted(ids)
    # COCO's table of supercategories, by number of their categories.
    sizes = {}
    for category in COCO_CATEGORIES:
        sizes[category.supercategory] = sizes.get(category.supercategory, 0) + 1
    assert list(sizes.values()) == [1, 8, 5, 10, 5, 10, 7, 10, 6, 6, 5, 7]


@pytest.mark.parametrize(('split', 'count'), [('train2017', 4), ('val2017', 3)])
def test_coco_is_what_it_stands_in_for(written, split, count, capsys):
    folder = written / 'coco'
    coco = COCO(str(folder / f'annotations/instances_{split}.json'))
    names = {path.name for path in (folder / split).iterdir()}
    assert {info['file_name'] for info in coco.imgs.values()} == names
    assert len(names) == count
    shapes, channels = [], []
    for index, (image_id, info) in enumerate(sorted(coco.imgs.items())):
        assert info['file_name'] == f'{image_id:012d}.jpg'
        image = cv2.imread(str(folder / split / info['file_name']), cv2.IMREAD_UNCHANGED)
        assert image.shape[:2] == (info['height'], info['width']) == image_size(160, index)
        shapes.append(image.shape[:2])
        channels.append(image.ndim)

        scene = paint(split, index, 160, 0)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image_id))
        crowds = [ann['iscrowd'] for ann in annotations]
        assert sum(crowds) == (index == 0)
        assert len(annotations) == {0: 2, count - 1: 0}.get(index, len(scene.labels))
        for number, ann in enumerate(annotations):
            truth = scene.mask(number) if not ann['iscrowd'] else (scene.owner > 1)
            mask = coco.annToMask(ann)
            assert ann['area'] == mask.sum() > 0
            assert ann['category_id'] in coco.cats
            ys, xs = np.nonzero(mask)
            assert ann['bbox'] == [
                *(xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1)
            ]
            if ann['iscrowd']:
                assert np.array_equal(mask, truth)
            else:
                # The outline follows the mask, its holes filled, to a pixel.
                outlines, _ = cv2.findContours(truth, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
                filled = cv2.drawContours(truth.copy(), outlines, -1, 1, cv2.FILLED)
                pixel = np.ones((3, 3), np.uint8)
                assert np.all(cv2.erode(filled, pixel) <= mask)
                assert np.all(mask <= cv2.dilate(filled, pixel))
    assert channels == [3, 2, *[3] * (count - 2)]
    assert len(set(shapes)) == count
    assert all(side % 2 for shape in shapes for side in shape)
    assert any(h > w for h, w in shapes)
    assert any(h < w for h, w in shapes)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_mmdet_reads_coco(written, split):
    datasets = pytest.importorskip('mmdet.datasets')
    dataset = datasets.CocoDataset(
        data_root=str(written / 'coco'),
        ann_file=f'annotations/instances_{split}2017.json',
        data_prefix=dict(img=f'{split}2017/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        test_mode=split == 'val',
    )
    assert len(dataset.cat_ids) == 80
    instances = [info['instances'] for info in map(dataset.get_data_info, range(len(dataset)))]
    # Training leaves the image without annotations out, validation does not.
    assert [len(found) > 0 for found in instances] == [True, True, split == 'train']
    labels = {instance['bbox_label'] for found in instances for instance in found}
    assert labels <= set(range(80))
    assert sum(instance['ignore_flag'] for found in instances for instance in found) == 1


@pytest.mark.parametrize(
    ('split', 'short', 'count'), [('training', 'train', 4), ('validation', 'val', 3)]
)
def test_mmseg_reads_ade20k(written, split, short, count):
    datasets = pytest.importorskip('mmseg.datasets')
    folder = written / 'ade20k' / 'ADEChallengeData2016'
    dataset = datasets.ADE20KDataset(
        data_root=str(folder),
        data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'annotations/{split}'),
    )
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    assert [Path(info['img_path']).name for info in infos] == [
        f'ADE_{short}_{number:08d}.jpg' for number in range(1, count + 1)
    ]
    for index, info in enumerate(infos):
        image = cv2.imread(info['img_path'])
        mask = cv2.imread(info['seg_map_path'], cv2.IMREAD_UNCHANGED)
        assert mask.dtype == np.uint8
        assert mask.shape == image.shape[:2] == image_size(160, index)
        assert mask.max() <= 150
        assert {0, 1 + index} < set(np.unique(mask))
    names = [line.split()[0] for line in (folder / 'sceneCategories.txt').read_text().splitlines()]
    assert {Path(info['img_path']).stem for info in infos} < set(names)
    table = (folder / 'objectInfo150.txt').read_text().splitlines()
    assert [line.split('\t')[-1] for line in table[1:]] == [
        name.strip() for name in dataset.metainfo['classes']
    ]


def test_sizes(tmp_path):
    for size in (64, 65):
        folder = tmp_path / str(size)
        write_stand_in('coco', folder, num_train=6, num_val=1, size=size, seed=3)
        for path in folder.rglob('*.jpg'):
            height, width = cv2.imread(str(path)).shape[:2]
            assert size - 10 <= max(height, width) <= size
            assert min(height, width) >= 32


def test_bad_values(tmp_path):
    for write in WRITERS.values():
        for options in (
            *(dict(num_train=0), dict(num_val=-1), dict(size=63), dict(seed=-1), dict(size=99.5)),
        ):
            (key,) = options
            with pytest.raises(ValueError, match=f'{key} must be an integer'):
                write(tmp_path / 'new', **options)
    assert not (tmp_path / 'new').exists()


def test_tool(tmp_path, monkeypatch, capsys):
    def run(*options):
        monkeypatch.setattr(sys, 'argv', [TOOL.name, 'coco', '--size', '64', *options])
        monkeypatch.chdir(tmp_path)
        code = 0
        try:
            runpy.run_path(str(TOOL), run_name='__main__')
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    assert run()[:2] == (0, 'wrote stand-in for coco of 4 + 3 images in data/coco\n')
    assert 'already there' in run()[1]
    code, _, err = run('--seed', '1')
    assert code == 2
    assert 'data/coco holds other files' in err
    assert run('--out', 'other', '--seed', '1', '--num-train', '1')[0] == 0
    assert len(list(Path('other/train2017').iterdir())) == 1
