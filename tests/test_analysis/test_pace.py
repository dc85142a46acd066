"""The pace of a device, from times of blocks."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools' / 'analysis_tools'))

import pace

from idlevit_mm.blocks import Work, seconds
from idlevit_mm.kernels import Pace

OWN = Pace(3 * 10**10, 8 * 10**10, 2 * 10**10, 5 * 10**9, 20_000, 300_000)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_pace_that_made_the_times_is_found(dtype):
    generator = np.random.default_rng(0)
    works = [
        Work(*row) for row in 10 ** generator.uniform((7, 6, 5, 0, 0), (10, 9, 8, 2, 1), (40, 5))
    ]
    blocks = pd.DataFrame(works).assign(seconds=[seconds(work, OWN, dtype) for work in works])
    known = Pace(1, 2, 3, 4, 5, 6)
    found = pace.fitted(blocks, known, dtype)
    half = dtype == torch.bfloat16
    assert found[:2] == pytest.approx((1, OWN.half) if half else (OWN.single, 2), rel=1e-6)
    assert found[2:] == pytest.approx(OWN[2:], rel=1e-4)
    assert pace.errors_of(blocks, found, dtype).abs().max() < 1e-4
    slower = OWN._replace(single=OWN.single // 2, half=OWN.half // 2)
    assert pace.errors_of(blocks, slower, dtype).max() > 0.5


def test_the_tool_measures_each_block(tmp_path, monkeypatch, capsys):
    out = tmp_path / 'pace.json'
    options = ['--models', 'pvt-t', '--shapes', '33x64', '--keep-ratios', '1.0', '0.5']
    arguments = ['pace.py', *options, '--rounds', '1', '--out', str(out)]
    monkeypatch.setattr(sys, 'argv', arguments)
    monkeypatch.setattr(pace, 'keep_freed_memory', lambda: None)  # it stays for the other tests
    assert pace.main() == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    assert '16 blocks, float32' in text
    assert 'half of the errors within' in text
    assert len(found['blocks']) == 2 * 8
    assert min(block['seconds'] for block in found['blocks']) > 0
    assert set(found['pace']) == set(Pace._fields)
