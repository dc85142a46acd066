import functools

import pytest
import safetensors.torch

SMALLEST = 'vit_tiny_patch16_224.augreg_in21k_ft_in1k'


@pytest.fixture
def pretrained_timm(tmp_path, monkeypatch):
    """Lets timm find a file where it would download the weights of its smallest ViT.

    Returns the name of that model and the weights in the file.
    """
    timm = pytest.importorskip('timm')
    model = timm.create_model(SMALLEST, pretrained=False)
    safetensors.torch.save_file(model.state_dict(), tmp_path / 'timm.safetensors')
    overlay = dict(file=str(tmp_path / 'timm.safetensors'))
    create = functools.partial(timm.create_model, pretrained_cfg_overlay=overlay)
    monkeypatch.setattr(timm, 'create_model', create)
    return SMALLEST, model.state_dict()
