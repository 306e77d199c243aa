from tests.metrics import _oracles

collect_ignore = [] if _oracles.UNCOMMITTED else ["test_uncommitted_oracles.py"]


def pytest_report_header() -> str:
    return f"oracles that may not be committed: {_oracles.UNCOMMITTED or 'not here, their tests are left out'}"
