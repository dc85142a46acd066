"""What several tests of the analyses share."""

import importlib
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools' / 'analysis_tools'


@pytest.fixture
def tool(monkeypatch):
    """Imports a tool of tools/analysis_tools by its name."""
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module


@pytest.fixture
def run_tool(tool, monkeypatch):
    """Runs a tool of tools/analysis_tools in this process: (name, *arguments) to its exit code."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        return tool(name).main()

    return run
