"""What several tests of the analyses share."""

import importlib
import sys

import pytest


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
