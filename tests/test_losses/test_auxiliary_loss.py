"""The hook: losses by config alone, in any model, right under everything mmengine does."""

import copy
import pickle

import pytest
import torch
from backbone_zoo import FAMILIES, assert_close, assert_same_gradients, image
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn
from toys import (
    ToyModel,
    all_losses,
    checkpoint_of,
    real_batch,
    real_model,
    runner_settings,
)

from idlevit_mm.checkpoints import FOLLOWING
from idlevit_mm.hooks import AuxiliaryLossHook, add_losses
from idlevit_mm.losses import TokenCutLoss, build_losses

# Windows, reduced maps with a convolution, and a class token: the losses of each family are in
# test_token_cut.
VARIANTS = ('swin', 'pvtv2', 'vit')
NAMES = {'loss_token_cut', 'loss_distill_feature', 'loss_distill_logits'}
LIBRARIES = {'retinanet': 'bbox_head', 'faster_rcnn': 'rpn_head', 'segmentor': 'decode_head'}


@pytest.fixture
def checkpoint(tmp_path):
    """Returns a function that writes the teacher of a toy model."""

    def write(**kwargs):
        return checkpoint_of(ToyModel(seed=1, **kwargs), tmp_path / 'teacher.pth')

    return write


def with_losses(losses, **kwargs):
    """A toy model in training with extra losses, and these."""
    model = ToyModel(**kwargs).train()
    built = build_losses(losses)
    add_losses(model, built)
    return model, built


def step(model, x):
    """Logged losses and gradients of a forward pass; ``model`` may be wrapped."""
    inner = getattr(model, 'module', model)
    total, log = inner.parse_losses(model(x, mode='loss'))
    total.backward()
    return numbers(log), {name: p.grad for name, p in inner.named_parameters()}


def numbers(losses):
    return {name: value.item() for name, value in losses.items()}


# A whole run


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_run_of_the_runner(variant, tmp_path, checkpoint):
    path = checkpoint(variant=variant)
    model = ToyModel(variant)
    names = list(model.state_dict())
    runner = Runner(**runner_settings(tmp_path, model, all_losses(path)))
    runner.train()
    history = {
        name.removeprefix('train/'): scalar.data[0]
        for name, scalar in runner.message_hub.log_scalars.items()
    }
    parts = NAMES | {'loss_toy'}
    assert parts <= set(history)
    for index in range(2):
        values = [float(history[name][index]) for name in parts]
        assert all(value > 0 for value in values)
        assert float(history['loss'][index]) == pytest.approx(sum(values), rel=1e-5)

    assert list(model.state_dict()) == names
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    assert list(saved['state_dict']) == names
    groups = runner.optim_wrapper.param_groups
    optimised = {id(p) for group in groups for p in group['params']}
    assert optimised == {id(p) for p in model.parameters()}

    (hook,) = (hook for hook in runner.hooks if isinstance(hook, AuxiliaryLossHook))
    teachers = {id(loss.teacher.model): loss.teacher.model for loss in hook.losses[1:]}
    (teacher,) = teachers.values()
    assert not set(teacher.modules()) & set(model.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    for name, value in torch.load(path, weights_only=True)['state_dict'].items():
        assert torch.equal(value, teacher.state_dict()[name]), f'the teacher changed: {name}'
        if not name.endswith(FOLLOWING):
            assert not torch.equal(value, model.state_dict()[name])

    assert 'loss' not in model.__dict__
    assert 'forward' not in model.head.__dict__
    assert set(model(torch.ones(1, 3, 45, 58), mode='loss')) == {'loss_toy'}


def test_a_resumed_training_keeps_its_teacher(tmp_path, checkpoint):
    """A resumed runner knows the student's checkpoint only."""
    path = checkpoint()
    losses = [dict(type='FeatureDistillation')]

    def backbone_of_teacher(**changes):
        runner = Runner(**runner_settings(tmp_path, ToyModel(), losses, **changes))
        runner.train()
        (hook,) = (hook for hook in runner.hooks if isinstance(hook, AuxiliaryLossHook))
        return hook.losses[0].teacher.model.state_dict()

    first = backbone_of_teacher(load_from=path)
    again = backbone_of_teacher(
        load_from=str(tmp_path / 'epoch_1.pth'),
        resume=True,
        train_cfg=dict(by_epoch=True, max_epochs=2),
    )
    start = torch.load(path, weights_only=True)['state_dict']
    student = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['state_dict']
    learned = [name for name in first if not torch.equal(student[name], start[name])]
    assert learned
    for taught in (first, again):
        assert all(torch.equal(taught[name], start[name]) for name in taught)


def test_training_again_after_an_exception(tmp_path):
    """The losses are put in once."""
    model = ToyModel()
    settings = runner_settings(tmp_path, model, [dict(type='TokenCutLoss')])
    runner = Runner(**settings)
    runner.call_hook('before_train')
    runner.train()
    assert 'loss' not in model.__dict__


def test_a_model_can_be_copied_between_steps(checkpoint):
    """Recorded inputs hang on a graph, which cannot be copied."""
    model, _ = with_losses(all_losses(checkpoint()))
    model(image((1, 3, 45, 58)), mode='loss')
    copy.deepcopy(model.backbone)
    pickle.dumps(model.backbone)
    assert all(len(record.inputs) == 0 for record in model.backbone.records)
    assert not model.backbone.record_inputs
    assert 'forward' not in model.backbone.__dict__


def test_a_failing_step_leaves_nothing_behind(checkpoint):
    model, _ = with_losses(all_losses(checkpoint()))
    with pytest.raises(RuntimeError):
        model.loss(torch.ones(1, 5, 45, 58))
    assert 'forward' not in model.backbone.__dict__
    assert not model.backbone.record_inputs


# What training does to a forward pass


@pytest.mark.parametrize('variant', [v.name for v in FAMILIES])
def test_activation_checkpointing(variant, checkpoint):
    losses = all_losses(checkpoint(variant=variant))
    x = image((2, 3, 45, 58), dtype=torch.float64)
    plain, _ = with_losses(losses, variant=variant, double=True)
    saving, _ = with_losses(losses, variant=variant, double=True, with_cp=True)
    (log, grads), (saving_log, saving_grads) = step(plain, x), step(saving, x)
    assert saving_log == pytest.approx(log)
    assert_same_gradients(saving_grads, grads, 1e-10)


@pytest.mark.parametrize('variant', VARIANTS)
def test_gradient_accumulation(variant, checkpoint):
    """Two halves of a batch, accumulated, are one step on the batch: losses are image means."""
    losses = all_losses(checkpoint(variant=variant))
    x = image((4, 3, 45, 58), dtype=torch.float64)
    trained = []
    for parts in (1, 2):
        model, _ = with_losses(losses, variant=variant, double=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        wrapper = OptimWrapper(optimizer, accumulative_counts=parts)
        wrapper.initialize_count_status(model, 0, parts)
        for part in x.chunk(parts):
            model.train_step(dict(inputs=part), wrapper)
        trained.append(dict(model.named_parameters()))
    start = dict(ToyModel(variant, double=True).named_parameters())
    for name, value in trained[0].items():
        assert_close(trained[1][name], value, 1e-11, name)
    assert any((value - start[name]).abs().max() > 1e-4 for name, value in trained[0].items())


@pytest.mark.parametrize('variant', VARIANTS)
def test_autocast(variant, checkpoint):
    losses = all_losses(checkpoint(variant=variant))
    x = image((2, 3, 45, 58))
    model, built = with_losses(losses, variant=variant)
    exact = numbers(model(x, mode='loss'))
    seen = []
    teacher_conv = built[1].teacher.model.head.conv
    teacher_conv.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        losses = model(x, mode='loss')
    assert seen == [torch.bfloat16], 'the teacher runs in another precision than the student'
    total, log = model.parse_losses(losses)
    (64 * total).backward()  # as a scaler of gradients does
    for name in NAMES:
        assert losses[name].dtype == torch.float32
        assert log[name].item() == pytest.approx(exact[name], rel=0.15), name
    assert all(p.grad.isfinite().all() for p in model.parameters())


# Real models


@pytest.fixture
def scope(request):
    """The library of the parameter ``library``, as default scope."""
    pytest.importorskip('mmcv.ops')
    name = 'mmseg' if request.node.callspec.params['library'] == 'segmentor' else 'mmdet'
    pytest.importorskip(f'{name}.models')
    with DefaultScope.overwrite_default_scope(name):
        yield


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.usefixtures('scope')
def test_real_models(library, tmp_path):
    torch.manual_seed(1)
    path = checkpoint_of(real_model(library, 1.0), tmp_path / 'teacher.pth')
    model = real_model(library).train()
    names = list(model.state_dict())
    losses = build_losses(all_losses(path, LIBRARIES[library]))
    undo = add_losses(model, losses)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.001))
    before = copy.deepcopy(losses[1].teacher.model.state_dict())
    for _ in range(2):
        log = numbers(model.train_step(real_batch(library), wrapper))
        assert set(log) > NAMES
        assert all(log[name] > 0 for name in NAMES)
        summed = sum(v for k, v in log.items() if 'loss' in k and k != 'loss')
        assert log['loss'] == pytest.approx(summed, rel=1e-5)
    assert list(model.state_dict()) == names
    for name, value in losses[1].teacher.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    undo()
    assert not set(model.train_step(real_batch(library), wrapper)) & NAMES
    model.eval()
    with torch.no_grad():
        assert len(model.val_step(real_batch(library))) == 2


@pytest.mark.parametrize('library', LIBRARIES)
@pytest.mark.usefixtures('scope')
def test_real_models_learn_their_own_losses_as_before(library, tmp_path):
    """Extra losses of weight 0 change no other loss and no gradient."""
    torch.manual_seed(1)
    path = checkpoint_of(real_model(library, 1.0), tmp_path / 'teacher.pth')
    found = []
    for add in (False, True):
        torch.manual_seed(2)
        model = real_model(library).train()
        if add:
            configs = all_losses(path, LIBRARIES[library])
            add_losses(model, build_losses([dict(cfg, loss_weight=0) for cfg in configs]))
        torch.manual_seed(3)
        data = model.data_preprocessor(real_batch(library), True)
        total, log = model.parse_losses(model(**data, mode='loss'))
        total.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(({k: v for k, v in numbers(log).items() if k not in NAMES}, grads))
    assert found[0][0] == pytest.approx(found[1][0])
    # Distillation reaches stages that a head leaves out, here with weight 0.
    extra = {name: found[1][1].pop(name) for name in found[1][1].keys() - found[0][1].keys()}
    assert all(not grad.any() for grad in extra.values())
    assert_same_gradients(found[1][1], found[0][1], 1e-6)


@pytest.mark.parametrize('library', ['retinanet'])
@pytest.mark.usefixtures('scope')
def test_real_head_scores_are_taken_apart_rightly(library, tmp_path):
    """Two anchors of three classes: the binary divergences of what the head returns."""
    torch.manual_seed(1)
    teacher = real_model(library, 1.0).eval()
    path = checkpoint_of(teacher, tmp_path / 'teacher.pth')
    model = real_model(library).train()
    config = dict(type='LogitDistillation', teacher=dict(checkpoint=path), modules=['bbox_head'])
    add_losses(model, build_losses([config]))
    data = model.data_preprocessor(real_batch(library), True)
    got = model(**data, mode='loss')['loss_distill_logits']
    with torch.no_grad():
        own, goal = (
            torch.cat(
                [
                    part.permute(0, 2, 3, 1).reshape(2, -1, 3)
                    for part in network(data['inputs'], mode='tensor')[0]
                ],
                dim=1,
            ).sigmoid()
            for network in (model, teacher)
        )
    both = goal * (goal / own).log() + (1 - goal) * ((1 - goal) / (1 - own)).log()
    want = (both.sum((1, 2)) / goal.sum((1, 2)).clamp(min=1)).mean()
    assert got.item() == pytest.approx(want.item(), rel=1e-3)


# Models with several idle backbones, and without


class TwoBackbones(ToyModel):
    def __init__(self):
        super().__init__()
        self.other = ToyModel(seed=3).backbone
        self.ignored = nn.Identity()

    def extract_feat(self, inputs):
        return [a + b for a, b in zip(self.backbone(inputs), self.other(inputs), strict=True)]


def test_all_idle_backbones_count(tmp_path):
    path = checkpoint_of(TwoBackbones(), tmp_path / 'teacher.pth')
    model = TwoBackbones()
    losses = build_losses(all_losses(path))
    add_losses(model, losses)
    found = numbers(model.loss(image((1, 3, 45, 58))))
    seen = {name: getattr(model, name) for name in ('backbone', 'other')}
    for name, backbone in seen.items():
        single = ToyModel()
        single.backbone = backbone
        add_losses(single, [TokenCutLoss()])
        seen[name] = numbers(single.loss(image((1, 3, 45, 58))))['loss_token_cut']
    assert found['loss_token_cut'] == pytest.approx(sum(seen.values()) / 2)
    assert set(losses[1].names) == {'backbone', 'other'}
    assert losses[1].teacher.model.other.keep_ratios[0][0] == 1.0


class NoLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = ToyModel().backbone


def test_models_that_cannot_have_losses():
    with pytest.raises(ValueError, match='BaseModel has no idle backbone, which TokenCutLoss need'):
        add_losses(type('BaseModel', (nn.Module,), {})(), [TokenCutLoss()])
    with pytest.raises(TypeError, match='NoLoss has no method loss'):
        add_losses(NoLoss(), [TokenCutLoss()])
    model = ToyModel(policy=dict(scope='windows'))
    with pytest.raises(ValueError, match="backbone has policy.scope='windows'"):
        add_losses(model, [TokenCutLoss()])
    assert 'loss' not in model.__dict__
    model = ToyModel()
    add_losses(model, [TokenCutLoss(name='loss_toy')])
    with pytest.raises(ValueError, match="ToyModel has a loss 'loss_toy' already"):
        model.loss(image((1, 3, 45, 58)))


def test_errors_come_before_the_first_iteration(tmp_path):
    losses = [dict(type='FeatureDistillation', teacher=dict(checkpoint='nowhere.pth'))]
    runner = Runner(**runner_settings(tmp_path, ToyModel(), losses))
    with pytest.raises(FileNotFoundError, match="teacher.checkpoint='nowhere.pth' does not exist"):
        runner.train()
    assert runner.iter == 0
    assert not list(tmp_path.glob('*.pth'))


def test_only_one_hook(tmp_path):
    hooks = [dict(type='AuxiliaryLossHook', losses=[dict(type='TokenCutLoss')])] * 2
    runner = Runner(**runner_settings(tmp_path, ToyModel(), [], custom_hooks=hooks))
    with pytest.raises(ValueError, match='several AuxiliaryLossHook; put all losses into one'):
        runner.train()


@pytest.mark.parametrize(
    ('losses', 'error', 'message'),
    [
        ([], ValueError, r'losses=\[\] must name at least one of AssistedLoss, Feature'),
        (dict(type='TokenCutLoss'), TypeError, 'must be a list of dicts with a type'),
        ([dict(kind='both')], TypeError, 'must be a name or a dict with a type'),
        ([dict(type='CutLoss')], ValueError, "losses='CutLoss' is unknown; allowed: Assisted"),
        ([dict(type='TokenCutLoss', weight=1)], TypeError, "unknown key 'weight'; allowed: type,"),
        ([dict(type='TokenCutLoss')] * 2, ValueError, "name='loss_token_cut' twice"),
    ],
)
def test_bad_losses(losses, error, message):
    with pytest.raises(error, match=message):
        AuxiliaryLossHook(losses)
