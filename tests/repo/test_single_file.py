"""tools/single_file.py: the file is the script and what it reaches, to the letter, and trains as the script does."""
import ast
import builtins
import dis
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import runs
from helpers.repo import ROOT, SCRIPTS, load, read

tool = load("tools/single_file.py")
NAMES = [name.removesuffix(".py") for name in SCRIPTS]


@pytest.fixture(scope="module", params=NAMES)
def made(request):
    """A script's name and its one file."""
    return request.param, tool.single_file(request.param)[0]


def pieces(source: str) -> list[tuple]:
    """(node, its lines) of each top-level statement."""
    lines = source.splitlines()
    starts = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
              for node in ast.parse(source).body]
    return [(node, "\n".join(lines[start:node.end_lineno])) for node, start in zip(ast.parse(source).body, starts)]


def is_import(node) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def loads(code) -> set:
    """The names that compiled code takes from its module or from builtins."""
    instructions = list(dis.get_instructions(code))
    own = {i.argval for i in instructions if i.opname == "STORE_NAME"} if code.co_name != "<module>" else set()
    found = {i.argval for i in instructions if i.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT"))}
    return (found - own).union(*[loads(inner) for inner in code.co_consts if hasattr(inner, "co_code")])


def loads_and_stores(node) -> tuple[set, set]:
    code = compile(ast.Module([node], []), "statement", "exec")
    return loads(code), {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME"}


# --- what is in the file

def test_every_definition_is_in_one_source_to_the_letter(made):
    name, text = made
    sources = {path.name: without_lazy_imports(read(path)) for path in ROOT.glob("*.py")}
    shared = {piece: file for file, source in sources.items() if file not in SCRIPTS
              for node, piece in pieces(source) if not is_import(node)}
    ours = [piece for node, piece in pieces(sources[f"{name}.py"]) if not is_import(node)]
    found = [piece for node, piece in pieces(text) if not is_import(node)]
    assert found[:1] + found[-len(ours) + 1:] == ours  # the script, whole: its docstring first, the rest last
    others = found[1:len(found) - len(ours) + 1]
    assert len(others) > 50 and [piece for piece in others if piece not in shared] == []
    assert len(set(others)) == len(others)


def without_lazy_imports(source: str) -> str:
    """Without the lines in which a function imports from a shared file: in one file there is nothing to import."""
    modules = "|".join(path.stem for path in ROOT.glob("*.py"))
    return re.sub(rf"^ +from ({modules}) import .*\n", "", source, flags=re.M)


def test_every_other_line_is_a_comment_of_the_sources_or_an_import(made):
    _, text = made
    lines = {line for path in ROOT.glob("*.py") for line in read(path).splitlines()}
    head, *parts = re.split(r"^# === .*=$", text, flags=re.M)
    assert [line for part in parts for line in part.splitlines()
            if line not in lines and line.removeprefix("# ").strip() not in
            {other.strip().strip('"') for other in lines} | {"#"}] == []
    assert max(map(len, text.splitlines())) <= 95


def test_nothing_is_undefined_and_nothing_unreached(made):
    """By compiled code, where the tool goes by the symbol table."""
    name, text = made
    statements = [loads_and_stores(node) for node in ast.parse(text).body]
    stored = set().union(*[stores for _, stores in statements])
    needed = set().union(*[used for used, _ in statements])
    assert needed - stored - set(dir(builtins)) - {"__name__", "__file__", "__doc__", "__annotations__"} == set()
    count = len([node for node in ast.parse(read(f"{name}.py")).body if not is_import(node)])
    reached, left = set(), set().union(*[used for used, _ in statements[1 - count:]])
    while left:
        reached |= left
        left = set().union(*[used for used, stores in statements[:1 - count] if stores & reached]) - reached
    assert [stores for _, stores in statements[:1 - count] if stores and not stores & reached] == []
    assert [name for node in ast.parse(text).body if is_import(node)
            for name in loads_and_stores(node)[1] - needed] == []


def test_comments_come_along():
    """A comment above a definition, behind one, and a section's mark."""
    text = tool.single_file("grpo")[0]
    for module in {"common.py", "modeling.py"}:
        assert re.search(rf"^# === {module} =+\n# \w", text, re.M)  # with its docstring
    marks = re.findall(r"^# --- .*$", text, re.M)
    assert marks and marks == [mark for mark in dict.fromkeys(marks)]  # each once
    assert {"# --- the algorithm", "# --- generate", "# --- tokenization"} <= set(marks)


# --- it works

@pytest.mark.parametrize("name", NAMES)
def test_help_is_the_scripts(name, tmp_path, monkeypatch, capsys):
    path = tmp_path / f"{name}_single.py"
    path.write_text(tool.single_file(name)[0])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copy)
    spec.loader.exec_module(copy)
    shown = []
    for module in (runs.SCRIPTS[name], copy):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # cli puts another in its place
        monkeypatch.setattr(sys, "stderr", sys.stderr)
        with pytest.raises(SystemExit) as stop:
            module.cli(module.main, module.Args, module.__doc__)
        assert not stop.value.code
        shown.append(capsys.readouterr().out)
    assert len(shown[0]) > 3000 and shown[0] == shown[1]


def test_alone_in_a_folder_it_trains_as_the_script_does(tmp_path, monkeypatch):
    name = "grpo"
    (tmp_path / "theirs").mkdir()
    theirs = tmp_path / "theirs/run"
    flags = runs.small_flags(name, theirs)
    log = runs.run(name, theirs)
    alone = tmp_path / "alone"
    alone.mkdir()
    tool.write(name, str(alone / f"{name}_single.py"))
    shutil.copytree(ROOT / "tiny", alone / "tiny", ignore=shutil.ignore_patterns("__pycache__", "biased*", "make.py"))
    shutil.copy(flags["data"], alone / "rows.jsonl")
    flags |= {"data": "rows.jsonl", "run_dir": "run"}
    argv = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", value)]
    runs.process(sys.executable, f"{name}_single.py", *argv, cwd=alone, PYTHONPATH=None)
    assert {path.name for path in alone.glob("*.py")} == {f"{name}_single.py"}
    ours = runs.read(alone / "run/metrics.jsonl")
    assert len(runs.steps_of(ours)) >= 2 and runs.without_times(ours) == runs.without_times(log)
    assert runs.read(alone / "run/samples.jsonl") == runs.read(theirs / "samples.jsonl")
    assert runs.same_tensors(runs.last_checkpoint(alone / "run"), runs.last_checkpoint(theirs))


# --- on small projects

def single(folder: Path, script: str = "one", **files) -> str:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return tool.single_file(script, folder)[0]


def refused(folder: Path, **files) -> str:
    with pytest.raises(tool.Refused) as error:
        single(folder, **files)
    line = str(error.value)
    assert line and "\n" not in line
    return line


def result(text: str, name: str = "result"):
    """What running a file gives to a name."""
    names = {"__name__": "alone"}
    exec(compile(text, "alone.py", "exec"), names)
    return names[name]


SHARED = '''"""Shared things."""
import json
import math
from os import path as place


# --- one

# how large
SIZE = 3
SMALL, LARGE = SIZE - 1, SIZE + 1


class Base:
    def method(self):
        return helper() + unused_elsewhere
    # the end of the class


def helper(): return LARGE  # four


unused_elsewhere = 10


# --- two

def decorate(f):
    return f


def default():
    return math.floor(2.5)


class Quoted:
    pass


def left_out():
    return json.dumps(place)


COUNT = 0


def count():
    global COUNT
    COUNT = 1


Alias = list[int]
KNOWN = {}
KNOWN["a"] = SIZE


if __name__ == "__main__":
    left_out()
'''


def test_what_is_reached_comes_with_its_comments_and_nothing_else(tmp_path):
    text = single(tmp_path, shared=SHARED, one='"""One."""\nfrom shared import Base\n\n\nresult = Base().method()\n')
    assert result(text) == 14
    assert "# how large\nSIZE = 3\nSMALL, LARGE = SIZE - 1, SIZE + 1\n" in text
    assert "unused_elsewhere\n    # the end of the class\n\n\ndef helper(): return LARGE  # four\n" in text
    assert text.index("# --- one\n\n# how large") and "# --- two\n\nKNOWN = {}" in text
    assert 'KNOWN["a"] = SIZE' in text and "# Shared things." in text  # importing the module runs it
    for absent in ("decorate", "left_out", "json", "place", "math", "Alias", "import", "__main__"):
        assert absent not in text, absent


@pytest.mark.parametrize("use, there", [
    ("from shared import decorate\n@decorate\ndef f(): pass", "def decorate"),
    ("from shared import default\ndef f(x=default()): return x", "import math"),
    ("from shared import Alias\ndef f(x: Alias): return x", "Alias = "),
    ("from shared import Quoted\ndef f(x: 'Quoted | None'): return x", "class Quoted"),
    ("from shared import Quoted\nclass A:\n    x: list['Quoted'] = 1", "class Quoted"),
    ("from shared import Base\nclass A(Base): pass", "class Base"),
    ("from shared import helper\nf = [helper() for _ in 'ab' if helper()]", "def helper"),
    ("from shared import count\ncount()", "COUNT = 0")])
def test_every_kind_of_use_counts(use, there, tmp_path):
    text = single(tmp_path, shared=SHARED, one=use + "\nresult = 1\n")
    assert there in text and result(text) == 1


def test_values_in_quotes_are_no_names(tmp_path):
    text = single(tmp_path, shared=SHARED, one="from typing import Literal\nfrom shared import SIZE\n"
                                                "x: Literal['Quoted'] = SIZE\n")
    assert "class Quoted" not in text


def test_a_local_name_is_not_the_modules(tmp_path):
    text = single(tmp_path, shared=SHARED, one="from shared import SIZE\n\n\ndef f(helper):\n    default = SIZE\n"
                                                "    return helper, default\n")
    assert "def helper" not in text and "def default" not in text


def test_imports_inside_functions(tmp_path):
    shared = SHARED + "\n\ndef late():\n    from other import far\n    return far()\n"
    other = "from shared import SIZE\n\n\ndef far():\n    return SIZE * 7\n\n\ndef near():\n    pass\n"
    text = single(tmp_path, shared=shared, other=other, one="from shared import late\n\nresult = late\n")
    assert result(text)() == 21 and "from other" not in text and "def near" not in text
    text = single(tmp_path, one="def main():\n    import json\n    from shared import late\n    return late()\n")
    assert result(text, "main")() == 21 and "    import json\n    return" in text
    assert "line 2: nothing but an import" in refused(tmp_path, one="def f():\n    from shared import late\n")


def test_side_effects_of_a_module_come_along_where_they_stand(tmp_path):
    text = single(tmp_path, shared="import os\nos.environ['A_NAME'] = '1'\nimport torch\n\nfloat32 = torch.float32\n"
                                   "os.environ['B_NAME'] = str(float32)\n", one="from shared import float32\n"
                                   "result = float32\n")
    order = [text.index(part) for part in ("import os", "'A_NAME'", "import torch", "float32 =", "'B_NAME'",
                                           "result")]
    assert order == sorted(order)


def test_early_statements_that_need_other_packages_stand_behind_the_imports(tmp_path):
    one = ("import torch\ntorch.set_num_threads(torch.get_num_threads())\nKIND = torch.float32\nresult = [KIND]\n"
           "LEVEL = '3'\ndef level(): return LEVEL\nimport os\nos.environ['A_NAME'] = level()\nimport numpy\n"
           "from shared import SIZE\nresult += [SIZE, os.environ['A_NAME'], numpy.pi]\n")
    text = single(tmp_path, shared="SIZE = 4\n", one=one)
    assert result(text)[1:3] == [4, "3"]
    assert text.index("LEVEL = ") < text.index("['A_NAME'] =") < text.index("import numpy") < text.index("KIND =")
    text = single(tmp_path, shared="SIZE = 4\n", one="from shared import SIZE\nx = SIZE\nx = 5\nimport math\n"
                                                     "result = x\n")
    assert result(text) == 5


@pytest.mark.parametrize("guard", ['if __name__=="__main__":', "if (__name__ == '__main__'):",
                                   "if '__main__' == __name__:"])
def test_what_importing_a_module_runs(guard, tmp_path):
    shared = f"TABLE = {{}}\nfor size in (1, 2): TABLE[size] = size\n\n{guard}\n    TABLE[3] = 3\n"
    text = single(tmp_path, shared=shared, one=f"from shared import TABLE\nresult = TABLE\n{guard}\n    result = 1\n")
    assert result(text) == {1: 1, 2: 2} and "TABLE[3]" not in text
    assert tool.scripts(tmp_path) == ["one", "shared"]


def test_imports_of_the_script_stay(tmp_path):
    text = single(tmp_path, shared="import numpy\nSIZE = 1\n",
                  one="import json\nimport torch.nn  # registers\nfrom shared import SIZE\nresult = SIZE\n")
    assert "\nimport json\n" in text and "\nimport torch.nn  # registers\n" in text and "numpy" not in text


def test_characters_that_end_no_line_of_python(tmp_path):
    one = '\ufeff"""A \u2028 B."""\nx = "\u2028"\n\f\n# above\nresult = x + "\x85"  # \x0b\nyy = 1\n'
    (tmp_path / "one.py").write_text(one, encoding="utf-8")
    assert result(single(tmp_path)) == "\u2028\x85"


def test_a_quoted_annotation_that_is_no_expression(tmp_path):
    assert result(single(tmp_path, one="def f(x: dict[int, 'two words']): pass\nresult = 1\n")) == 1


@pytest.mark.parametrize("source, error", [
    (b"a = 1\nb = (\n", "shared.py: line 2: not Python: '(' was never closed"),
    (b"a = 1\n\nb = '\0'\n", "shared.py: line 3: not Python: source code "),
    (b"a = 1\nb = '\xe9'\n", "shared.py: line 2: not Python: 'utf-8' codec can't"),
    (b"a = 1\nreturn a\n", "shared.py: line 2: not Python: 'return' outside function")])
def test_a_file_that_is_not_python(source, error, tmp_path):
    (tmp_path / "shared.py").write_bytes(source)
    assert refused(tmp_path, one="from shared import a\nx = a\n").startswith(error)
    (tmp_path / "two.py").write_text("if __name__ == '__main__': pass\n")
    assert tool.scripts(tmp_path) == ["two"]
    tool.write("two", str(tmp_path / "out.py"), tmp_path)  # which does not reach it
    with pytest.raises(tool.Refused, match="shared.py: line .: not Python"):
        tool.write("shared.py", str(tmp_path / "out.py"), tmp_path)


@pytest.mark.parametrize("files, error", [
    (dict(one="from evaluaton import Evaluator\nx = Evaluator\n"),
     "one.py: imports evaluaton, no file of the project and not installed"),
    (dict(other="a = 1\nif __name__ != '__main__':\n    a = 2\n", one="from other import a\nx = a\n"),
     'other.py: line 2: write `if __name__ == "__main__":`, without else'),
    (dict(other="a = 1\nif __name__ == '__main__':\n    a = 2\nelse:\n    a = 3\n", one="from other import a\nx = a\n"),
     'other.py: line 2: write `if __name__ == "__main__":`, without else'),
    (dict(one="A = []; A.append(1)\n"), "one.py: line 1: two statements on one line"),
    (dict(one='"""One."""; x = 1; y = 2\n'), "one.py: line 1: two statements on one line"),
    (dict(one="import os; import sys\n"), "one.py: line 1: two statements on one line"),
    (dict(one="A = 1; \\\nB = 2\n"), "one.py: line 1: two statements on one line"),
    (dict(one="def f(y):\n    from shared import SIZE; y += SIZE\n    return y\n"),
     "one.py: line 2: at or beside this import, two statements on one line"),
    (dict(one="def f(y):\n    y = 'é'; from shared import SIZE\n    return y + SIZE\n"),
     "one.py: line 2: at or beside this import, two statements on one line"),
    (dict(other="def helper(): pass\n\n\ndef g(): return helper()\n", one="from other import g\nfrom shared import "
          "Base\nx = g, Base\n"), "'helper' is two things in one file, of other.py and of shared.py: rename one"),
    (dict(one="from shared import Base\n\n\ndef helper(): return Base\n"), "'helper' is two things"),
    (dict(other="import numpy as math\n\n\ndef g(): return math\n", one="from other import g\nfrom shared import "
          "default\nx = g, default\n"), "'math' is two things"),
    (dict(other="def sum(x): return x\n", one="from other import sum\nfrom shared import total\nx = sum, total\n"),
     "'sum' is Python's own in shared.py, and of other.py: rename that one"),
    (dict(one="from shared import helper as h\nx = h()\n"), "one.py: imports shared.py or a name of it under another"),
    (dict(one="import shared\nx = shared.SIZE\n"), "one.py: imports shared.py or a name of it under another"),
    (dict(one="from shared import *\nx = SIZE\n"), "one.py: from shared import *"),
    (dict(one="from __future__ import annotations\n"), "one.py: from __future__ import annotations"),
    (dict(one="from shared import nothing\nx = nothing\n"), "shared.py: 'nothing' is defined nowhere"),
    (dict(one="x = nothing\n"), "one.py: 'nothing' is defined nowhere"),
    (dict(other="from third import b\na = 1\n", third="from other import a\nb = 1\n",
          one="from other import a\nx = a\n"), "other.py: imports itself through third")])
def test_what_cannot_be_one_file_is_refused(files, error, tmp_path):
    line = refused(tmp_path, shared=SHARED + "\n\ndef total(): return sum([1])\n", **files)
    assert error in line


# --- the command

def command(*argv, cwd):
    return subprocess.run([sys.executable, ROOT / "tools/single_file.py", *map(str, argv)], cwd=cwd,
                          capture_output=True, text=True)


def test_as_a_command(tmp_path):
    done = command("grpo", cwd=tmp_path)
    text = read(tmp_path / "grpo_single.py")
    assert (done.returncode, done.stderr) == (0, "") and text == tool.single_file("grpo")[0]
    counts = [int(n) for n in re.findall(r"\S+ (\d+)[,)]", done.stdout)]
    assert done.stdout.startswith(f"wrote grpo_single.py: {sum(counts)} lines (docstring and imports ")
    assert sum(counts) == len(text.splitlines()) and len(counts) >= 4
    (tmp_path / "link.py").symlink_to("grpo_single.py")
    for script, out in [("grpo.py", "grpo_single.py"), ("./grpo.py", "link.py")]:  # it wrote this file itself
        assert command(script, "--out", out, cwd=tmp_path).returncode == 0
    assert (tmp_path / "link.py").is_symlink() and {path.name for path in tmp_path.iterdir()} == {
        "grpo_single.py", "link.py"}


def test_stopped_by_hand(monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(tool, "scripts", stop)
    with pytest.raises(SystemExit) as end:
        tool.main()
    assert end.value.code == 130


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    whole = tool.single_file("grpo")
    monkeypatch.setattr(tool, "single_file", lambda *_: whole)  # once
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("# mine\n")
    tool.write("grpo", "edited.py")
    (tmp_path / "edited.py").write_text(read(tmp_path / "edited.py") + "# edited\n")
    for argv, error in [(["nothing"], "nothing: no such script: name one of dpo, grpo, ppo, reinforce, reward_model"),
                        (["common"], "common: no such script"),
                        (["grpo", "--out", "mine.py"], "mine.py: was not written by this tool, or has changed since"),
                        (["grpo", "--out", "edited.py"], "edited.py: was not written by this tool, or has changed"),
                        (["grpo", "--out", "no/folder.py"], "--out: no/folder.py cannot be written: No such file"),
                        (["grpo", "--out", "."], ".: was not written by this tool"),
                        (["grpo", "--out", "/"], "/: was not written by this tool"),
                        (["grpo", "--out", "/dev/stdout"], "/dev/stdout: was not written by this tool")]:
        monkeypatch.setattr(sys, "argv", ["single_file.py", *argv])
        with pytest.raises(SystemExit) as stop:
            tool.main()
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.startswith(f"error: {error}") and line.count("\n") == 1
    assert read(tmp_path / "mine.py") == "# mine\n" and read(tmp_path / "edited.py").endswith("# edited\n")
