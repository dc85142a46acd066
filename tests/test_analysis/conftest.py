"""What several tests of the analyses share."""

import importlib
import sys

import pytest
from presets import PRESETS


@pytest.fixture
def tool():
    """Imports a tool of tools/analysis_tools by its name."""
    return importlib.import_module


@pytest.fixture
def run_tool(tool, monkeypatch):
    """Runs a tool of tools/analysis_tools in this process: (name, *arguments) to its exit code."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        return tool(name).main()

    return run


@pytest.fixture
def tiny_presets(monkeypatch):
    """Presets of tiny backbones."""
    swin = dict(embed_dims=8, depths=(1, 2), num_heads=(2, 4), strides=(4, 2), window_size=4)
    pvt = dict(embed_dims=8, num_layers=[1, 1, 1, 1], num_heads=[1, 1, 1, 1])
    swin |= dict(type='IdleSwinTransformer', out_indices=(0, 1))
    monkeypatch.setitem(PRESETS, 'tiny-swin', swin)
    monkeypatch.setitem(PRESETS, 'tiny-pvt', dict(pvt, type='IdlePyramidVisionTransformerV2'))
