"""Pictures of active tokens: what they show is what the model computed, in both libraries."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backbone_zoo import VARIANTS
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.registry import DATASETS, HOOKS, MODELS, DefaultScope
from mmengine.runner import Runner
from PIL import Image

import idlevit_mm.hooks.active_tokens as module
from idlevit_mm.errors import SettingError
from idlevit_mm.hooks import ActiveTokensVisualizationHook
from idlevit_mm.visualization.data_samples import content_size, truth_of
from idlevit_mm.visualization.sheets import active_shares, sheet_panels

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

TYPE = 'ActiveTokensVisualizationHook'


class Gallery:
    """A visualiser that keeps what it is given."""

    def __init__(self, meta):
        self.dataset_meta = meta
        self.pictures = {}

    def add_image(self, name, image, step=0):
        self.pictures[name, step] = image

    def show(self, drawn_img=None, win_name='image', wait_time=0.0, **kwargs):
        self.pictures[win_name, 'shown', wait_time] = drawn_img


class Pair(BaseModel):
    """Two backbones that see each image, and nothing else."""

    def __init__(self, keep_ratios=0.5):
        super().__init__()
        swin = next(variant for variant in VARIANTS if variant.is_swin)
        self.first = swin.build(keep_ratios=keep_ratios)
        self.second = swin.build(keep_ratios=1.0)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        self.first(torch.stack(list(inputs)).float())
        self.second(x=torch.stack(list(inputs)).float())
        return data_samples


@pytest.fixture
def sheets(monkeypatch):
    """What would have been drawn."""
    found = []

    def draw(sheet):
        found.append(sheet)
        return np.full((2, 3, 3), len(found), np.uint8)

    monkeypatch.setattr(module, 'draw_sheet', draw)
    return found


def runner_of(model, meta=None, iteration=0, log_dir=None):
    return SimpleNamespace(
        model=model,
        visualizer=Gallery(meta),
        iter=iteration,
        logger=logging.getLogger('pictures'),
        log_dir=log_dir,
    )


def unlabelled():
    from mmdet.structures import DetDataSample

    return DetDataSample(metainfo=dict(img_path='x/one.jpg'))


def built(cfg):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).eval()
        return model, DATASETS.build(cfg.val_dataloader.dataset)


def evaluated(hook, runner, batches, phase='val'):
    """Runs a hook and a model over batches, as the loops of mmengine do."""
    hook.before_run(runner)
    getattr(hook, f'before_{phase}_epoch')(runner)
    for number, batch in enumerate(batches):
        getattr(hook, f'before_{phase}_iter')(runner, number, batch)
        with torch.no_grad():
            outputs = runner.model.test_step(batch)
        getattr(hook, f'after_{phase}_iter')(runner, number, batch, outputs)
    return runner.visualizer.pictures


@pytest.mark.parametrize('name', ['mask-rcnn_idle-swin_digits', 'fpn_idle-vit_digits'])
def test_a_picture_shows_what_the_model_computed(name, scene_config, scenes, sheets):
    model, data = built(scene_config(name))
    hook = ActiveTokensVisualizationHook(score_thr=0.0)
    runner = runner_of(model, data.metainfo, iteration=7)
    batches = [pseudo_collate([data[0], data[1]]), pseudo_collate([data[2]])]
    pictures = evaluated(hook, runner, batches)
    assert list(pictures) == [(f'val_active_tokens_0{i}_00000{i}', 7) for i in range(3)]

    # By hand, without the hook.
    with torch.no_grad():
        expected = model.test_step(pseudo_collate([data[0], data[1]]))
    for index in range(2):
        sheet, result = sheets[index], expected[index]
        with Image.open(result.img_path) as picture:
            assert np.array_equal(sheet.image, np.asarray(picture.convert('RGB')))
        assert sheet.image.shape[:2] == sheet.content_size == (70, 90)
        shares = active_shares(model.backbone.keep_masks, index)
        assert len(sheet.active) == len(shares) > 0
        for (title, share), (wanted_title, wanted) in zip(sheet.active, shares, strict=True):
            assert title == wanted_title
            assert np.array_equal(share, wanted)
            assert 0 < share.mean() < 1
        (_, truth), (_, prediction) = sheet.found
        if 'pred_sem_seg' in result:
            assert np.array_equal(prediction, result.pred_sem_seg.data[0].numpy())
            path = scenes / 'ade' / 'annotations' / 'validation' / f'00000{index}.png'
            labels = np.asarray(Image.open(path)).astype(int)
            assert np.array_equal(truth, np.where(labels == 0, 255, labels - 1))
        else:
            assert np.array_equal(prediction.boxes, result.pred_instances.bboxes)
            assert truth.masks.shape == (len(truth.boxes), 70, 90)
            check_boxes(truth, scenes, int(Path(result.img_path).stem))


def check_boxes(truth, scenes, number):
    written = json.loads((scenes / 'coco' / 'annotations' / 'instances_val.json').read_text())
    (image,) = [
        item['id'] for item in written['images'] if Path(item['file_name']).stem == f'{number:06d}'
    ]
    wanted = [item['bbox'] for item in written['annotations'] if item['image_id'] == image]
    assert len(wanted) > 0
    corners = [(x, y, x + w, y + h) for x, y, w, h in wanted]
    assert truth.boxes.tolist() == [list(box) for box in corners]


def test_idle_tokens_are_grey_and_padding_is_cut_off(scene_config, sheets):
    """The picture of a stage against its map, pixel by pixel, on a batch padded to 96 pixels."""
    model, data = built(scene_config('retinanet_idle-pvtv2_digits'))
    runner = runner_of(model, data.metainfo)
    evaluated(ActiveTokensVisualizationHook(), runner, [pseudo_collate([data[0]])])
    (sheet,) = sheets
    assert sheet.input_size == (96, 96)
    for stage, stride in enumerate((4, 8, 16, 32)):
        panel = sheet_panels(sheet)[1][stage].pixels
        factor = panel.shape[0] // 70
        assert panel.shape == (70 * factor, 90 * factor, 3)
        for y, x in np.ndindex(70 // stride, 90 // stride):
            centre = panel[(y * stride + 1) * factor, (x * stride + 1) * factor].astype(int)
            pixel = sheet.image[y * stride + 1, x * stride + 1].astype(int)
            if sheet.active[stage][1][y, x] == 1:
                assert (centre == pixel).all()
            elif sheet.active[stage][1][y, x] == 0:
                assert np.ptp(centre) == 20  # the bluish grey, whatever the image


def test_resized_and_padded_by_the_pipeline(scene_config, sheets):
    cfg = scene_config('retinanet_idle-pvtv2_digits')
    steps = list(cfg.val_dataloader.dataset.pipeline)
    steps[1] = dict(type='Resize', scale=(150, 110), keep_ratio=True)
    steps.insert(2, dict(type='Pad', size=(171, 133)))
    cfg.val_dataloader.dataset.pipeline = steps
    model, data = built(cfg)
    runner = runner_of(model, data.metainfo)
    evaluated(ActiveTokensVisualizationHook(), runner, [pseudo_collate([data[0]])])
    (sheet,) = sheets
    # 70 x 90 by 110 / 70 is 110 x 141; with its padding 133 x 171, and in whole patches 160 x 192.
    assert sheet.content_size == (110, 141)
    assert sheet.input_size == (160, 192)
    assert sheet.active[0][1].shape == (40, 48)


def test_truth_of_another_size_is_resized(scene_config):
    cfg = scene_config('fpn_idle-vit_digits')
    load, annotate, pack = cfg.val_dataloader.dataset.pipeline
    resize = dict(type='Resize', scale=(180, 140), keep_ratio=True)
    with DefaultScope.overwrite_default_scope('mmseg'):
        data = DATASETS.build(cfg.val_dataloader.dataset)
        large = Compose([load, annotate, resize, pack])(data.get_data_info(0))
    plain = truth_of(data[0]['data_samples'], (70, 90))
    assert large['data_samples'].gt_sem_seg.shape == (140, 180)
    assert np.array_equal(truth_of(large['data_samples'], (70, 90)), plain)
    assert content_size(large['data_samples']) == (140, 180)


def test_several_backbones_have_names_inside_a_distributed_model_too(tmp_path, sheets):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        runner = runner_of(MMDistributedDataParallel(Pair()))
        hook = ActiveTokensVisualizationHook(train_interval=1)
        hook.before_run(runner)
        inputs = [torch.randint(0, 256, (3, 47, 61)) for _ in range(2)]
        batch = dict(inputs=inputs, data_samples=[unlabelled()] * 2)
        hook.before_train_iter(runner, 0, batch)
        runner.model(**batch)
        hook.after_train_iter(runner, 0, batch)
    finally:
        torch.distributed.destroy_process_group()
    assert list(runner.visualizer.pictures) == [
        ('train_active_tokens_first', 1),
        ('train_active_tokens_second', 1),
    ]
    assert all(share.min() == 0 for _, share in sheets[0].active[:2])
    assert all((share == 1).all() for _, share in sheets[1].active)  # keep ratio 1
    assert np.array_equal(sheets[0].image, inputs[0].numpy()[::-1].transpose(1, 2, 0))
    assert sheets[0].found == []


def test_number_of_pictures(scene_config, sheets):
    model, data = built(scene_config('retinanet_idle-pvtv2_digits'))
    batches = [pseudo_collate([data[i] for i in batch]) for batch in ((0, 1), (2,), (0,))]
    for arguments, drawn in (
        (dict(max_pictures=1), ['00_000000']),
        (dict(max_pictures=None), ['00_000000', '01_000001', '02_000002', '03_000000']),
        (dict(interval=2), ['00_000000', '01_000001', '02_000000']),
        (dict(draw=False), []),
    ):
        runner = runner_of(model, data.metainfo)
        hook = ActiveTokensVisualizationHook(**arguments)
        for _ in range(2):  # each validation begins anew
            runner.visualizer.pictures.clear()
            names = [name for name, _ in evaluated(hook, runner, batches)]
            assert names == [f'val_active_tokens_{name}' for name in drawn], arguments
        assert not model.backbone._forward_hooks


def test_pictures_of_a_test_go_into_a_folder_or_a_window(scene_config, tmp_path, sheets):
    model, data = built(scene_config('fpn_idle-vit_digits'))
    batches = [pseudo_collate([data[0]])]
    runner = runner_of(model, data.metainfo, log_dir=str(tmp_path))
    hook = ActiveTokensVisualizationHook(test_out_dir='seen')
    assert evaluated(hook, runner, batches, 'test') == {}
    with Image.open(tmp_path / 'seen' / 'test_active_tokens_00_000000.png') as picture:
        assert np.array_equal(np.asarray(picture), np.ones((2, 3, 3)))
    assert len(sheets) == 1

    hook = ActiveTokensVisualizationHook(show=True, wait_time=0.5)
    shown = evaluated(hook, runner, batches, 'test')
    assert list(shown) == [('test_active_tokens_00_000000', 'shown', 0.5)]


def test_sliding_windows_are_left_out_with_one_warning(scene_config, caplog):
    cfg = scene_config('fpn_idle-vit_digits')
    cfg.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(32, 32))
    model, data = built(cfg)
    runner = runner_of(model, data.metainfo)
    batch = pseudo_collate([data[0]])
    with caplog.at_level(logging.WARNING):
        assert evaluated(ActiveTokensVisualizationHook(), runner, [batch, batch]) == {}
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == f'{TYPE} leaves images out: the backbone saw 1 images in 4 parts.'


def test_wrong_arguments():
    for arguments, error, message in (
        (dict(interval=0), ValueError, 'interval=0 must be at least 1'),
        (dict(max_pictures=0), ValueError, 'max_pictures=0 must be at least 1'),
        (dict(train_interval=-1), ValueError, 'train_interval=-1 must be at least 0'),
        (dict(train_interval=0.5), TypeError, 'train_interval=0.5 must be a whole number'),
        (dict(score_thr=30), ValueError, 'score_thr=30 must lie in [0, 1]'),
    ):
        with pytest.raises(error, match=re.escape(f'{TYPE}.{message}')):
            HOOKS.build(dict(type=TYPE, **arguments))


def test_a_model_without_idle_backbone():
    with pytest.raises(SettingError, match=f'{TYPE} found no IdleBackbone in Linear'):
        ActiveTokensVisualizationHook().before_run(runner_of(torch.nn.Linear(1, 1)))


def test_tensorboard(scene_config, tmp_path):
    """Two iterations and a validation: the event file holds scalars and pictures, both as logged.

    The same run without pictures ends with the same weights.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def train(folder, options, hooks):
        cfg = scene_config('fpn_idle-pvtv2_digits')
        cfg.work_dir = str(tmp_path / folder)
        # mmengine keeps visualisers by name, for as long as the process lives.
        cfg.experiment_name = cfg.visualizer.name = f'tensorboard_{folder}'
        cfg.randomness = dict(seed=1)
        cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
        cfg.param_scheduler = []
        cfg.default_hooks.logger = dict(type='LoggerHook', interval=1, log_metric_by_epoch=False)
        cfg.default_hooks.checkpoint = None
        cfg.log_processor = dict(by_epoch=False)
        cfg.merge_from_dict(options)
        cfg.custom_hooks = [dict(type='RandomKeepRatioHook', low=0.4), *hooks]
        runner = Runner.from_cfg(cfg)
        runner.train()
        runner.visualizer.close()
        return runner

    hook = dict(type=TYPE, train_interval=2, max_pictures=1)
    both = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    runner = train('pictures', {'visualizer.vis_backends': both}, [hook])
    # As on the command line, which knows no dictionaries.
    plain = train('plain', {'visualizer.vis_backends.0.type': 'TensorboardVisBackend'}, [])
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, runner.model.state_dict()[key]), key

    def written_by(runner):
        events = EventAccumulator(f'{runner.log_dir}/vis_data', {'images': 0, 'scalars': 0})
        return events.Reload()

    folder = Path(runner.log_dir) / 'vis_data'
    events = written_by(runner)
    for key in ('loss', 'keep_ratio'):
        logged = [
            json.loads(line)[key]
            for line in (folder / 'scalars.json').read_text().splitlines()
            if key in json.loads(line)
        ]
        written = events.Scalars(key)
        assert [event.step for event in written] == [1, 2]
        assert [event.value for event in written] == pytest.approx(logged)
        again = written_by(plain).Scalars(key)
        assert [event.value for event in again] == [event.value for event in written]
    assert 0.4 < events.Scalars('keep_ratio')[0].value < 1
    tags = ['train_active_tokens', 'val_active_tokens_00_000000']
    assert sorted(events.Tags()['images']) == tags
    for tag in tags:
        (event,) = events.Images(tag)
        assert event.step == 2
        with Image.open(folder / 'vis_image' / f'{tag}_2.png') as picture:
            assert picture.size == (event.width, event.height)
            assert picture.width > 2000
