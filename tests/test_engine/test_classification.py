"""Classifiers of mmpretrain: heads, losses, checks and tools, and digits that are learned."""

import copy
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from digits import write_digits
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from idlevit_mm.analysis.models import load_model
from idlevit_mm.converters import convert_weights
from idlevit_mm.engine.checks import check_datasets
from idlevit_mm.engine.launch import evaluate_from_config, task_of, train_from_config
from idlevit_mm.engine.swap import Settings, idle_config
from idlevit_mm.errors import UsageError
from idlevit_mm.losses.assisted import classes_of

pytest.importorskip('mmpretrain')

from mmpretrain.structures import DataSample

import idlevit_mm.heads  # noqa: F401

CONFIGS = Path(__file__).parents[2] / 'configs' / 'digits'
SMALL = dict(type='IdleVisionTransformer', img_size=32, patch_size=4, embed_dims=32, num_heads=2)
SMALL |= dict(num_layers=3, output_cls_token=True, padded_images=False)


def classifier(head: str, **backbone: Any) -> Any:
    cfg = dict(type='ImageClassifier', backbone={**SMALL, **backbone})
    cfg['head'] = dict(type=head, num_classes=5, in_channels=32)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def samples(*labels: int) -> list[Any]:
    return [DataSample().set_gt_label(label) for label in labels]


def test_head_of_lvvit_adds_half_of_the_best_token() -> None:
    model = classifier('LVViTClsHead', keep_ratios=[[1.0, 0.5, 0.5]]).eval()
    x = torch.randn(2, 3, 20, 28)
    with torch.no_grad():
        (feature_map, token), layers = model.backbone(x)[-1], model.head.layers
        scores = model(x)
        for image in range(2):
            tokens = [feature_map[image, :, i, j] for i in range(5) for j in range(7)]
            best = [max(float(layers.aux_head(t)[k]) for t in tokens) for k in range(5)]
            expected = layers.head(token[image]) + 0.5 * torch.tensor(best)
            torch.testing.assert_close(scores[image], expected)


def test_head_of_evovit_is_taught_by_both_and_classifies_by_the_mean() -> None:
    policy = dict(type='EvoViT', representative=False)
    ratios = [[1.0, 0.5, 0.5]]
    model = classifier('EvoViTClsHead', final_norm=False, policy=policy, keep_ratios=ratios).eval()
    x = torch.randn(2, 3, 20, 28)
    (feature_map, token), layers = model.backbone(x)[-1], model.head.layers
    mean = layers.head(layers.norm(feature_map.flatten(2).mean(dim=2)))
    of_class = layers.head_cls(layers.norm_cls(token))
    torch.testing.assert_close(model(x), mean)
    losses, labels = model.loss(x, samples(3, 0)), torch.tensor([3, 0])
    both = {'loss': mean, 'loss_class_token': of_class}
    assert losses.keys() == both.keys()
    for name, scores in both.items():
        torch.testing.assert_close(losses[name], 0.5 * F.cross_entropy(scores, labels))


def test_even_borders_of_a_classifiers_image_are_no_padding() -> None:
    x = torch.randn(2, 3, 32, 32)
    x[:, :, 12:] = 0.0
    kept = {}
    for padded in (True, False):
        model = classifier('VisionTransformerClsHead', keep_ratios=0.5, padded_images=padded)
        model.backbone(x)
        kept[padded] = int(model.backbone.keep_masks[0][0].flatten(1).sum(dim=1)[0])
    assert kept == {True: 12, False: 32}


def test_classes_of_classified_images() -> None:
    mixed = DataSample().set_gt_label(1).set_gt_score(torch.tensor([0.3, 0.7, 0.0]))
    goal = classes_of([*samples(2), mixed], torch.zeros(2, 3))
    torch.testing.assert_close(goal, torch.tensor([[0.0, 0.0, 1.0], [0.3, 0.7, 0.0]]))


def test_a_release_keeps_its_classifier(tmp_path: Path) -> None:
    model = classifier('LVViTClsHead', arch='lvvit-small', patch_size=16)
    ours = model.backbone.state_dict()
    release = convert_weights(ours, 'official').weights
    heads = {key: torch.randn(5, 32) for key in ('head.weight', 'aux_head.weight')}
    heads |= {key: torch.randn(5) for key in ('head.bias', 'aux_head.bias')}
    found = convert_weights({**release, **heads}, 'mmseg', with_head=True)
    model.load_state_dict(found.weights, strict=True)
    torch.testing.assert_close(model.head.layers.aux_head.bias, heads['aux_head.bias'])
    assert not found.report.dropped
    for weights, to in ((release, 'mmseg'), ({**release, **heads}, 'timm')):
        with pytest.raises(UsageError, match='with_head'):
            convert_weights(weights, to, with_head=True)


# --- checks -----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('data') / 'digits'
    assert write_digits(folder) == 1797
    return folder


def config(name: str, data: Path, **changes: Any) -> Config:
    cfg = copy.deepcopy(Config.fromfile(CONFIGS / f'{name}_digits.py'))
    for phase in ('train', 'val', 'test'):
        cfg[f'{phase}_dataloader'].dataset.data_root = str(data)
    # mmengine keeps visualizers, of other libraries too, by their names.
    cfg.merge_from_dict({'visualizer.name': uuid.uuid4().hex, **changes})
    return cfg


def write(cfg: Config, path: Path) -> str:
    cfg.dump(str(path))
    return str(path)


def test_splits_share_no_digit(digits: Path) -> None:
    rows = {s: {p.stem for p in (digits / s).rglob('*.png')} for s in ('train', 'val')}
    assert not rows['train'] & rows['val']
    assert [len(rows[s]) for s in rows] == [1347, 450]
    with pytest.raises(ValueError, match='size=7 must be at least 8'):
        write_digits(digits, 7)


def test_task_is_told_without_a_scope() -> None:
    assert task_of(Config(dict(model=dict(type='ImageClassifier')))) == 'classification'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'train_dataloader.dataset.data_prefix': 'trian'}, 'data_prefix .*trian does not exist'),
        ({'train_dataloader.dataset.data_root': 'data/digits9'}, 'data_root data/digits9 does not'),
        ({'train_dataloader.dataset.extensions': ['.gif']}, 'Found 0 files'),
        ({'model.head.num_classes': 9}, 'model.head.num_classes=9, but .* has 10 classes'),
        ({'model.head.in_channels': 96}, r'model.head \(in_channels=96\) does not take'),
        ({'model.neck': None}, 'GlobalAveragePooling'),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    changes: dict[str, Any], message: str, digits: Path, tmp_path: Path
) -> None:
    path = write(config('swin_dense', digits, **changes), tmp_path / 'config.py')
    with pytest.raises(UsageError, match=message):
        train_from_config(path, str(tmp_path / 'out'))


def test_data_sets_that_download_need_no_folder() -> None:
    dataset = dict(type='CIFAR10', data_root='data/none', split='train')
    cfg = dict(default_scope='mmpretrain', train_dataloader=dict(dataset=dataset))
    check_datasets(cfg, ('train',))
    dataset['download'] = False
    with pytest.raises(UsageError, match='data_root data/none does not exist'):
        check_datasets(cfg, ('train',))


# --- training ---------------------------------------------------------------------------------


def test_digits_are_learned_and_idle_models_fine_tuned(digits: Path, tmp_path: Path) -> None:
    """A dense Swin well above chance in two epochs; and it goes on with half of the tokens."""
    small = {'model.backbone.embed_dims': 16, 'model.head.in_channels': 64}
    brief = {'train_cfg.max_epochs': 2, 'train_cfg.val_interval': 2, 'param_scheduler': None}
    dense = config('swin_dense', digits, **small, **brief)
    # Digits that stay where they are are learned faster.
    dense.train_dataloader.dataset.pipeline = dense.val_dataloader.dataset.pipeline
    runner = train_from_config(write(dense, tmp_path / 'dense.py'), str(tmp_path / 'dense'))
    assert runner.message_hub.get_scalar('val/accuracy/top1').current() > 25.0
    start = str(tmp_path / 'dense' / 'epoch_2.pth')
    tested = str(tmp_path / 'dense.py'), start, str(tmp_path / 'test')
    shown = str(tmp_path / 'shown')
    few = {'test_dataloader.dataset.indices': 20}
    evaluate_from_config(*tested, show_dir=shown, cfg_options=few)
    assert len(list(Path(shown).rglob('*.png'))) == 20
    with pytest.raises(UsageError, match='--show-dir'):
        evaluate_from_config(*tested, show_dir=shown, tta=True)
    out = str(tmp_path / 'scores.pkl')
    evaluate_from_config(*tested, out=out, tta=True, cfg_options=few)
    assert Path(out).is_file()
    brief |= {'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1}
    idle = config('swin_idlevit', digits, **small, **brief, load_from=start)
    idle.model.backbone.keep_ratios.keep_ratio = 0.5
    runner = train_from_config(write(idle, tmp_path / 'idle.py'), str(tmp_path / 'idle'))
    assert runner.message_hub.get_scalar('val/accuracy/top1').current() > 25.0
    assert load_model(str(tmp_path / 'idle.py'), tmp_path / 'idle' / 'epoch_1.pth')


def test_idlevits_losses_teach_a_classifier(digits: Path, tmp_path: Path) -> None:
    """The losses of its recipe, by the teacher that it starts from, beside the classifier's."""
    narrow = {'model.backbone.embed_dims': 24, 'model.head.in_channels': 24}
    few = {'train_dataloader.dataset.indices': 64, 'train_cfg.val_interval': 9}
    brief = {'train_cfg.max_epochs': 1, 'default_hooks.logger.interval': 1}
    model = MODELS.build(dict(config('vit_idlevit', digits, **narrow).model, _scope_='mmpretrain'))
    torch.save(model.state_dict(), tmp_path / 'dense.pth')
    cfg = config('vit_idlevit', digits, **narrow, **few, **brief)
    cfg.load_from = str(tmp_path / 'dense.pth')
    runner = train_from_config(write(cfg, tmp_path / 'idle.py'), str(tmp_path / 'out'))
    seen = {
        name.removeprefix('train/'): history.data[0]
        for name, history in runner.message_hub.log_scalars.items()
        if 'loss' in name
    }
    expected = {'loss', 'loss_token_cut', 'loss_distill_logits', 'loss_distill_feature'}
    assert expected <= seen.keys()
    assert all(np.isfinite(values).all() and values[-1] > 0 for values in seen.values())


# --- the swap -------------------------------------------------------------------------------------


def test_the_swap_of_a_config_of_mmpretrain_computes_the_same(tmp_path: Path) -> None:
    """Converted weights of the dense classifier, its head included, give the same scores at 1.0."""
    dense = dict(type='VisionTransformer', arch='deit-tiny', img_size=48, out_type='cls_token')
    head = dict(type='VisionTransformerClsHead', num_classes=5, in_channels=192)
    model = dict(type='ImageClassifier', backbone=dense, head=head)
    path = write(Config(dict(default_scope='mmpretrain', model=model)), tmp_path / 'dense.py')
    keep = dict(type='3+3+2', keep_ratio=0.7)
    swapped = Config.fromfile(idle_config(path, Settings(keep=keep)).file)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        theirs, ours = MODELS.build(model).eval(), MODELS.build(swapped.model).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    weights = convert_weights(theirs.state_dict(), 'mmseg').weights
    ours.load_state_dict(weights, strict=True)
    x = torch.randn(2, 3, 48, 48)
    assert ours.backbone.keep_ratios[0].count(1.0) == 4
    assert not ours.backbone.padded_images
    ours.backbone.set_keep_ratios(1.0)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
