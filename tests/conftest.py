"""Settings shared by all tests."""

import os

os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_seed():
    torch.manual_seed(0)
