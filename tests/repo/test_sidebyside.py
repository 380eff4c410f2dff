"""The scripts read side by side: what they share is the same to the letter, so a diff shows the algorithm."""
import ast
import difflib
from pathlib import Path

import pytest

from helpers.repo import MODULES, SCRIPTS, imported, read, sections

RESAMPLING = "dynamic sampling (DAPO, eq. 11): replaces groups of equal scores, in a few rounds"  # only in grpo.py
OF_THE_ALGORITHM = {"(head)", "flags of the algorithm", "the algorithm", "setup of the algorithm", "4. advantages",
                    "5. update", RESAMPLING}
OWN_DEFAULTS = {"lr", "minibatches"}


def difference(ours: list[str], others: list[str], script: str) -> str:
    return "\n".join(difflib.unified_diff(ours, others, "grpo.py", script, lineterm=""))


def flags(source: str) -> list[str]:
    """The flags that come before those of the algorithm, with their help."""
    head = sections(source)["(head)"]
    return head[head.index("@dataclass") + 2:]


def without_default(lines: list[str]) -> list[str]:
    return [line.partition(" = ")[0] if line.strip().partition(":")[0] in OWN_DEFAULTS else line for line in lines]


@pytest.mark.parametrize("script", ["ppo.py", "reinforce.py"])
def test_shared_sections_are_the_same_to_the_letter(script):
    ours, others = sections(read("grpo.py")), sections(read(script))
    assert [name for name in ours if name != RESAMPLING] == [
        name for name in others if name != "the critic"]  # in the same order
    assert {"generate", "setup", "steps", "1. generate a group of completions for each prompt", "2. score them",
            "6. log, evaluate, save"} <= set(ours) - OF_THE_ALGORITHM
    for name in set(ours) - OF_THE_ALGORITHM:
        assert ours[name] == others[name], difference(ours[name], others[name], script)


@pytest.mark.parametrize("script", ["ppo.py", "reinforce.py"])
def test_shared_flags_are_the_same_but_for_their_defaults(script):
    ours, others = without_default(flags(read("grpo.py"))), without_default(flags(read(script)))
    assert len(ours) > 20 and ours == others, difference(ours, others, script)


def test_dpo_and_reward_model_have_the_same_marks():
    marks = [name for name in sections(read("dpo.py")) if name != "(head)"]
    assert marks == [name for name in sections(read("reward_model.py")) if name != "(head)"]
    assert {"the algorithm", "setup", "steps", "1. take some pairs", "2. update",
            "3. log, evaluate, save"} <= set(marks)


def test_lines_fit_in_two_panes():
    files = sorted(Path().glob("*.py"))
    assert {path.name for path in files} >= {*SCRIPTS, *MODULES}
    too_long = [f"{path}:{n}: {len(line)} columns" for path in files
                for n, line in enumerate(read(path).splitlines(), 1) if len(line) > 95]
    assert not too_long, "\n".join(too_long)


@pytest.mark.parametrize("script", SCRIPTS)
def test_main_has_no_inner_functions(script):
    main, = (node for node in ast.parse(read(script)).body if getattr(node, "name", "") == "main")
    inner = [node for node in ast.walk(main)
             if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef))
             and node is not main]
    assert not inner, f"{script}:{inner[0].lineno}"


@pytest.mark.parametrize("path", [*SCRIPTS, *MODULES])
def test_no_file_imports_a_script(path):
    assert not set(imported(read(path))) & {name.removesuffix(".py") for name in SCRIPTS}


def test_each_shared_file_needs_only_those_before_it():
    names = ["modeling", "flags", "common", "runtime", "checkpoints", "evaluation"]
    assert {f"{name}.py" for name in names} == set(MODULES)
    later = {"flags": {"runtime"}, "runtime": {"checkpoints"}}  # imported by a function, when it is called
    for i, name in enumerate(names):
        needed = set(imported(read(f"{name}.py"))) & set(names)
        assert needed - later.get(name, set()) <= set(names[:i]), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_at_most_34_names_of_the_other_files(script):
    found = imported(read(script))
    names = [name for module in MODULES for name in found.get(module.removesuffix(".py"), [])]
    assert 10 < len(names) <= 34, names


def test_the_checks_see_what_they_look_for():
    source = "import grpo\nfrom common import a, b\n# --- one\nx\n    # 2. two three\ny\n"
    assert imported(source) == {"grpo": ["grpo"], "common": ["a", "b"]}
    assert list(sections(source)) == ["(head)", "one", "2. two three"]
    with pytest.raises(AssertionError, match="two sections 'one'"):
        sections(source + "# --- one\n")
    assert without_default(["    lr: float = 1", "    beta: float = 1"]) == ["    lr: float", "    beta: float = 1"]
