"""The index of models, which openmim reads, names every config and says what is in it."""

from collections import Counter
from typing import Any

import pytest
import yaml
from config_zoo import ALL, ROOT, read
from mmengine.config import Config

INDEX = yaml.safe_load((ROOT / 'model-index.yml').read_text())
FILES = {name: yaml.safe_load((ROOT / name).read_text()) for name in INDEX['Import']}
MODELS: list[dict[str, Any]] = [model for file in FILES.values() for model in file['Models']]
# Measured here, and told in the README.
RESULTS = {
    'retinanet_idle-swin_digits': {'box AP': 61.9},
    'fpn_idle-pvtv2_digits': {'mIoU': 63.6},
}


def test_index_imports_every_metafile() -> None:
    present = [path.relative_to(ROOT).as_posix() for path in ROOT.glob('configs/**/metafile.yml')]
    assert sorted(INDEX['Import']) == sorted(present)


def test_every_config_is_named_once() -> None:
    named = Counter(model['Config'] for model in MODELS)
    assert named == Counter(f'configs/{name}' for name in ALL)
    assert max(Counter(model['Name'] for model in MODELS).values()) == 1


def test_models_belong_to_the_collection_of_their_file() -> None:
    names = []
    for file in FILES.values():
        (collection,) = file['Collections']
        names.append(collection['Name'])
        assert (ROOT / collection['README']).is_file()
        assert {model['In Collection'] for model in file['Models']} == {collection['Name']}
    assert len(set(names)) == len(names)


def test_metadata_are_those_of_the_configs(subtests: pytest.Subtests) -> None:
    for model in MODELS:
        with subtests.test(model['Name']):
            assert_describes(model, read(model['Config'].removeprefix('configs/')))


def assert_describes(model: dict[str, Any], cfg: Config) -> None:
    assert model['Name'] == model['Config'].rpartition('/')[2].removesuffix('.py')
    facts = model['Metadata']
    length = {
        'Epochs': cfg.train_cfg.get('max_epochs'),
        'Iterations': cfg.train_cfg.get('max_iters'),
    }
    for name, value in length.items():
        assert facts.get(name) == value
    assert facts['Batch Size'] == cfg.auto_scale_lr.base_batch_size
    assert facts['Architecture'][-1] == cfg.model.backbone.type
    hooks = str(cfg.get('custom_hooks'))
    techniques = {
        'AdamW': cfg.optim_wrapper.optimizer.type == 'AdamW',
        'Automatic Mixed Precision': cfg.optim_wrapper.type == 'AmpOptimWrapper',
        'Feature Distillation': 'FeatureDistillation' in hooks,
        'Random Keep Ratios': 'RandomKeepRatioHook' in hooks,
    }
    assert facts['Training Techniques'] == [name for name, used in techniques.items() if used]
    # No weights are published, and no results are claimed that were not measured here.
    assert 'Weights' not in model
    results = {k: v for result in model.get('Results', []) for k, v in result['Metrics'].items()}
    assert results == RESULTS.get(model['Name'], {})
