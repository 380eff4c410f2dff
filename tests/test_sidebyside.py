"""What the scripts share they share to the letter, so that a diff of two shows the algorithm and
nothing else."""
import difflib
import re

import pytest

MARK = re.compile(r"^\s*# --- (.+?)\s*-*$")
THE_ALGORITHM_S = {"(head)", "arguments of the algorithm", "the algorithm", "setup of the algorithm",
                   "critic", "4. advantages", "5. update"}


def sections(script: str) -> dict[str, list[str]]:
    """Its lines by section; a comment line `# --- name` begins one."""
    name, found = "(head)", {"(head)": []}
    with open(script, encoding="utf-8") as file:
        for line in file.read().splitlines():
            if mark := MARK.match(line):
                name = mark.group(1)
                assert name not in found, f"{script}: two sections {name!r}"
                found[name] = []
            found[name].append(line)
    return found


def difference(name: str, script: str) -> str:
    """Of a section from grpo.py's, as a diff; empty where there is none."""
    return "\n".join(difflib.unified_diff(
        sections("grpo.py")[name], sections(script)[name], "grpo.py", script, lineterm=""))


@pytest.mark.parametrize("script", ["ppo.py", "reinforce.py"])
def test_shared_sections_are_the_same_to_the_letter(script):
    for name in sections("grpo.py"):
        assert name in THE_ALGORITHM_S or not difference(name, script), difference(name, script)


@pytest.mark.parametrize("script", ["ppo.py", "reinforce.py"])
def test_sections_come_in_one_order(script):
    names = [name for name in sections(script) if name != "critic"]
    assert names == list(sections("grpo.py"))
    assert {"sampling", "setup", "1. generate", "2. score", "3. kl", "6. log"} <= set(names)


def test_dpo_samples_as_the_others_do():
    # up to main, which that section ends with
    assert not difference("sampling", "dpo.py"), difference("sampling", "dpo.py")


@pytest.mark.parametrize("script", ["grpo.py", "ppo.py", "reinforce.py", "dpo.py", "reward_model.py"])
def test_no_script_imports_another(script):
    with open(script, encoding="utf-8") as file:
        imported = set(re.findall(r"^\s*(?:from|import) (\w+)", file.read(), re.M))
    assert not imported & {"grpo", "ppo", "reinforce", "dpo", "reward_model"} and "common" in imported
