"""What several tests of the analyses share."""

import importlib.util
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools' / 'analysis_tools'


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
