"""The digit-scenes writer: deterministic, exact, split cleanly, and careful with other files."""

import json
import runpy
import sys
from pathlib import Path

import cv2
import digit_scenes
import numpy as np
import pytest
import scenes
from digit_scenes import CLASSES, MARKER, write_digit_scenes
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from scenes import (
    MIN_VISIBLE,
    DigitScenesParams,
    Scene,
    digit_pool,
    photo_columns,
    render_scene,
)

TOOL = Path(__file__).parents[2] / 'tools' / 'dataset_converters' / 'digit_scenes.py'
SMALL = dict(size=(96, 80), num_train=6, num_val=4, num_digits=(1, 4), digit_scale=(12, 30))


def write(out_dir: Path, **options: object) -> bool:
    return write_digit_scenes(out_dir, **{**SMALL, 'progress': False, **options})


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }


@pytest.fixture(scope='module')
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('scenes') / 'set'
    assert write(root)
    return root


def test_parameters_alone_make_the_bytes(written: Path, tmp_path: Path) -> None:
    assert write(tmp_path / 'again')
    assert contents(written) == contents(tmp_path / 'again')
    write(tmp_path / 'other', seed=1)
    name = 'coco/train/000000.jpg'
    assert (written / name).read_bytes() != (tmp_path / 'other' / name).read_bytes()


# Split, number, mean of the pixels, crop of the photo, and label and box of each digit.
SCENES = [
    ('train', 0, 100.6, (1, 188, 104, 132, 110), [0, 5, 49, 14, 24, 1, 52, 27, 22, 29,
                                                  2, 48, 61, 12, 17, 7, 15, 59, 21, 27]),
    ('train', 5, 100.2, (1, 298, 339, 117, 98), [3, 29, 61, 24, 32, 4, 9, 14, 16, 26]),
    ('val', 2, 27.4, (1, 313, 521, 73, 61), [0, 9, 14, 11, 15]),
]  # fmt: skip


def test_scenes_are_what_they_always_were() -> None:
    """Published numbers are about these very places and pixels, give or take OpenCV's rounding."""
    for split, index, mean, crop, digits in SCENES:
        scene = render_scene(DigitScenesParams(**SMALL), split, index)
        assert scene.photo_crop == crop
        assert scene.image.mean() == pytest.approx(mean, abs=0.2)
        found = [(label, *scene.box(k)) for k, label in enumerate(scene.labels)]
        assert np.ravel(found) == pytest.approx(digits, abs=1)


def test_counts_and_layouts_leave_earlier_images_alone(written: Path, tmp_path: Path) -> None:
    write(tmp_path / 'more', num_train=9, num_val=5, layouts=('ade',))
    more = contents(tmp_path / 'more')
    assert not any(name.startswith('coco') for name in more)
    before = {name: data for name, data in contents(written).items() if name.startswith('ade')}
    assert before.items() <= more.items()
    assert len(more) == 2 * (9 + 5) + 1


@pytest.mark.parametrize('split', ['train', 'val'])
def test_coco_annotations_are_exact(written: Path, split: str) -> None:
    params = DigitScenesParams(**SMALL)
    coco = COCO(str(written / f'coco/annotations/instances_{split}.json'))
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert sorted(coco.getImgIds()) == list(range(SMALL[f'num_{split}']))
    assert min(coco.getAnnIds()) >= 1
    for image_id in coco.getImgIds():
        info = coco.imgs[image_id]
        scene = render_scene(params, split, image_id)
        image = cv2.imread(str(written / f'coco/{split}' / info['file_name']))
        assert image.shape == (info['height'], info['width'], 3) == (96, 80, 3)
        assert np.abs(image.astype(int) - scene.image).mean() < 8
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image_id))
        assert len(annotations) == len(scene.labels)
        for k, ann in enumerate(annotations):
            mask = coco.annToMask(ann)
            assert np.array_equal(mask, scene.mask(k))
            ys, xs = np.nonzero(mask)
            tight = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
            assert ann['bbox'] == tight
            assert ann['area'] == mask.sum() > 0
            assert ann['category_id'] == scene.labels[k] + 1
            assert isinstance(ann['segmentation']['counts'], str)


@pytest.mark.parametrize(('split', 'folder'), [('train', 'training'), ('val', 'validation')])
def test_layouts_agree(written: Path, split: str, folder: str) -> None:
    coco = COCO(str(written / f'coco/annotations/instances_{split}.json'))
    for image_id, info in coco.imgs.items():
        name = f'{image_id:06d}'
        assert (written / f'coco/{split}/{info["file_name"]}').read_bytes() == (
            written / f'ade/images/{folder}/{name}.jpg'
        ).read_bytes()
        semantic = cv2.imread(
            str(written / f'ade/annotations/{folder}/{name}.png'), cv2.IMREAD_UNCHANGED
        )
        expected = np.ones_like(semantic)
        for ann in coco.loadAnns(coco.getAnnIds(imgIds=image_id)):
            expected[mask_utils.decode(ann['segmentation']).astype(bool)] = ann['category_id'] + 1
        assert semantic.ndim == 2
        assert np.array_equal(semantic, expected)


def test_masks_lie_on_the_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a flat background, exactly the pixels that a digit covers by half or more are its own."""
    flat = np.full((64, 64, 3), 127, np.uint8)
    monkeypatch.setattr(scenes, '_background', lambda *_: (flat.copy(), (0, 0, 0, 64, 64)))
    params = DigitScenesParams(size=(64, 64), num_digits=(1, 1), digit_scale=(40, 40))
    for index in range(5):
        scene = render_scene(params, 'train', index)
        change = np.abs(scene.image.astype(int) - 127).sum(2)
        inside = scene.owner == 1
        assert change[inside].min() >= 0.49 * change.max()
        assert change[~inside].max() <= 0.51 * change.max()


def test_every_digit_of_the_source_has_pixels() -> None:
    for digit_id in range(1797):
        assert (scenes._upscaled(digit_id, 8) >= 0.5).sum() > 8


def test_digits_may_overlap_but_stay_visible() -> None:
    params = DigitScenesParams(size=(96, 96), num_digits=(6, 6), digit_scale=(16, 40))
    touching = 0
    for index in range(20):
        scene = render_scene(params, 'train', index)
        assert len(scene.labels) == 6
        for k, digit_id in enumerate(scene.digit_ids):
            x, y, w, h = scene.box(k)
            assert 0 <= x < x + w <= 96
            assert 0 <= y < y + h <= 96
            # The box of a wholly visible digit is at least as large, so this bounds its scale.
            full = (scenes._upscaled(digit_id, 16) >= 0.5).sum()
            assert scene.mask(k).sum() >= 0.5 * MIN_VISIBLE * full
        boxes = np.array([scene.box(k) for k in range(6)], dtype=float)
        iou = mask_utils.iou(boxes, boxes, [0] * 6)
        touching += int((iou - np.eye(6) > 0).any())
    assert touching > 0


def test_splits_share_no_digit_and_no_photo_pixel() -> None:
    train, val = set(digit_pool('train')), set(digit_pool('val'))
    assert not train & val
    assert len(train | val) == 1797
    assert photo_columns('train', 640)[1] <= photo_columns('val', 640)[0]
    params = DigitScenesParams(size=(40, 70), digit_scale=(8, 16))
    for split, pool in (('train', train), ('val', val)):
        first, past = photo_columns(split, 640)
        for index in range(60):
            scene = render_scene(params, split, index)
            assert set(scene.digit_ids) <= pool
            _, top, left, height, width = scene.photo_crop
            assert first <= left < left + width <= past
            assert 0 <= top < top + height <= 427


def test_any_size() -> None:
    for size in ((32, 32), (33, 57), (131, 97), (64, 320), (300, 40), (480, 640)):
        params = DigitScenesParams(size=size, num_digits=(0, 3), digit_scale=(8, 16))
        scene = render_scene(params, 'val', 3)
        assert scene.image.shape == (*size, 3)
        assert scene.owner.shape == scene.semantic_map().shape == size
        assert scene.owner.max() == len(scene.labels) <= 3


def test_number_and_scale_of_digits_are_followed() -> None:
    params = DigitScenesParams(size=(128, 128), num_digits=(2, 4), digit_scale=(20, 28))
    painted = [render_scene(params, 'train', index) for index in range(40)]
    assert {len(scene.labels) for scene in painted} == {2, 3, 4}
    heights = [scene.box(k)[3] for scene in painted for k in range(len(scene.labels))]
    # A stroke may end a little outside the 8x8 frame, or inside it when partly hidden.
    assert max(heights) <= 28 * 1.2
    assert np.median(heights) >= 18


def test_the_most_crowded_allowed_scenes_find_room() -> None:
    params = DigitScenesParams(size=(64, 64), num_digits=(22, 22), digit_scale=(8, 40))
    for index in range(5):
        assert len(render_scene(params, 'val', index).labels) == 22


def test_written_set_is_left_alone(tmp_path: Path) -> None:
    assert write(tmp_path)
    (tmp_path / 'notes.txt').write_text('mine')
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
    assert not write(tmp_path, layouts=('ade', 'coco'))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == times


def test_other_sets_and_other_files_are_never_touched(tmp_path: Path) -> None:
    write(tmp_path / 'set', seed=7, num_train=8)
    foreign = tmp_path / 'mine' / 'coco' / 'train' / '000000.jpg'
    foreign.parent.mkdir(parents=True)
    foreign.write_text('mine')
    before = contents(tmp_path)
    for place, message in (
        ('set', 'seed 7 instead of 0'),
        ('mine', 'coco/train/000000.jpg'),
        ('mine/coco/train/000000.jpg', 'not a folder'),
    ):
        with pytest.raises(FileExistsError, match=message):
            write(tmp_path / place)
    assert contents(tmp_path) == before


def test_interrupted_writing_is_done_again(
    tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = digit_scenes.render_scene

    def interrupted(params: DigitScenesParams, split: str, index: int) -> Scene:
        if split == 'val' and index == 2:
            raise KeyboardInterrupt
        return real(params, split, index)

    monkeypatch.setattr(digit_scenes, 'render_scene', interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert json.loads((tmp_path / MARKER).read_text())['complete'] is False
    monkeypatch.undo()
    assert write(tmp_path)
    assert contents(tmp_path) == contents(written)
    # So is one that has lost a file.
    (tmp_path / 'ade/images/training/000003.jpg').unlink()
    assert write(tmp_path)
    assert contents(tmp_path) == contents(written)


def test_bad_values(tmp_path: Path) -> None:
    for options in (
        *(dict(layouts=layouts) for layouts in (('voc',), ())),
        *(dict(size=size) for size in ((31, 64), (64,), (64.0, 64))),
        *(dict(num_train=0), dict(num_val=-1), dict(num_val=True), dict(seed=-1)),
        *(dict(num_digits=pair) for pair in ((3, 2), (0, 0), (1, 100))),
        *(dict(digit_scale=pair) for pair in ((4, 30), (30, 90), (30, 20))),
    ):
        (name,) = options
        with pytest.raises(ValueError, match=name):
            write(tmp_path / 'new', **options)
    assert not (tmp_path / 'new').exists()


def test_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(tmp_path / 'set'), '--layout', 'coco', '--size', '48', '64']
    options += ['--num-train', '2', '--num-val', '1', '--seed', '5']
    options += ['--num-digits', '1', '2', '--digit-scale', '10', '20']

    def run(*extra: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, 'argv', [TOOL.name, *options, *extra])
        code = 0
        try:
            runpy.run_path(str(TOOL), run_name='__main__')
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capsys.readouterr())

    code, out, _ = run()
    assert code == 0
    assert 'wrote 3' in out
    code, out, _ = run()
    assert code == 0
    assert 'already there' in out
    image = cv2.imread(str(tmp_path / 'set/coco/train/000001.jpg'))
    assert image.shape == (48, 64, 3)

    code, _, err = run('--seed', '6')
    assert code == 2
    assert 'seed 5 instead of 6' in err.splitlines()[-1]
    code, _, err = run('--size', '1', '2', '3')
    assert code == 2
    assert '--size' in err.splitlines()[-1]
