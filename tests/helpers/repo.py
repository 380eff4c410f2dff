"""What the tests of the repository's other files share: the source of the scripts, and tools that end in one line."""
import ast
import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

from modeling import UserError

ROOT = Path(__file__).parent.parent.parent
ON_POLICY = ["grpo.py", "ppo.py", "reinforce.py"]
SCRIPTS = [*ON_POLICY, "dpo.py", "reward_model.py"]
MODULES = ["common.py", "modeling.py", "flags.py", "runtime.py", "checkpoints.py", "evaluation.py"]
MARK = re.compile(r"^\s*# (?:--- (.+)|(\d\. .+))$")


def sections(source: str) -> dict[str, list[str]]:
    """The lines of a script by section. `# --- name` and `# 1. name` begin one."""
    name, found = "(head)", {"(head)": []}
    for line in source.splitlines():
        if mark := MARK.match(line):
            name = mark.group(1) or mark.group(2)
            assert name not in found, f"two sections {name!r}"
            found[name] = []
        found[name].append(line)
    return found


def read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8")


def imported(source: str) -> dict[str, list[str]]:
    """The names that a file imports from each module, wherever the import is."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found.setdefault(node.module, []).extend(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name, []).append(alias.name)
    return found


def load(path: str):
    """The module of a file in tools/ or benchmarks/, where names occur twice."""
    name = path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def user_error(function, *arguments, **flags) -> str:
    """The line that a user sees of a mistake."""
    with pytest.raises(UserError) as error:
        function(*arguments, **flags)
    line = str(error.value)
    assert line and "\n" not in line
    return line


def fails_as_command(monkeypatch, capsys, path: str, *argv) -> str:
    """The one line on stderr of a tool that ends with exit code 2, run as its command line runs it."""
    monkeypatch.setattr(sys, "argv", [path, *map(str, argv)])
    monkeypatch.setattr(sys, "path", [str((ROOT / path).parent), *sys.path])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # cli puts others in their place
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    out, error = capsys.readouterr()
    assert (stop.value.code, out, error.count("\n")) == (2, "", 1)
    return error
