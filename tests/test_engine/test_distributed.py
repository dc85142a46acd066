"""Training with two gloo processes is training with one on both of their batches."""

import functools
import os
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS, DefaultScope
from mmengine.runner import Runner
from ranks import WRAPPERS, run_ranks
from toy import ToyModel as RunnerToy
from toy import toy_runner
from toys import (
    Images,
    ToyModel,
    all_losses,
    checkpoint_of,
    real_batch,
    real_model,
    runner_settings,
)

from idlevit_mm.engine import ResumableRunner, SettingError, load_checkpoint, processes
from idlevit_mm.engine.sharding import FullyShardedModel, optimizers_of

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='gloo between processes')

IMAGES, UPDATES = 8, 2
BLOCK_RATIOS = [[1.0, 0.6], [0.5, 0.3]]


class DoubleImages(Images):
    def __getitem__(self, index):
        return dict(inputs=self.images[index].double())


class Watch(Hook):
    """Notes gradients at each update, and keep ratios in each iteration."""

    def __init__(self):
        self.gradients, self.ratios = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        backbone = inner(runner.model).backbone
        self.ratios.append([list(stage) for stage in backbone.keep_ratios])
        if not self.gradients:
            (optimizer,) = optimizers_of(runner.optim_wrapper)
            optimizer.register_step_pre_hook(functools.partial(self._note, runner.model))
            self.gradients = [{}]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        masks = inner(runner.model).backbone.keep_masks
        self.masks = [[mask.clone() for mask in stage] for stage in masks]

    def _note(self, model, *_):
        self.gradients.append(
            {
                name: whole(parameter.grad)
                for name, parameter in inner(model).named_parameters()
                if parameter.grad is not None
            }
        )


def inner(model):
    return getattr(model, 'module', model)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor).detach().clone()


def train(work_dir, variant, case, wrapper=None, world=1, **changes):
    """Train; gradients of each update, keep ratios and masks of this process."""
    accumulated = 2 if case == 'accumulate' else 1
    model = ToyModel(variant, keep_ratios=BLOCK_RATIOS, double=True)
    losses = [dict(type='TokenCutLoss')]
    if case == 'losses':
        torch.manual_seed(1)
        losses = all_losses(str(work_dir.parent / 'teacher.pth'))
    watch = Watch()
    hooks = [dict(type='AuxiliaryLossHook', losses=losses)]
    if case == 'random':
        hooks = [dict(type='RandomKeepRatioHook', low=0.3, per='block')]
    settings = dict(
        train_dataloader=dict(
            dataset=DoubleImages(IMAGES * accumulated),
            sampler=dict(type='DefaultSampler', shuffle=False),
            batch_size=IMAGES // UPDATES // world,
            num_workers=0,
        ),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=0.01),
            accumulative_counts=accumulated,
            clip_grad=dict(max_norm=0.05),
            paramwise_cfg=dict(custom_keys={'stages.0.blocks.0.norm': dict(lr_mult=3.0)}),
        ),
        randomness=dict(seed=3, diff_rank_seed=case == 'random'),
        custom_hooks=[*hooks, watch],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        launcher='none' if world == 1 else 'pytorch',
        cfg=dict(model_wrapper_cfg=WRAPPERS[wrapper]) if wrapper else None,
    )
    settings.update(changes)
    runner = ResumableRunner(**runner_settings(work_dir, model, [], **settings))
    runner.train()
    assert len(watch.gradients) == 1 + UPDATES
    state = runner.model.state_dict()
    return dict(
        gradients=watch.gradients[1:],
        ratios=watch.ratios,
        masks=watch.masks,
        wrapper=type(runner.model).__name__,
        norms=list(runner.message_hub.get_scalar('train/grad_norm').data[0]),
        sharded=sum(hasattr(p, 'full_tensor') for p in runner.model.parameters()),
        names=sorted(name.removeprefix('module.') for name in state),
    )


def on_rank(rank, *arguments):
    return train(*arguments, world=2)


@pytest.fixture(scope='module')
def teacher_of(tmp_path_factory):
    """Folder with the weights of a dense teacher, by variant."""
    folders = {}
    for variant in ('swin', 'pvt'):
        folders[variant] = tmp_path_factory.mktemp(variant)
        model = ToyModel(variant, keep_ratios=1.0, seed=7, double=True)
        checkpoint_of(model, folders[variant] / 'teacher.pth')
    return folders


CASES = ('losses', 'accumulate', 'random')


@pytest.mark.parametrize(
    ('variant', 'case'), [*(('swin', case) for case in CASES), ('pvt', 'losses')]
)
def test_two_processes_train_like_one_on_the_joined_batch(teacher_of, variant, case):
    folder = teacher_of[variant]
    alone = train(folder / f'{case}_alone', variant, case)
    expected = load_checkpoint(folder / f'{case}_alone' / 'epoch_1.pth')
    assert any(g.abs().max() > 1e-6 for g in alone['gradients'][0].values())
    for wrapper in WRAPPERS:
        work_dir = folder / f'{case}_{wrapper}'
        results = run_ranks(
            folder / f'{case}_{wrapper}_meet', on_rank, work_dir, variant, case, wrapper
        )
        for rank, result in enumerate(results):
            assert result['wrapper'] == WRAPPERS[wrapper]['type']
            assert (result['sharded'] > 20) == (wrapper == 'fsdp')
            assert result['ratios'] == alone['ratios']
            assert result['norms'] == pytest.approx(alone['norms'], rel=1e-9)
            for mine, one in zip(result['gradients'], alone['gradients'], strict=True):
                assert mine.keys() == one.keys()
                for name in one:
                    torch.testing.assert_close(mine[name], one[name], rtol=1e-8, atol=1e-12)
            # Each process sees every second image.
            for stage, one_stage in zip(result['masks'], alone['masks'], strict=True):
                for mask, one in zip(stage, one_stage, strict=True):
                    assert torch.equal(mask, one[rank::2])
        if case == 'random':
            assert len({str(ratios) for ratios in alone['ratios']}) == UPDATES

        checkpoint = load_checkpoint(work_dir / 'epoch_1.pth')
        assert checkpoint['state_dict'].keys() == expected['state_dict'].keys()
        for name, value in expected['state_dict'].items():
            torch.testing.assert_close(checkpoint['state_dict'][name], value, rtol=1e-8, atol=1e-12)
        ToyModel(variant, double=True).load_state_dict(checkpoint['state_dict'])
        states = checkpoint['optimizer']['state'], expected['optimizer']['state']
        assert states[0].keys() == states[1].keys()
        for index, entries in states[1].items():
            for name, value in entries.items():
                torch.testing.assert_close(states[0][index][name], value, rtol=1e-7, atol=1e-14)


def in_scope(library):
    """Runners of other tests leave their own."""
    scope = 'mmseg' if library == 'segmentor' else 'mmdet'
    return DefaultScope.overwrite_default_scope(scope)


def steps_of(rank, library):
    with in_scope(library):
        return real_steps(rank, library)


def real_steps(rank, library):
    """Losses and weights of two training steps of a real model, by wrapper."""
    steps = {}
    for wrapper in WRAPPERS:
        torch.manual_seed(0)
        model = MODEL_WRAPPERS.build(dict(WRAPPERS[wrapper], module=real_model(library)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        if wrapper == 'fsdp':
            model.shard([optimizer])
        model.train()
        losses = []
        for step in range(2):
            torch.manual_seed(10 * step + rank)
            batch = real_batch(library)
            batch['inputs'] = [part + 30 * rank + 7 * step for part in batch['inputs']]
            values = model.train_step(batch, OptimWrapper(optimizer))
            losses.append({name: float(value) for name, value in values.items()})
        steps[wrapper] = (
            losses,
            {name: whole(value) for name, value in model.module.state_dict().items()},
        )
        if wrapper == 'fsdp' and rank:
            steps[wrapper] = losses, None
        model.eval()
        with torch.no_grad():
            assert len(model.val_step(real_batch(library))) == 2
    return steps


@pytest.mark.parametrize('library', ['retinanet', 'faster_rcnn', 'segmentor'])
def test_real_models_train_alike_by_both(tmp_path, library):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    with in_scope(library):
        real_model(library)  # imports what the processes then share
    first, second = run_ranks(tmp_path, steps_of, library)
    for steps in (first, second):
        for one, other in zip(steps['fsdp'][0], steps['ddp'][0], strict=True):
            assert one == pytest.approx(other, rel=1e-4)
    assert first['ddp'][0] != second['ddp'][0], 'both processes saw the same data'
    for name, value in first['ddp'][1].items():
        if 'num_batches' not in name and 'running' not in name:
            torch.testing.assert_close(first['fsdp'][1][name], value, rtol=1e-3, atol=1e-4)


class Losses(Hook):
    def __init__(self):
        self.values = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.values[runner.iter] = outputs['loss'].item()


def train_toy(rank, work_dir, wrapper=None, hooks=(), **changes):
    """Losses by iteration, number of files written by this process, learning rate at the end."""
    from mmengine.runner import runner as module

    written, losses = [], Losses()
    original = module.save_checkpoint

    def noted(checkpoint, filename, *args, **kwargs):
        written.append(filename)
        original(checkpoint, filename, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'save_checkpoint', noted)
        if wrapper:
            changes.update(launcher='pytorch', cfg=dict(model_wrapper_cfg=WRAPPERS[wrapper]))
        runner = toy_runner(work_dir, hooks=[losses, *hooks], **changes)
        runner.train()
    rate = runner.optim_wrapper.param_groups[0]['lr']
    return dict(losses=losses.values, written=[Path(name).name for name in written], rate=rate)


def resume_toy(rank, work_dir, wrapper, checkpoint):
    return train_toy(rank, work_dir, wrapper, load_from=str(checkpoint), resume=True)


@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_one_process_writes_and_any_number_resumes(tmp_path, wrapper):
    whole = run_ranks(tmp_path / 'meet_0', train_toy, tmp_path / 'whole', wrapper)
    assert [result['written'] for result in whole] == [
        [f'.epoch_{epoch}.pth.part' for epoch in (1, 2, 3, 4)],
        [],
    ]
    assert whole[0]['losses'] != whole[1]['losses'], 'both processes saw the same data'
    files = [path.name for path in (tmp_path / 'whole').iterdir() if path.is_file()]
    kept = sorted(name for name in files if not name.endswith('.py'))  # the config
    assert kept == [*(f'epoch_{epoch}.pth' for epoch in (1, 2, 3, 4)), 'last_checkpoint']

    start = tmp_path / 'whole' / 'epoch_2.pth'
    final = load_checkpoint(tmp_path / 'whole' / 'epoch_4.pth')['state_dict']
    for number, by in enumerate(WRAPPERS):
        work_dir = tmp_path / f'by_{by}'
        resumed = run_ranks(tmp_path / f'meet_by_{by}', resume_toy, work_dir, by, start)
        # The other kind sums in another order.
        tolerance = dict(rel=0, abs=0) if by == wrapper else dict(rel=1e-4)
        for one, other in zip(resumed, whole, strict=True):
            assert len(one['losses']) == 4, number
            expected = {i: loss for i, loss in other['losses'].items() if i in one['losses']}
            assert one['losses'] == pytest.approx(expected, **tolerance)
        state = load_checkpoint(work_dir / 'epoch_4.pth')['state_dict']
        for name, value in final.items():
            torch.testing.assert_close(state[name], value, rtol=tolerance['rel'], atol=1e-6)

    # A checkpoint is one of a whole model: a single process goes on from it.
    alone = resume_toy(0, tmp_path / 'alone', None, start)
    assert min(alone['losses']) == 4


def scaled(rank, work_dir, counts, wrapper):
    optim = dict(optimizer=dict(type='SGD', lr=0.01), accumulative_counts=counts)
    return train_toy(
        rank,
        work_dir,
        wrapper,
        optim_wrapper=optim,
        param_scheduler=None,
        auto_scale_lr=dict(enable=True, base_batch_size=6),
        train_cfg=dict(by_epoch=True, max_epochs=1),
    )['rate']


@pytest.mark.parametrize('counts', [1, 3])
def test_the_learning_rate_scales_with_processes_and_accumulation(tmp_path, counts):
    # Three images per batch, where the learning rate was meant for six per update.
    assert scaled(0, tmp_path, counts, None) == pytest.approx(0.01 * 3 * counts / 6)
    rates = run_ranks(tmp_path / 'meet', scaled, tmp_path, counts, 'ddp')
    assert rates == pytest.approx([0.01 * 2 * 3 * counts / 6] * 2)


class SynchronisedModel(RunnerToy):
    """Normalises by a layer that torch has for GPUs only."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Sequential(self.backbone, torch.nn.SyncBatchNorm(4))


def test_sync_bn_trains_on_a_cpu_without_launcher(tmp_path):
    runner = toy_runner(tmp_path, by_epoch=False, model=SynchronisedModel())
    runner.train()
    norm = runner.model.backbone[1]
    assert norm.num_batches_tracked == 10
    assert norm.running_mean.abs().max() > 0


def prepared(rank, wrapper):
    """The config that is left of one with SyncBN."""
    os.environ.update(MASTER_ADDR='127.0.0.1')
    norm = dict(type='SyncBN', requires_grad=True)
    cfg = Config(dict(model=dict(decode_head=dict(norm_cfg=norm), neck=[dict(norm_cfg=norm)])))
    if wrapper:
        cfg.model_wrapper_cfg = dict(type=wrapper)
    cfg.launcher = 'pytorch'
    processes.open_group(cfg)
    return cfg.to_dict()


@pytest.mark.parametrize('wrapper', [None, 'FullyShardedModel'])
def test_what_becomes_of_a_config_on_cpus(tmp_path, wrapper):
    for cfg in run_ranks(tmp_path, prepared, wrapper):
        norm = dict(type='BN', requires_grad=True)
        assert cfg['model'] == dict(decode_head=dict(norm_cfg=norm), neck=[dict(norm_cfg=norm)])
        assert cfg['env_cfg']['dist_cfg']['backend'] == 'gloo'
        if wrapper:
            assert cfg['model_wrapper_cfg'] == dict(type=wrapper)
        else:
            assert cfg['model_wrapper_cfg'] == dict(
                type='MMDistributedDataParallel',
                broadcast_buffers=False,
                find_unused_parameters=False,
                device_ids=None,
            )


def test_the_base_config_is_what_is_tested():
    path = Path(__file__).parents[2] / 'configs' / '_base_' / 'fsdp.py'
    assert Config.fromfile(path).to_dict() == dict(model_wrapper_cfg=WRAPPERS['fsdp'])


class Scalar(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))


def refusals(rank, work_dir):
    """Messages of what cannot be sharded."""
    messages = []
    with pytest.raises(SettingError) as error:
        train_toy(rank, work_dir, 'fsdp', hooks=[EMAHook()])
    messages.append(str(error.value))
    with pytest.raises(SettingError) as error:
        FullyShardedModel(Scalar()).shard([])
    messages.append(str(error.value))
    with pytest.raises(SettingError) as error:
        train_toy(rank, work_dir, 'fsdp', runner=Runner)
    messages.append(str(error.value))
    return messages


def test_what_cannot_be_sharded(tmp_path):
    messages = run_ranks(tmp_path / 'meet', refusals, tmp_path)
    assert messages[0] == messages[1]
    assert ['EMAHook' in messages[0][0], 'scale' in messages[0][1]] == [True, True]
    assert "runner_type='ResumableRunner'" in messages[0][2]
    with pytest.raises(ValueError, match=r"units=\['Nothing'\] names classes .* Scalar"):
        FullyShardedModel(Scalar(), units=['Nothing'])


def test_a_single_process_needs_no_shards(tmp_path):
    runner = toy_runner(tmp_path, cfg=dict(model_wrapper_cfg=WRAPPERS['fsdp']))
    runner.train()
    assert not isinstance(runner.model, FullyShardedModel)
