"""Parity is tested in float64, so that rounding hides no difference. After the tests the largest
relative errors are printed."""
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pytest_terminal_summary(terminalreporter):
    worst = getattr(sys.modules.get("parity.peer"), "worst", {})
    if worst:
        terminalreporter.section("largest relative error against TRL")
        terminalreporter.write_line(f"{'':48}{'loss':>10}{'gradient':>10}")
        for what, errors in worst.items():
            terminalreporter.write_line(f"{what:48}" + "".join(
                f"{'':10}" if e is None else f"{e:10.1e}" for e in errors))
