"""Settings shared by all tests."""

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)


@pytest.fixture(params=['squeezed', 'static'])
def each_window_path(request, monkeypatch):
    """Runs a test twice: with the windows of the CPU, and with those of GPUs and compilers."""
    if request.param == 'static':
        from idlevit_mm.layers.window_attention import WindowMSA

        monkeypatch.setattr(WindowMSA, 'squeezes', lambda self, qkv: False)
