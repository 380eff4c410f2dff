"""Tests import the scripts from the repository's root, and run with it as the working folder."""
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run two at a time, and start processes of their own

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]


LONG = ["runs/test_options", "runs/test_resume", "runs/test_processes", "runs/test_scripts", "runs/test_robust",
        "runs/test_bad_input", "exact/test_grpo", "repo/test_credit", "unit/test_logprobs"]


def pytest_collection_modifyitems(items):
    """The files that take longest first, so that neither of the two processes ends with one of them."""
    order = {f"tests/{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
