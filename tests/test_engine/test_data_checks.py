"""The checker of data folders: it passes what is right and names what is not."""

import itertools
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from stand_in import write_stand_in

from idlevit_mm.engine import data_checks, doctor
from idlevit_mm.engine.data_checks import check_data, decoded_size, sampled

TOOL = Path(__file__).parents[2] / 'tools' / 'prepare_data.py'
JSON = 'annotations/instances_val2017.json'
IMAGE = 'val2017/000000000139.jpg'
ADE_IMAGE = 'images/validation/ADE_val_00000001.jpg'
ADE_MASK = 'annotations/validation/ADE_val_00000001.png'


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    pytest.importorskip('mmseg')
    folder = tmp_path_factory.mktemp('originals')
    write_stand_in('coco', folder / 'coco', size=64)
    write_stand_in('ade20k', folder / 'ade', size=64)
    return folder


@pytest.fixture
def copy(originals, tmp_path):
    """Copies a data set to a new folder."""
    numbers = itertools.count()

    def copy(dataset):
        name = {'coco': 'coco', 'ade20k': 'ade/ADEChallengeData2016'}[dataset]
        return Path(shutil.copytree(originals / name, tmp_path / str(next(numbers)) / name))

    return copy


@pytest.fixture
def coco(copy):
    return copy('coco')


@pytest.fixture
def ade20k(copy):
    return copy('ade20k')


def contents(root):
    return {str(p): p.read_bytes() for p in sorted(root.rglob('*')) if p.is_file()}


def wrong(findings, status=doctor.WRONG):
    return [f for f in findings if f.status == status]


def test_stand_ins_pass(originals, capsys):
    for name, folder in (
        ('coco', 'coco'),
        ('ade20k', 'ade'),
        ('ade20k', 'ade/ADEChallengeData2016'),
    ):
        findings = check_data(name, originals / folder, deep=True)
        assert doctor.print_report(findings) == 0
        # Both splits are a handful of images, and that is said.
        assert [f.name for f in wrong(findings, doctor.NOTE)] == ['images', 'images']
        assert '4 images, a subset of' in wrong(findings, doctor.NOTE)[0].value


def edit(change):
    """A breakage of the annotation file of val2017, whose first image has annotations 0 and 1."""

    def apply(root):
        content = json.loads((root / JSON).read_text())
        changed = change(content)
        (root / JSON).write_text(json.dumps(content if changed is None else changed))

    return apply


def set_box(box):
    return edit(lambda c: c['annotations'][0].update(bbox=box))


def write_image(image, suffix='.jpg'):
    return lambda root: cv2.imwrite(str(root / IMAGE), image)


def cut(name, share):
    def apply(root):
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: int(len(data) * share)])

    return apply


def rename(old, new):
    def apply(root):
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)

    return apply


def remove(name):
    return lambda root: (root / name).unlink()


def write_mask(change):
    def apply(root):
        mask = change(cv2.imread(str(root / ADE_MASK), cv2.IMREAD_UNCHANGED))
        cv2.imwrite(str(root / ADE_MASK), mask)

    return apply


def set_pixel(value):
    def change(mask):
        mask[3, 5] = value
        return mask

    return change


# Fault -> how to make it, and what is then found to be wrong.
COCO_FAULTS = {
    'no annotation file': (remove(JSON), 'val2017.json is missing'),
    'no image folder': (lambda r: shutil.rmtree(r / 'train2017'), 'train2017 is missing'),
    'empty folder': (lambda r: [p.unlink() for p in (r / 'val2017').iterdir()], 'holds no images'),
    'cut off JSON': (cut(JSON, 0.6), 'cannot be read as JSON'),
    'empty JSON file': (cut(JSON, 0), 'cannot be read as JSON'),
    'JSON of a list': (edit(lambda c: [c]), 'holds a list'),
    'no annotations': (edit(lambda c: c.pop('annotations') and None), "has no list 'annotations'"),
    'annotations empty': (edit(lambda c: c.update(annotations=[])), 'there are none'),
    'image without size': (edit(lambda c: c['images'][1].pop('width') and None), r'images\[1\]'),
    'folder instead of JSON': (
        lambda r: (remove(JSON)(r), (r / JSON).mkdir()),
        'val2017.json is a folder instead of a file',
    ),
    'file instead of images': (
        lambda r: (shutil.rmtree(r / 'val2017'), (r / 'val2017').touch()),
        'val2017 is a file instead of a folder',
    ),
    'width as text': (
        edit(lambda c: c['images'][1].update(width='640')),
        r'has "640" for \'width\' in images\[1\] \(id \d+\), which must be a whole number above 0',
    ),
    'no height': (edit(lambda c: c['images'][0].update(height=0)), r"has 0 for 'height' in images"),
    'no file name': (
        edit(lambda c: c['images'][1].update(file_name=None)),
        r"has null for 'file_name' in images\[1\] \(id \d+\), which must be text",
    ),
    'image id as text': (edit(lambda c: c['images'][0].update(id='139')), r"has \"139\" for 'id'"),
    'id as list': (
        edit(lambda c: c['annotations'][1].update(id=[1])),
        r"has \[1\] for 'id' in anno",
    ),
    'image of a list': (
        edit(lambda c: c['annotations'][0].update(image_id={})),
        r"has \{\} for 'image_id' in annotations\[0\] \(id \d+\), which must be a whole number",
    ),
    'category as text': (
        edit(lambda c: c['annotations'][0].update(category_id='1')),
        "for 'category_id' in annotations",
    ),
    'area of nothing': (
        edit(lambda c: c['annotations'][0].update(area=None)),
        "has null for 'area' in .* a finite number",
    ),
    'crowd as text': (
        edit(lambda c: c['annotations'][0].update(iscrowd='no')),
        'has "no" for \'iscrowd\' in .* 0 or 1',
    ),
    'category without name': (
        edit(lambda c: c['categories'][3].update(name=None)),
        r"has null for 'name' in categories\[3\]",
    ),
    'an image is a folder': (
        lambda r: (remove(IMAGE)(r), (r / IMAGE).mkdir()),
        '000000000139.jpg: .*Is a directory',
    ),
    'panoptic content': (
        edit(lambda c: c['annotations'][0].update(segments_info=[])),
        'panoptic annotation file',
    ),
    'fewer categories': (
        edit(lambda c: c['categories'].pop() and None),
        '79 categories',
        r'1 categories referred to do not exist: annotation \d+ \(90\)',
    ),
    'other names': (
        edit(lambda c: c['categories'][2].update(name='auto')),
        r"\(3, 'auto'\) instead of \(3, 'car'\)",
    ),
    'other order': (edit(lambda c: c['categories'].reverse()), 'another order'),
    'unknown category': (
        edit(lambda c: c['annotations'][0].update(category_id=12)),
        r'categories referred to do not exist: annotation \d+ \(12\)',
    ),
    'unknown image': (
        edit(lambda c: c['annotations'][0].update(image_id=7)),
        r'images referred to do not exist: annotation \d+ \(7\)',
    ),
    'image id twice': (
        edit(lambda c: c['images'][1].update(id=139)),
        'occur twice: 139',
        '3 images referred to do not exist',
        '1 boxes reach outside their image',
    ),
    'annotation id twice': (
        edit(lambda c: c['annotations'][1].update(id=c['annotations'][0]['id'])),
        'occur twice',
    ),
    'box outside': (set_box([40, 30, 60, 10]), 'boxes reach outside their image'),
    'box of corners': (set_box([50, 40, 60, 45]), 'boxes reach outside their image'),
    'negative box': (set_box([5, 5, -2, 4]), 'boxes are not'),
    'box of three': (set_box([5, 5, 2]), 'boxes are not'),
    'box of NaN': (set_box([5, 5, 2, float('nan')]), 'boxes are not'),
    'image missing': (remove(IMAGE), '1 of 3 are not in .*: 000000000139.jpg'),
    'image cut off': (cut(IMAGE, 0.8), '000000000139.jpg: '),
    'image empty': (cut(IMAGE, 0), '000000000139.jpg: is empty'),
    'not an image': (lambda r: (r / IMAGE).write_text('<html>'), 'cannot be decoded'),
    'another size': (write_image(np.zeros((20, 30, 3), np.uint8)), 'is 30x20, not '),
    'nested': (rename('val2017', 'images/val2017'), 'val2017 is missing'),
    'panoptic only': (
        rename(JSON, 'annotations/panoptic_val2017.json'),
        'instances_val2017.json is missing',
    ),
}
ADE20K_FAULTS = {
    'no masks': (lambda r: shutil.rmtree(r / 'annotations/validation'), 'validation is missing'),
    'mask missing': (remove(ADE_MASK), '1 have no mask in .*: ADE_val_00000001'),
    'image missing': (remove(ADE_IMAGE), '1 have no image in .*: ADE_val_00000001'),
    'image cut off': (cut(ADE_IMAGE, 0.8), 'ADE_val_00000001.jpg: '),
    'mask cut off': (cut(ADE_MASK, 0.5), 'ADE_val_00000001.png: '),
    'mask is no picture': (
        lambda r: (r / ADE_MASK).write_text('<html>'),
        'ADE_val_00000001.png: is no image',
    ),
    'mask with a broken chunk': (
        lambda r: (r / ADE_MASK).write_bytes((r / ADE_MASK).read_bytes()[:33] + b'\0' * 64),
        'ADE_val_00000001.png: ',
    ),
    'mask empty': (cut(ADE_MASK, 0), 'ADE_val_00000001.png: '),
    'nested': (rename('images/validation', 'data/images/validation'), 'validation is missing'),
    'full release of 2016': (
        lambda r: (r / 'index_ade20k.mat').touch(),
        'full release of ADE20K.*cannot be converted exactly',
    ),
    'full release of 2021': (
        lambda r: (r / 'ADE20K_2021_17_01').mkdir(),
        'full release of ADE20K.*cannot be converted exactly',
    ),
    'value 151': (write_mask(set_pixel(151)), 'value 151, but with 150 classes the largest is 150'),
    'value 255': (write_mask(set_pixel(255)), 'holds the value 255, but with 150 classes'),
    'RGB': (write_mask(lambda m: np.stack([m, m, m], -1)), 'is of kind RGB'),
    '16 bits': (write_mask(lambda m: m.astype(np.uint16)), 'is of kind I'),
    'another size': (write_mask(lambda m: m[:-1]), 'but its image'),
}
FAULTS = {'coco': COCO_FAULTS, 'ade20k': ADE20K_FAULTS}


@pytest.mark.parametrize('dataset', FAULTS)
def test_every_fault_is_named(copy, dataset):
    found, wanted = {}, {}
    for fault, (apply, *messages) in FAULTS[dataset].items():
        root = copy(dataset)
        apply(root)
        before = contents(root)
        findings = check_data(dataset, root)
        assert contents(root) == before, fault
        assert all(finding.remedy for finding in wrong(findings)), fault
        # The other split is whole and is still looked at, except in another release.
        assert any('decoded' in f.value for f in findings) != ('release' in fault), fault
        # A finding that says what it should becomes that, so that a difference shows the others.
        wanted[fault] = messages
        found[fault] = [
            next((message for message in messages if re.search(message, f.value)), f.value)
            for f in wrong(findings)
        ]
    assert found == wanted


NOTES = {
    'box of no height': (set_box([5, 5, 9, 0]), '1 boxes are smaller than a pixel'),
    'no polygon': (edit(lambda c: c['annotations'][0].update(segmentation=[])), 'usable polygon'),
    'short polygon': (
        edit(lambda c: c['annotations'][0].update(segmentation=[[1, 1, 2, 2]])),
        'usable polygon',
    ),
    'runs of another size': (
        edit(lambda c: c['annotations'][1]['segmentation'].update(size=[5, 5])),
        'usable polygon',
    ),
    'a file more': (lambda r: (r / 'val2017/notes.txt').touch(), '1 files belong to no entry'),
}


def test_what_mmdet_copes_with_is_a_note(copy):
    for name, (apply, message) in NOTES.items():
        apply(root := copy('coco'))
        findings = check_data('coco', root)
        assert not wrong(findings), name
        assert any(message in f.value for f in wrong(findings, doctor.NOTE)), name


def test_a_box_may_reach_out_by_rounding(coco):
    content = json.loads((coco / JSON).read_text())
    width = content['images'][0]['width']
    set_box([width - 10.0, 4, 10.02, 5])(coco)
    assert not wrong(check_data('coco', coco))


def test_full_counts_are_no_subset(coco, monkeypatch):
    monkeypatch.setattr(data_checks, 'COCO_IMAGES', {'train2017': 4, 'val2017': 2})
    findings = {(f.section, f.name): f for f in check_data('coco', coco)}
    assert findings['train2017', 'images'].status == doctor.OK
    assert 'more than the 2' in findings['val2017', 'images'].value


def test_only_deep_checks_look_into_every_file(coco, monkeypatch):
    assert list(sampled(range(1000), True)) == list(range(1000))
    assert len(set(sampled(range(1000), False))) == data_checks.SAMPLE
    assert {0, 999} < set(sampled(range(1000), False))
    monkeypatch.setattr(data_checks, 'SAMPLE', 2)
    cut('val2017/000000000155.jpg', 0.5)(coco)
    findings = check_data('coco', coco)
    assert not wrong(findings)
    assert '2 of 3 decoded (--deep decodes all)' in findings[-1].value
    assert wrong(check_data('coco', coco, deep=True))


def test_sizes_are_those_that_training_sees(tmp_path):
    """A photograph that its EXIF data turn is turned when it is loaded, as are its pixels here."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(tmp_path / 'a.jpg', exif=exif)
    assert decoded_size(tmp_path / 'a.jpg') == (50, 30)
    Image.fromarray(np.zeros((30, 50, 4), np.uint8), 'CMYK').save(tmp_path / 'b.jpg')
    assert decoded_size(tmp_path / 'b.jpg') == (30, 50)


@pytest.fixture
def tool(monkeypatch, capsys, tmp_path):
    """Runs the tool in a folder of its own; returns exit code, output and errors."""
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', [TOOL.name, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TOOL), run_name='__main__')
        return (stop.value.code, *capsys.readouterr())

    return run


def test_exit_codes(tool, coco):
    assert tool('coco', '--root', coco)[0] == 0
    code, out, _ = tool('coco')
    assert code == 1
    assert re.search('Wrong: data/coco: does not exist\n', out)
    assert 'docs/data.md' in out
    assert tool('voc')[0] == 2
    code, _, err = tool('coco', '--root', coco / 'val2017', '--link')
    assert code == 2
    assert err.startswith('error: ')
    assert 'train2017 is missing, nothing was linked' in err


@pytest.mark.parametrize(
    ('dataset', 'target'), [('coco', 'data/coco'), ('ade20k', 'data/ade/ADEChallengeData2016')]
)
def test_link(copy, tool, dataset, target):
    root = copy(dataset)
    before = contents(root)
    code, out, _ = tool(dataset, '--root', root, '--link')
    assert code == 0
    assert f'linked {target}' in out
    assert len([path for path in Path(target).rglob('*') if path.is_symlink()]) == 4
    assert contents(root) == before
    # Once more changes nothing.
    code, out, _ = tool(dataset, '--root', root, '--link')
    assert code == 0
    assert 'linked' not in out


def test_what_is_there_is_never_overwritten(tool, coco):
    mine = Path('data/coco/val2017')
    mine.mkdir(parents=True)
    (mine / 'a.jpg').write_text('mine')
    code, _, err = tool('coco', '--root', coco, '--link')
    assert code == 2
    assert 'data/coco/val2017 exists already' in err
    assert (mine / 'a.jpg').read_text() == 'mine'
    assert not mine.is_symlink()


def test_the_full_release_is_refused(tool, ade20k):
    (ade20k / 'index_ade20k.pkl').touch()
    code, _, err = tool('ade20k', '--root', ade20k, '--link')
    assert code == 2
    assert 'cannot be converted exactly' in err
    assert not Path('data').exists()
