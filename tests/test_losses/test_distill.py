"""Distances between student and teacher, and what is refused as a teacher."""

import math
from types import SimpleNamespace

import pytest
import torch
from backbone_zoo import image as images
from mmengine.config import Config
from torch import nn
from toys import ToyModel, checkpoint_of

from idlevit_mm.checkpoints import write_weights
from idlevit_mm.engine.checks import check_teachers
from idlevit_mm.errors import SettingError, UsageError
from idlevit_mm.hooks import add_losses
from idlevit_mm.losses import FeatureDistillation, LogitDistillation, TokenCutLoss
from idlevit_mm.losses.distill import class_scores, direction_distance, divergence, is_sigmoid

F64 = torch.float64


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize('batch', [1, 3])
def test_distance_of_directions(batch):
    own, other = noise(batch, 6, 3, 5), noise(batch, 6, 3, 5, seed=1)
    total = 0.0
    for b in range(batch):
        for r in range(3):
            for c in range(5):
                a, t = own[b, :, r, c], other[b, :, r, c]
                total += 2 - 2 * float(a @ t / (a.norm() * t.norm()))
    assert direction_distance(own, other).item() == pytest.approx(total / (batch * 15))
    assert direction_distance(own, 7 * own) < 1e-12


def test_distance_does_not_vanish_in_wide_maps():
    """Random directions are about as far apart whatever the width."""
    for channels in (8, 512):
        distance = direction_distance(noise(1, channels, 9, 9), noise(1, channels, 9, 9, seed=1))
        assert 1.6 < distance < 2.4


@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_divergence_of_classes(temperature):
    own = [noise(2, 1, 4, 2, 3), noise(2, 1, 4, 1, 1, seed=2)]
    other = [noise(2, 1, 4, 2, 3, seed=1), noise(2, 1, 4, 1, 1, seed=3)]
    total = 0.0
    for a, t in zip(own, other, strict=True):
        a, t = (part.permute(0, 1, 3, 4, 2).reshape(-1, 4).tolist() for part in (a, t))
        for row, goal in zip(a, t, strict=True):
            p = [math.exp(v / temperature) for v in goal]
            q = [math.exp(v / temperature) for v in row]
            p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
            total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    want = temperature**2 * total / (2 * 7)
    assert divergence(own, other, temperature, False).item() == pytest.approx(want)
    assert divergence(own, own, temperature, False).abs() < 1e-12


@pytest.mark.parametrize('temperature', [1.0, 3.0])
@pytest.mark.parametrize('shift', [0.0, -9.0])
def test_divergence_of_independent_classes(temperature, shift):
    own, other = noise(2, 3, 4, 2, 3) + shift, noise(2, 3, 4, 2, 3, seed=1) + shift
    want = 0.0
    for image in range(2):
        total, expected = 0.0, 0.0
        a, t = own[image].flatten().tolist(), other[image].flatten().tolist()
        for x, y in zip(a, t, strict=True):
            q, p = (1 / (1 + math.exp(-v / temperature)) for v in (x, y))
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            expected += 1 / (1 + math.exp(-y))
        assert (expected < 1) == (shift < 0)
        want += temperature**2 * total / max(expected, 1.0) / 2
    assert divergence([own], [other], temperature, True).item() == pytest.approx(want)
    halves = [part.split(1, dim=3) for part in (own, other)]
    assert divergence(*halves, temperature, True).item() == pytest.approx(want)


def test_divergence_of_certain_classes_is_finite():
    own = torch.tensor([200.0, -200.0]).view(1, 1, 2, 1, 1).requires_grad_()
    for sigmoid in (True, False):
        loss = divergence([own], [-own.detach()], 1.0, sigmoid)
        loss.backward()
        assert loss.isfinite()
        assert own.grad.isfinite().all()


def test_only_class_scores_of_a_head_count():
    scores, deltas = [noise(2, 6, 3, 4), noise(2, 6, 2, 2)], [noise(2, 8, 3, 4)] * 2
    head = nn.Module()
    head.cls_out_channels = 3
    for output in ((scores, deltas), scores):
        found = class_scores(output, head)
        assert [part.shape for part in found] == [(2, 2, 3, 3, 4), (2, 2, 3, 2, 2)]
    found = class_scores(scores[0], nn.Module())
    assert [part.shape for part in found] == [(2, 1, 6, 3, 4)]


def test_kind_of_head():
    def head(**values):
        module = nn.Module()
        for name, value in values.items():
            setattr(module, name, value)
        return module

    use, plain = (SimpleNamespace(use_sigmoid=flag) for flag in (True, False))
    assert is_sigmoid(head(use_sigmoid_cls=True))
    assert not is_sigmoid(head(use_sigmoid_cls=False, loss_cls=use))
    assert is_sigmoid(head(loss_decode=use))
    assert not is_sigmoid(head(loss_decode=plain, out_channels=5))
    assert is_sigmoid(head(loss_decode=plain, out_channels=1))
    assert is_sigmoid(head(loss_decode=nn.ModuleList([nn.Identity(), head(use_sigmoid=True)])))


# Teachers


@pytest.fixture
def checkpoint(tmp_path):
    return checkpoint_of(ToyModel(keep_ratios=1.0, seed=1), tmp_path / 'teacher.pth')


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_teacher_may_be_at_an_address(suffix, served):
    """Recipes name the published checkpoint both as start and as teacher."""
    folder, address = served
    weights = ToyModel(keep_ratios=1.0, seed=1).state_dict()
    write_weights(weights, folder / f'teacher{suffix}', 'state_dict')
    loss = FeatureDistillation(dict(checkpoint=f'{address}teacher{suffix}'))
    model = ToyModel()
    add_losses(model, [loss])
    assert model.loss(torch.ones(1, 3, 45, 58))['loss_distill_feature'] > 0
    for name, value in loss.teacher.model.state_dict().items():
        assert torch.equal(weights[name], value), name
    lost = FeatureDistillation(dict(checkpoint=f'{address}gone{suffix}'))
    with pytest.raises(UsageError, match=rf'gone{suffix} cannot be fetched'):
        add_losses(ToyModel(), [lost])


def test_stages(checkpoint):
    values = []
    for stages in (None, [0], [1]):
        model = ToyModel()
        loss = FeatureDistillation(dict(checkpoint=checkpoint), 1.0, stages)
        add_losses(model, [loss])
        values.append(model.loss(torch.ones(1, 3, 45, 58))['loss_distill_feature'])
        assert loss.teacher.model.backbone.keep_ratios == [[1.0, 1.0], [1.0, 1.0]]
        assert model.backbone.keep_ratios == [[0.5, 0.5], [0.5, 0.5]]
    torch.testing.assert_close(values[0], (values[1] + values[2]) / 2)
    with pytest.raises(ValueError, match=r'stages=\(2,\) must lie in 0 to 1'):
        add_losses(ToyModel(), [FeatureDistillation(dict(checkpoint=checkpoint), stages=[2])])


def test_a_perfect_student_has_nothing_to_learn(tmp_path):
    model = ToyModel(keep_ratios=1.0)
    teacher = dict(checkpoint=checkpoint_of(model, tmp_path / 'same.pth'))
    losses = [FeatureDistillation(teacher), LogitDistillation(teacher, ['head']), TokenCutLoss()]
    add_losses(model, losses)
    found = model.loss(torch.ones(2, 3, 45, 58))
    assert found['loss_distill_feature'] < 1e-6
    assert found['loss_distill_logits'].abs() < 1e-6
    assert found['loss_token_cut'] == 0
    sum(found.values()).backward()


def test_the_student_learns_and_the_teacher_does_not(checkpoint):
    teacher = dict(checkpoint=checkpoint)
    for loss in (FeatureDistillation(teacher), LogitDistillation(teacher, ['head'])):
        model = ToyModel()
        add_losses(model, [loss])
        model.loss(images((2, 3, 45, 58)))[loss.name].backward()
        # The head looks at the first stage alone.
        taught = [model.head, model.backbone.stages[0].blocks]
        if isinstance(loss, FeatureDistillation):
            taught = [model.backbone]
        for name, parameter in nn.ModuleList(taught).named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        assert all(parameter.grad is None for parameter in loss.teacher.model.parameters())


def test_one_teacher_runs_once_for_all_losses(checkpoint):
    teacher = dict(checkpoint=checkpoint)
    losses = [
        FeatureDistillation(teacher),
        FeatureDistillation(dict(teacher), stages=[0], name='loss_first'),
        LogitDistillation(teacher, ['head']),
    ]
    model = ToyModel()
    add_losses(model, losses)
    (network,) = {loss.teacher.model for loss in losses}
    runs = []
    network.backbone.register_forward_hook(lambda *_: runs.append(1))
    for number in (1, 2):
        model.loss(torch.ones(1, 3, 45, 58) * number)
        assert len(runs) == number
    assert not losses[0].teacher._calls, 'the last batch is kept alive'


def test_the_student_teaches_itself_with_all_tokens_active():
    model = ToyModel(keep_ratios=0.5)
    losses = [FeatureDistillation('student'), LogitDistillation('student', ['head'])]
    keys = set(model.state_dict())
    undo = add_losses(model, losses)
    (teacher,) = {loss.teacher for loss in losses}
    for _ in range(2):
        found = model.loss(torch.randn(2, 3, 32, 32), None)
        sum(found.values()).backward()
        assert found['loss_distill_feature'] > 0
        # What it teaches has no gradient, and follows the weights.
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * (0 if weight.grad is None else weight.grad)
        for one, other in zip(model.parameters(), teacher.model.parameters(), strict=True):
            assert one is other
            assert one.requires_grad
    assert teacher.model.backbone.keep_ratios == [[1.0, 1.0], [1.0, 1.0]]
    assert model.backbone.keep_ratios == [[0.5, 0.5], [0.5, 0.5]]
    assert model.training
    assert set(model.state_dict()) == keys
    model.backbone.set_keep_ratios(1.0)
    assert model.loss(torch.randn(2, 3, 32, 32), None)['loss_distill_feature'] < 1e-9
    undo()
    next(model.parameters()).full_tensor = None  # as those have that FSDP keeps in shards
    with pytest.raises(SettingError, match="teacher='student' needs the weights whole"):
        add_losses(model, [FeatureDistillation('student')])


def test_another_network_as_teacher(checkpoint, tmp_path):
    config = tmp_path / 'teacher.py'
    config.write_text("model = dict(type='ToyTeacher')\ndefault_scope = 'mmengine'\n")
    from mmengine.registry import MODELS

    class ToyTeacher(ToyModel):
        def __init__(self):
            super().__init__(keep_ratios=0.25)

    MODELS.register_module(module=ToyTeacher, force=True)
    loss = FeatureDistillation(dict(config=str(config), checkpoint=checkpoint))
    add_losses(ToyModel(), [loss])
    assert loss.teacher.model.backbone.keep_ratios[0][0] == 0.25


def test_a_teacher_of_features_is_a_backbone_only(checkpoint, tmp_path):
    """Heads take no memory, and need not be those of this version of the detector."""
    weights = torch.load(checkpoint, weights_only=True)['state_dict']
    renamed = {key.replace('head.', 'old_head.'): value for key, value in weights.items()}
    assert renamed.keys() != weights.keys()
    path = tmp_path / 'renamed.pth'
    torch.save(dict(state_dict=renamed), path)
    loss = FeatureDistillation(dict(checkpoint=str(path)))
    model = ToyModel()
    add_losses(model, [loss])
    assert {name for name, _ in loss.teacher.model.named_children()} == {'backbone'}
    for name in model.backbone.state_dict():
        assert torch.equal(
            loss.teacher.model.backbone.state_dict()[name], weights[f'backbone.{name}']
        )
    assert model.loss(torch.ones(1, 3, 45, 58))['loss_distill_feature'] > 0
    with pytest.raises(ValueError, match='does not fit ToyModel: it lacks 2 weights .*has unknown'):
        add_losses(ToyModel(), [LogitDistillation(dict(checkpoint=str(path)), ['head'])])


def test_tables_that_follow_from_the_window_may_be_absent(checkpoint, tmp_path):
    weights = torch.load(checkpoint, weights_only=True)['state_dict']
    kept = {key: v for key, v in weights.items() if not key.endswith('relative_position_index')}
    path = tmp_path / 'without.pth'
    torch.save(dict(state_dict=kept), path)
    loss = FeatureDistillation(dict(checkpoint=str(path)))
    add_losses(ToyModel(), [loss])
    for name, value in loss.teacher.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_the_start_of_training_is_the_teacher_unless_told_otherwise(checkpoint):
    model, loss = ToyModel(), FeatureDistillation()
    add_losses(model, [loss], start=checkpoint)
    for name, value in torch.load(checkpoint, weights_only=True)['state_dict'].items():
        if name.startswith('backbone.'):
            assert torch.equal(loss.teacher.model.state_dict()[name], value), name
    with pytest.raises(SettingError, match='teacher=None is .*there is none: set load_from'):
        add_losses(ToyModel(), [FeatureDistillation()])


def other_teacher(tmp_path, **kwargs):
    return checkpoint_of(ToyModel(**kwargs), tmp_path / 'other.pth')


def test_refused_teachers(tmp_path, checkpoint):
    def refuse(error, message, **teacher):
        with pytest.raises(error, match=message):
            add_losses(ToyModel(), [FeatureDistillation(teacher)])

    refuse(FileNotFoundError, "teacher.checkpoint='gone.pth' does not exist", checkpoint='gone.pth')
    refuse(
        FileNotFoundError,
        "teacher.config='gone.py' does not exist",
        checkpoint=checkpoint,
        config='gone.py',
    )
    wide = other_teacher(tmp_path, embed_dims=16)
    refuse(ValueError, 'does not fit ToyModel: it has another shape of', checkpoint=wide)
    deep = other_teacher(tmp_path, depths=(2, 4))
    refuse(ValueError, 'has unknown 2. weights', checkpoint=deep)
    refuse(TypeError, 'must name a checkpoint', config='x.py')
    refuse(TypeError, "allowed: None, 'student', dict", checkpoint=checkpoint, weights='x')


def test_the_tools_check_for_files_of_teachers(checkpoint):
    """In one line, before the data are read."""

    def cfg(**teacher):
        losses = [dict(type='TokenCutLoss'), dict(type='FeatureDistillation', teacher=teacher)]
        return Config(dict(custom_hooks=[dict(type='AuxiliaryLossHook', losses=losses)]))

    check_teachers(Config(dict()))
    check_teachers(cfg(checkpoint=checkpoint))
    check_teachers(cfg(checkpoint='https://example.org/teacher.pth'))
    with pytest.raises(UsageError, match=r'custom_hooks.0.losses.1.teacher.checkpoint=gone.pth do'):
        check_teachers(cfg(checkpoint='gone.pth'))
    with pytest.raises(UsageError, match=r'teacher.config=gone.py does not exist'):
        check_teachers(cfg(checkpoint=checkpoint, config='gone.py'))
    untold = dict(type='AuxiliaryLossHook', losses=[dict(type='FeatureDistillation')])
    with pytest.raises(
        UsageError, match=r'losses.0 \(FeatureDistillation\) has no teacher.*load_from'
    ):
        check_teachers(Config(dict(custom_hooks=[untold])))
    check_teachers(Config(dict(custom_hooks=[untold], load_from=checkpoint)))
    check_teachers(Config(dict(custom_hooks=[untold], resume=True)))


def test_a_dense_teacher_needs_no_weights_of_a_policy(checkpoint):
    """Scorers that learn have weights, which a dense network never had."""
    model = ToyModel(policy=dict(scorer='learned'))
    assert any('.policy.' in name for name in model.state_dict())
    loss = FeatureDistillation(dict(checkpoint=checkpoint))
    add_losses(model, [loss])
    assert model.loss(torch.ones(1, 3, 45, 58))['loss_distill_feature'] > 0
    weights = torch.load(checkpoint, weights_only=True)['state_dict']
    for name, value in loss.teacher.model.state_dict().items():
        if '.policy.' not in name:
            assert torch.equal(weights[name], value), name


def test_outputs_of_another_shape(tmp_path, checkpoint):
    logits = LogitDistillation(dict(checkpoint=checkpoint), ['head'])
    model = ToyModel()
    add_losses(model, [logits])
    logits.teacher.model.head.conv = nn.Conv2d(8, 3, 1)
    with pytest.raises(ValueError, match=r'class scores of head differ: the student gives .*4'):
        model.loss(torch.ones(1, 3, 45, 58))


def test_another_number_of_outputs(checkpoint):
    loss = FeatureDistillation(dict(checkpoint=checkpoint))
    model = ToyModel()
    add_losses(model, [loss])
    loss.teacher.model.backbone.out_indices = (1,)
    with pytest.raises(ValueError, match='outputs of backbone differ: .* same number and shape'):
        model.loss(torch.ones(1, 3, 45, 58))


@pytest.mark.parametrize(
    ('call', 'error', 'message'),
    [
        (lambda t: LogitDistillation(t, 'head'), TypeError, "modules='head' must be names"),
        (lambda t: LogitDistillation(t, []), TypeError, 'modules='),
        (lambda t: LogitDistillation(t, ['head'], temperature=0), ValueError, 'temperature=0'),
        (lambda t: FeatureDistillation(t, stages=[-1]), ValueError, r'stages=\[-1\]'),
        (lambda t: FeatureDistillation('x.pth'), TypeError, "teacher='x.pth'"),
        (lambda t: FeatureDistillation(t, loss_weight=-2), ValueError, 'loss_weight=-2'),
    ],
)
def test_bad_arguments(call, error, message, checkpoint):
    with pytest.raises(error, match=message):
        call(dict(checkpoint=checkpoint))


def test_heads_that_are_not_there(checkpoint):
    loss = LogitDistillation(dict(checkpoint=checkpoint), ['bbox_head'])
    with pytest.raises(ValueError, match="modules names 'bbox_head', which the model ToyModel .*"):
        add_losses(ToyModel(), [loss])
