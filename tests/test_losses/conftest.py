import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest


@pytest.fixture(autouse=True)
def _no_machine_report(monkeypatch):
    """The runner starts compilers to log their versions; no test reads that."""
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
