"""README.md and docs/: rendered as written, and every link, command, flag and file in them exists."""
import ast
import html.parser
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from helpers.repo import ROOT, SCRIPTS, read

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
FENCE = re.compile(r"^\s*(```+|~~~+)(.*)$")


class Rendered(html.parser.HTMLParser):
    """Headings, links and number of tables of a rendered page."""

    def __init__(self, source: str):
        super().__init__()
        self.headings, self.links, self.tables, self.heading = [], [], 0, None
        self.feed(MarkdownIt("commonmark").enable("table").render(source))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.heading = ""
        self.links += [attrs[key] for key in ("href", "src") if key in attrs]
        self.tables += tag == "table"

    def handle_endtag(self, tag):
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(self.heading)
            self.heading = None

    def handle_data(self, data):
        if self.heading is not None:
            self.heading += data


def split_fences(source: str) -> tuple[list[str], list[str]]:
    """The lines outside fences, and the text of each fenced block. A fence without its end is an error."""
    outside, blocks, fence = [], [], None
    for number, line in enumerate(source.splitlines(), 1):
        mark = FENCE.match(line)
        if fence is None and mark:
            fence, block = (mark.group(1), number), []
        elif fence is None:
            outside.append(line)
        elif mark and mark.group(1) == fence[0]:
            assert not mark.group(2).strip(), f"line {number}: a fence begins within that of line {fence[1]}"
            blocks.append("\n".join(block))
            fence = None
        else:
            block.append(line)
    assert fence is None, f"line {fence[1]}: this fence has no end"
    return outside, blocks


def plain(heading: str) -> str:
    """A heading's text without its markup."""
    return re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).strip()


def source_parts(source: str) -> tuple[list[str], list[str], int]:
    """Headings, links and number of tables, by the lines of the source."""
    outside, _ = split_fences(source)
    headings = [plain(line.lstrip("#")) for line in outside if re.match(r"#{1,6} ", line)]
    links = [target for line in outside for target in LINK.findall(re.sub(r"`[^`]*`", "", line))]
    tables = [line for line in outside if re.fullmatch(r"\|?(\s*:?-+:?\s*\|)+(\s*:?-+:?)?\s*", line)]
    return headings, links, len(tables)


def anchors(source: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in Rendered(source).headings]
    before = [slugs[:i].count(slug) for i, slug in enumerate(slugs)]
    return {f"{slug}-{n}" if n else slug for slug, n in zip(slugs, before)}


def check_page(source: str, folder: Path):
    """Raises AssertionError where a page is not what its source says, or a local link leads nowhere."""
    page = Rendered(source)
    headings, links, tables = source_parts(source)
    assert [plain(heading) for heading in page.headings] == headings
    assert sorted(link for link in page.links if link in links) == sorted(links)
    assert page.tables == tables
    for link in page.links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path if path else None
        assert target is None or target.exists(), f"{link}: no such file"
        if anchor:
            assert target is None or target.suffix == ".md", f"{link}: an anchor of a file that is not a page"
            assert anchor in anchors(source if target is None else read(target)), f"{link}: no such heading"


# --- commands

def commands(source: str) -> list[list[str]]:
    """The words of each command in fenced blocks, without comments. A backslash continues a line."""
    found = []
    for block in split_fences(source)[1]:
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for part in re.split(r"&&|;|\|", re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ")):
                words = [word for word in part.split() if not re.match(r"[A-Z_]+=", word)]
                if words and words[0] in ("python", "python3", "torchrun", "pip", "pytest", "cp", "cd", "git"):
                    found.append(words)
    return found


def flags_of(script: str) -> set[str]:
    """The names of a script's flags: the annotated fields of its Args and the classes that it extends, or what it
    gives argparse."""
    classes = {node.name: node for path in (script, "flags.py") for node in ast.parse(read(path)).body
               if isinstance(node, ast.ClassDef)}
    if "Args" not in classes:
        return set(re.findall(r"add_argument\(\s*\"--([\w-]+)\"", read(script)))
    names, left = set(), ["Args"]
    while left:
        node = classes[left.pop()]
        names |= {field.target.id.replace("_", "-") for field in node.body if isinstance(field, ast.AnnAssign)}
        left += [base.id for base in node.bases if base.id in classes]
    return names


def check_command(words: list[str]):
    """Raises AssertionError for a script, a file of the repository, or a flag that does not exist."""
    script = next((i for i, word in enumerate(words) if re.fullmatch(r"(\w+/)*\w+\.py", word)), None)
    if words[0] in ("python", "python3", "torchrun") and script is not None:
        path = words[script]
        assert Path(path).is_file() or path.startswith("my_"), f"{path}: no such script"
        known = flags_of(path) if Path(path).is_file() else None
        for word in words[script + 1:] if known is not None else ():
            if word.startswith("--"):
                flag = word[2:].partition("=")[0]
                assert flag in known | {"help"} or flag.removeprefix("no-") in known, f"{path} has no flag --{flag}"
    top = {path.name for path in Path().iterdir() if path.name != "runs"}
    for word in words[1:]:
        path = re.sub(r":\w+$", "", word.partition("=")[2] if word.startswith("--") else word)
        if re.fullmatch(r"[\w./-]+", path) and Path(path).parts and Path(path).parts[0] in top:
            assert Path(path).exists(), f"{path}: no such file"


@pytest.mark.parametrize("page", PAGES)
def test_page(page):
    check_page(read(page), Path(page).parent)


@pytest.mark.parametrize("page", PAGES)
def test_commands(page):
    for words in commands(read(page)):
        check_command(words)


def test_the_readme_has_commands_and_links_to_every_other_page():
    source = read("README.md")
    headings, links, tables = source_parts(source)
    assert len(headings) >= 5 and len(links) >= 10 and tables >= 1 and len(commands(source)) >= 4
    assert {"grpo.py", "ppo.py", "reinforce.py", "dpo.py", "reward_model.py"} <= set(links)
    assert {page for page in PAGES if page.startswith("docs/")} <= {link.partition("#")[0] for link in links}


@pytest.mark.parametrize("path", [*SCRIPTS, "tools/compare.py", "tools/plot.py", "tools/credit.py",
                                  "tools/one_step.py", "tools/side_by_side.py", "tools/single_file.py", "tiny/make.py", "examples/takes_up_numbers.py"])
def test_indented_commands_in_docstrings(path):
    text = re.sub(r"\\\n\s*", " ", ast.get_docstring(ast.parse(read(path)), clean=False))
    found = commands("```\n" + "\n".join(re.findall(r"^ {4}(python .*)$", text, re.M)) + "\n```\n")
    assert found
    for words in found:
        check_command([word.strip("[]") for word in words])


# --- the checks see what they look for

GOOD = """# A page

A [link](grpo.py), another to [a *heading*](#two-words-and-code), and `[no link](nowhere)`.

## Two words, and `code`

| a | b |
|---|---|
| 1 | 2 |

```bash
# not a heading
OMP_NUM_THREADS=1 python grpo.py --lr 1e-6 --no-kl-in-reward \\
    --reward tiny/world.py:gold_reward   # [no link](nowhere)
```
"""


def test_a_good_page_passes():
    check_page(GOOD, Path())
    assert source_parts(GOOD) == (["A page", "Two words, and code"], ["grpo.py", "#two-words-and-code"], 1)
    words, = commands(GOOD)
    assert words[:4] == ["python", "grpo.py", "--lr", "1e-6"] and words[-1] == "tiny/world.py:gold_reward"
    check_command(words)


@pytest.mark.parametrize("old, new, error", [
    ("(grpo.py)", "(nowhere.py)", "nowhere.py: no such file"), ("(grpo.py)", "(grpo.py#L3)", "not a page"),
    ("(#two-words-and-code)", "(#two-words)", "no such heading"), ("```\n", "", "has no end"),
    ("|---|---|", "|---|---|---|", "assert 0 == 1"),  # no table any more
    ("```bash", "```\n```\n```bash\n```bash", "begins within"),
    ("## Two words, and `code`", "    indented\n\ntext\n## Two words, and `code` [x](grpo.py", "assert")])
def test_a_bad_page_fails(old, new, error):
    assert GOOD.count(old) == 1
    with pytest.raises(AssertionError, match=error):
        check_page(GOOD.replace(old, new), Path())


@pytest.mark.parametrize("command, error", [
    ("python nowhere.py", "no such script"), ("python grpo.py --lam 1", "grpo.py has no flag --lam"),
    ("python tools/plot.py runs/a --smoothness 2", "no flag --smoothness"),
    ("python tiny/make.py --nothing", "no flag --nothing"), ("python ppo.py --data tiny/nothing.jsonl", "tiny/nothing"),
    ("torchrun --nproc-per-node 2 ppo.py --scale-rewards none", "no flag --scale-rewards"),
    ("pip install -r tests/nothing.txt", "tests/nothing.txt"),
    ("python ppo.py --reward benchmarks/nothing.py:f", "benchmarks/nothing.py")])
def test_a_bad_command_fails(command, error):
    with pytest.raises(AssertionError, match=error):
        for words in commands(f"```\n{command}\n```"):
            check_command(words)


@pytest.mark.parametrize("command", [
    "python my_reward.py", "torchrun --nproc-per-node 2 ppo.py --critic-lr 1e-5", "python dpo.py --data pairs.jsonl",
    "python tools/plot.py runs/a runs/b --smooth 2", "python tiny/make.py --only data", "pytest tests/repo -n 0"])
def test_a_good_command_passes(command):
    words, = commands(f"```\n{command}\n```")
    check_command(words)


def test_help_loads_no_more_than_it_needs():
    """Models, checkpoints and FSDP take seconds to import, which --help and a wrong flag need not wait for."""
    code = ("import sys, grpo, ppo, reinforce, dpo, reward_model\n"
            "heavy = ['transformers.modeling_utils', 'torch.distributed.checkpoint', 'torch.distributed.fsdp']\n"
            "print([name for name in heavy if name in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"
