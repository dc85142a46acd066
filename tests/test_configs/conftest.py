import pytest


@pytest.fixture(autouse=True)
def _no_machine_report(monkeypatch):
    """The runner starts compilers to log their versions; no test reads that."""
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
