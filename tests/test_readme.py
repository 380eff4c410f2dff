"""What the README points to is there: files, lines, flags."""
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

SCRIPTS = ["grpo", "ppo", "reinforce", "dpo", "reward_model"]


@pytest.fixture
def readme() -> str:
    return Path("README.md").read_text(encoding="utf-8")


def test_links_lead_somewhere(readme):
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", readme)
    assert len(links) > 20
    for link in links:
        path, _, place = link.partition("#")
        if path:
            assert Path(path).is_file(), link
        if place.startswith("L"):  # to a line: the one where a step begins
            assert "# --- " in Path(path).read_text(encoding="utf-8").splitlines()[int(place[1:]) - 1], link
        elif place:
            titles = re.findall(r"^#+ (.+)$", readme, re.M)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert place in anchors, link


def test_links_to_the_steps_lead_to_their_marks(readme):
    rows = re.findall(r"^\| (\d\. \w+) \|(.+)$", readme, re.M)
    assert [name for name, _ in rows] == ["1. generate", "2. score", "3. kl", "4. advantages", "5. update", "6. log"]
    for name, cells in rows:
        for path, line in re.findall(r"\]\((\w+\.py)#L(\d+)\)", cells):
            assert Path(path).read_text(encoding="utf-8").splitlines()[int(line) - 1].strip() == f"# --- {name}", path


def test_commands_name_files_and_flags_that_exist(readme):
    commands = re.findall(r"python ((?:\w+/)?\w+\.py)((?: (?![#│|`])[^\s`)]+)*)", readme)
    assert len(commands) > 20
    for path, rest in commands:
        assert Path(path).is_file() or path == "my_reward.py", path
        if path.removesuffix(".py") in SCRIPTS:
            known = {f.name for f in dataclasses.fields(importlib.import_module(path.removesuffix(".py")).Args)}
            for flag in re.findall(r"--([a-z][\w-]*)", rest):
                name = flag.replace("-", "_")
                assert name in known or name.removeprefix("no_") in known or name == "help", (path, flag)
