"""What several tests of the analyses share."""

import importlib.util
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools' / 'analysis_tools'


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    """Folder of a handful of digit scenes of an odd size, 4 to train and 3 to validate."""
    from idlevit_mm.datasets.digit_scenes import write_digit_scenes

    folder = tmp_path_factory.mktemp('data') / 'digit_scenes'
    write_digit_scenes(
        folder,
        size=(70, 90),
        num_train=4,
        num_val=3,
        num_digits=(1, 3),
        digit_scale=(16, 40),
        progress=False,
    )
    return folder


@pytest.fixture
def run_tool(monkeypatch):
    """Runs a tool of tools/analysis_tools in this process: (name, *arguments) to its exit code."""

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        return module.main()

    return run
