"""docs/side_by_side.html and tools/side_by_side.py: what the page holds, and, in a browser, what it does."""
import difflib
import functools
import html.parser
import importlib
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.repo import ROOT, SCRIPTS, load, read, sections

pytest.importorskip("pygments", reason="Pygments is missing: pip install pygments")
tool = load("tools/side_by_side.py")
PAGE = ROOT / "docs/side_by_side.html"
NAMES = [name.removesuffix(".py") for name in SCRIPTS]
PAIRS = list(itertools.combinations(NAMES, 2))


@functools.cache
def committed() -> str:
    return PAGE.read_text(encoding="utf-8")


@functools.cache
def made() -> str:
    return tool.page()


class Parts(html.parser.HTMLParser):
    """The links, styles and scripts of a page, and the data that it holds."""

    def __init__(self, source: str):
        super().__init__()
        self.addresses, self.texts, self.inside = [], {"style": "", "script": "", "data": ""}, None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[key] for key in ("href", "src", "srcset", "action") if key in attributes]
        self.inside = "data" if attributes.get("id") == "data" else tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, text):
        if self.inside in self.texts:
            self.texts[self.inside] += text


@functools.cache
def parts() -> Parts:
    return Parts(committed())


@functools.cache
def data() -> dict:
    return json.loads(parts().texts["data"])


# --- the page

def test_the_committed_page_is_what_the_tool_makes():
    assert committed() == made(), "docs/side_by_side.html is stale: run python tools/side_by_side.py"


@pytest.mark.parametrize("file, old, new", [
    ("ppo.py", "gae_lambda: Fraction = 0.95", "gae_lambda: Fraction = 0.94"),
    ("common.py", "Per-token estimates of KL", "Estimates of KL"), ("grpo.py", "# 4. advantages", "# 4. credit")])
def test_a_changed_script_or_docstring_makes_it_stale(tmp_path, file, old, new):
    for path in ROOT.glob("*.py"):
        source = read(path)
        if path.name == file:
            assert source.count(old) >= 1
            source = source.replace(old, new)
        (tmp_path / path.name).write_text(source, encoding="utf-8")
    assert tool.page_data(tmp_path) != data()


def test_it_is_one_file_that_loads_nothing():
    assert len(committed().encode()) < 1_000_000
    assert parts().addresses and all(re.match("#|data:,$", address) for address in parts().addresses)
    assert not re.search(r"url\(|@import|https?:", parts().texts["style"])
    assert not re.search(r"\bfetch\b|XMLHttpRequest|\bimport\b|WebSocket|https?:", parts().texts["script"])
    assert "default-src 'none'" in committed()  # and the browser would refuse


@pytest.mark.parametrize("script", NAMES)
def test_every_line_of_a_script_is_in_it_once(script):
    held = data()["scripts"][script]
    assert "\n".join(held["lines"]) + "\n" == read(f"{script}.py")
    assert len(held["kinds"]) == len(held["lines"])
    places = sorted((start, end) for _, start, end in held["sections"].values())
    assert [start for start, _ in places] == [0, *(end for _, end in places[:-1])]
    assert places[-1][1] == len(held["lines"])


@pytest.mark.parametrize("script", NAMES)
def test_its_sections_are_those_of_the_marks(script):
    held, truth = data()["scripts"][script], sections(read(f"{script}.py"))
    found = {place[1]: (place[0], key) for key, place in held["sections"].items()}
    lines = [held["lines"][start:held["sections"][key][2]] for start, (_, key) in sorted(found.items())]
    assert lines == list(truth.values())
    for (_, (number, key)), name in list(zip(sorted(found.items()), truth))[1:]:
        assert (f"{number}. " if number else "") + data()["sections"][key] == name
    keys = [key for key in data()["sections"] if key in held["sections"]]
    assert keys == [key for _, (_, key) in sorted(found.items())]  # one order for all scripts


@pytest.mark.parametrize("a, b", PAIRS)
def test_lines_beside_each_other_match_and_do_not_cross(a, b):
    ours, theirs = (data()["scripts"][name] for name in (a, b))
    found = data()["pairs"][f"{a},{b}"]
    same = [(i + k, j + k) for i, j, n in found["same"] for k in range(n)]
    near = [(i, j) for i, j, *_ in found["near"]]
    assert all(ours["lines"][i] == theirs["lines"][j] for i, j in same)
    assert all(ours["lines"][i] != theirs["lines"][j] for i, j in near)
    for key, (_, start, end) in ours["sections"].items():
        within = sorted((i, j) for i, j in same + near if start <= i < end)
        _, first, last = theirs["sections"].get(key, ("", 0, 0))
        assert all(first <= j < last for _, j in within)
        assert all(i < p and j < q for (i, j), (p, q) in itertools.pairwise(within))
        if ours["lines"][start:end] == theirs["lines"][first:last]:
            assert within == list(zip(range(start, end), range(first, last))) and not set(within) & set(near)


@pytest.mark.parametrize("a, b", PAIRS)
def test_without_the_marked_words_similar_lines_are_the_same(a, b):
    near = data()["pairs"][f"{a},{b}"]["near"]
    assert near
    for i, j, *marks in near:
        lines = [data()["scripts"][name]["lines"][line] for name, line in ((a, i), (b, j))]
        rest = [without(line, spans) for line, spans in zip(lines, marks)]
        assert rest[0] == rest[1] and any(marks)


def without(line: str, spans: list[int]) -> str:
    """A line without its marked parts and without spaces."""
    kept = [c for place, c in enumerate(line)
            if not any(start <= place < end for start, end in zip(spans[::2], spans[1::2]))]
    return "".join("".join(kept).split())


def test_an_alignment_worked_out_by_hand():
    a = ["top", "# --- one", "x = 1", "loss = policy_loss(a, b)", "y = 2", "# 1. go", "z", "# --- gone", "z"]
    b = ["top", "# --- one", "x = 1", "w = 0", "loss = policy_loss(a, c)", "y = 2", "# 2. go", "", "z"]
    assert tool.align(a, b) == {
        "same": [[0, 0, 1], [1, 1, 1], [2, 2, 1], [4, 5, 1], [6, 8, 1]],
        "near": [[3, 4, [22, 23], [22, 23]], [5, 6, [2, 3], [2, 3]]]}


def test_changed_words_by_hand():
    assert tool.changed("lr: float = 3e-4", "lr: float = 1e-4") == ([12, 14], [12, 14])
    assert tool.changed("f(a)", "f(a, b)") == ([], [3, 6])
    assert tool.changed("    x", "        x") == ([0, 4], [0, 8])


def test_sections_of_all_scripts_merge_into_one_order():
    assert tool.merged([["a", "c"], ["a", "b", "c"], ["c", "d"]]) == ["a", "b", "c", "d"]
    with pytest.raises(tool.Mistake, match="section 'a'.* different orders"):
        tool.merged([["a", "b"], ["b", "a"]])


def test_colors_of_the_syntax():
    source = 'def f(x):  # why\n    return "a" if x is None else 1.5\n'
    lines = source.splitlines()
    found = [{line[s:e]: kind for s, e, kind in zip(*(spans[k::3] for k in range(3)))}
             for line, spans in zip(lines, tool.kinds(source))]
    assert found == [{"def": "k", "f": "f", "# why": "c"},
                     {"return": "k", '"a"': "s", "if": "k", "is": "k", "None": "n", "else": "k", "1.5": "n"}]
    doc = '"""One\ntwo."""\n'
    assert tool.kinds(doc)[:2] == [[0, 6, "s"], [0, 7, "s"]]


# --- names of the shared modules

def shared() -> set[str]:
    """The modules that the scripts import from the repository, directly or through each other."""
    found, left = set(), set(NAMES)
    while left:
        lines = read(f"{left.pop()}.py").splitlines()
        new = {match[1] for line in lines if (match := re.match(r"\s*(?:from|import) (\w+)", line))}
        new = {name for name in new if (ROOT / f"{name}.py").exists()} - found
        found |= new
        left |= new
    return found


def test_names_are_told_from_python_s_own_view_of_the_modules():
    """Each name that a script imports from a shared module is known, with the docstring that Python finds."""
    modules, told = shared(), data()["known"]
    assert set(tool.shared_modules(ROOT)) == modules and len(modules) >= 4
    for script in NAMES:
        module = importlib.import_module(script)
        for node in tool.parse(ROOT / f"{script}.py").body:
            for alias in node.names if getattr(node, "module", None) in modules else ():
                value, entry = getattr(module, alias.name), told[alias.name]
                if inspect.isfunction(value) or inspect.isclass(value):
                    assert entry["module"] == f"{value.__module__}.py"
                    assert entry["doc"] == (inspect.cleandoc(value.__doc__) if value.__doc__ else "")
                    assert re.search(rf"(def|class) {alias.name}\b", entry["signature"])
    run = importlib.import_module("grpo").Run
    methods = [key for key in told if key.startswith("Run.")]
    assert len(methods) > 10
    for key in methods:
        method = inspect.unwrap(inspect.getattr_static(run, key.partition(".")[2]))
        assert told[key]["doc"] == (inspect.cleandoc(method.__doc__) if method.__doc__ else "")
        if method.__module__ in modules and inspect.isfunction(method):
            for name in inspect.signature(method).parameters:
                assert re.search(rf"\b{name}\b", told[key]["signature"])


@pytest.mark.parametrize("script", NAMES)
def test_every_name_stands_where_the_page_says(script):
    held = data()["scripts"][script]
    found = [(int(line), start, end, key) for line, spans in held["names"].items()
             for start, end, key in zip(*(spans[k::3] for k in range(3)))]
    assert len(found) > 50
    for line, start, end, key in found:
        assert held["lines"][line][start:end] == key.rpartition(".")[2]
    calls = len(re.findall(r"\brun\.log\(", read(f"{script}.py")))
    assert sum(key == "Run.log" for *_, key in found) == calls >= 1


SHARED = '''
class Base:
    def save(self, é):
        """Saves."""

class Run(Base):
    """A run."""
    def __init__(self, n: int):
        """Begins."""
        self.n = n

def start(
        n: int) -> int:  # how many
    """Starts."""
    return n

Small, Large = 1, 2
'''
SCRIPT = '''"""Title: of a script."""
from shared import Large, Run, start
import os

def make(n) -> Run:
    é = "é"; return Run(start(n)), f"{start(1)}"

def main(run: Run, os):
    other = make(Large)
    other.save(1); run.nothing; os.path.start
'''


def test_names_of_a_small_script(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "SCRIPTS", ["script"])
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "shared.py").write_text("import deeper\n" + SHARED, encoding="utf-8")
    (tmp_path / "deeper.py").write_text("", encoding="utf-8")
    (tmp_path / "alone.py").write_text("", encoding="utf-8")
    assert list(tool.shared_modules(tmp_path)) == ["deeper", "shared"]
    held = tool.page_data(tmp_path)
    assert held["scripts"]["script"]["title"] == "Title: of a script"
    assert held["scripts"]["script"]["names"] == {
        1: [19, 24, "Large", 26, 29, "Run", 31, 36, "start"], 4: [15, 18, "Run"],
        5: [20, 23, "Run", 24, 29, "start"], 7: [14, 17, "Run"], 8: [17, 22, "Large"], 9: [10, 14, "Run.save"]}
    assert held["known"] == {
        "Large": {"module": "shared.py", "signature": "Small, Large = 1, 2", "doc": ""},
        "Run": {"module": "shared.py", "signature": "class Run(Base):\n    def __init__(self, n: int):",
                "doc": "A run."},
        "Run.save": {"module": "shared.py", "signature": "def save(self, é):", "doc": "Saves."},
        "start": {"module": "shared.py", "signature": "def start(\n        n: int) -> int:  # how many",
                  "doc": "Starts."}}


# --- mistakes

def run_tool(*flags) -> tuple[int, str, str]:
    """The tool in a process of its own: exit code, stdout, stderr."""
    done = subprocess.run([sys.executable, ROOT / "tools/side_by_side.py", *map(str, flags)], capture_output=True,
                          text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_tool_writes_the_page(tmp_path):
    code, out, error = run_tool("--out", tmp_path / "page.html")
    assert (code, error) == (0, "") and re.search(r"page.html: \d+ kB\n$", out)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == made()


@pytest.mark.parametrize("flags, line", [
    (["--out", "nowhere/a.html"], "error: --out nowhere/a.html: the folder nowhere does not exist: make it first"),
    (["--outt"], "error: unrecognized arguments: --outt: see --help"),
    (["grpo"], "error: unrecognized arguments: grpo: see --help")])
def test_a_wrong_flag_gets_one_line(flags, line):
    assert run_tool(*flags) == (2, "", line + "\n")


def test_wrong_scripts_get_one_line(tmp_path, monkeypatch, capsys):
    def told() -> str:
        monkeypatch.setattr(sys, "argv", ["side_by_side.py", "--out", str(tmp_path / "page.html")])
        monkeypatch.setattr(tool, "page", functools.partial(made_from, tmp_path))
        with pytest.raises(SystemExit) as end:
            tool.main()
        assert end.value.code == 2 and not (tmp_path / "page.html").is_file()
        return capsys.readouterr().err

    made_from = tool.page
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "ppo.py").unlink()
    assert told() == f"error: {tmp_path}/ppo.py: cannot be read: No such file or directory\n"
    (tmp_path / "ppo.py").write_text("\nx = = 1\n")
    assert told() == f"error: {tmp_path}/ppo.py:2: not Python: invalid syntax\n"
    shutil.copy(ROOT / "ppo.py", tmp_path)
    monkeypatch.setitem(sys.modules, "pygments", None)
    tool.kinds.cache_clear()
    assert told() == "error: Pygments is missing: pip install pygments\n"
    monkeypatch.undo()
    tool.kinds.cache_clear()
    (tmp_path / "page.html").mkdir()
    assert told() == f"error: --out {tmp_path}/page.html: cannot be written: Is a directory\n"


# --- colors

def linear(color) -> list[float]:
    return [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (c / 255 for c in color)]


def contrast(a, b) -> float:
    """WCAG 2.2's contrast ratio of two colors of red, green and blue."""
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(linear, (a, b)))
    return (high + 0.05) / (low + 0.05)


def palettes() -> list[dict[str, tuple]]:
    """The colors of the light and of the dark page, by name."""
    style = parts().texts["style"]
    blocks = re.findall(r":root \{(.*?)\}", style, re.S)
    return [{name: tuple(bytes.fromhex(color)) for name, color in re.findall(r"--([\w-]+): #(\w{6});", block)}
            for block in blocks]


def test_every_ink_shows_on_every_paper():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)  # known
    light, dark = palettes()
    assert set(light) == set(dark) and len(light) > 15
    for mode in (light, dark):
        inks, papers = ([name for name in mode if name.startswith(start)] for start in ("ink", "paper"))
        for ink, paper in itertools.product(inks, papers):
            assert contrast(mode[ink], mode[paper]) >= 4.5, f"{ink} on {paper}: {contrast(mode[ink], mode[paper]):.2f}"
        for line in [name for name in mode if name.startswith("line-")]:  # the bar beside a line says what it is
            assert contrast(mode[line], mode["paper"]) >= 3, line


def test_text_has_an_ink_and_a_background_a_paper():
    style = parts().texts["style"]
    inks = re.findall(r"(?<![-\w])color: ([^;]+);", style)
    papers = re.findall(r"(?<![-\w])background(?:-color)?: ([^;]+);", style)
    assert len(inks) > 10 and all(re.fullmatch(r"var\(--ink[\w-]*\)|inherit", value) for value in inks)
    assert len(papers) > 5 and all(re.fullmatch(r"var\(--paper[\w-]*\)|none", value) for value in papers)


# --- in a browser

BROWSERS = ["chromium", "chromium-browser", "google-chrome"]


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium, driven by Playwright's package."""
    playwright = pytest.importorskip("playwright.sync_api",
                                     reason="playwright is missing: pip install 'playwright>=1.50'")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser ({', '.join(BROWSERS)}): apt-get install chromium")
    with playwright.sync_playwright() as run:
        chromium = run.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """opened("#grpo,ppo", width=400) is the page at this address; at the end, no error was seen and nothing loaded."""
    contexts, errors, loaded = [], [], []

    def open_page(address="", width=1600, height=1000, **settings):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **settings))
        contexts[-1].set_default_timeout(120_000)  # for a machine that is busy
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.on("request", lambda request: loaded.append(request.url.partition("#")[0]))
        page.goto(PAGE.as_uri() + address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert {url for url in loaded if not url.startswith("data:")} <= {PAGE.as_uri()}


CELLS = """() => [...document.querySelectorAll("tbody tr:not(.fold)")].map(row => ({
    mark: row.className === "mark", hidden: row.hidden, cells: [...row.children].map(cell => ({
        line: +cell.dataset.line || null, kind: cell.className,
        text: cell.querySelector("code")?.textContent ?? null}))}))
"""


def texts_of(row: dict) -> list:
    return [cell["text"] for cell in row["cells"]]


def hash_of(page) -> str:
    return page.evaluate("decodeURIComponent(location.hash)")


def until(condition, seconds: float = 60):
    """Waits for what a browser does in its own time. (Playwright's own wait needs eval, which the page forbids.)"""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def top_of(page, section: str) -> list[float]:
    """How far the cells of a section's mark are from the bar above the code."""
    return page.evaluate("""section => {
        const bar = document.querySelector("#tools").getBoundingClientRect().bottom;
        return [...document.querySelectorAll(`#at-${section} th`)].filter(cell => cell.offsetParent)
            .map(cell => cell.getBoundingClientRect().top - bar);
    }""", section)


@pytest.mark.parametrize("columns", [*PAIRS, ("ppo", "grpo"), ("grpo", "ppo", "reinforce"),
                                     ("dpo", "grpo", "reward_model"), ("reward_model", "reinforce", "dpo")],
                         ids=",".join)
def test_every_line_of_each_column_is_drawn_once_and_colored_where_it_differs(opened, columns):
    rows = opened("#" + ",".join(columns)).evaluate(CELLS)
    for k, name in enumerate(columns):
        drawn = [(row["cells"][k]["line"], row["cells"][k]["text"]) for row in rows if row["cells"][k]["line"]]
        assert drawn == list(enumerate(read(f"{name}.py").splitlines(), 1))
    for row in rows:
        if row["mark"]:
            continue
        texts, kinds = texts_of(row), [cell["kind"] for cell in row["cells"]]
        for text, kind in zip(texts, kinds):
            others = texts.count(text)
            assert kind in ({"none"} if text is None else {""} if others == len(texts) else {"some"} if others > 1
                            else {"only", "near"})
        assert not row["hidden"] or set(kinds) == {""}  # no difference is folded away


def test_pairs_agree_with_difflib_on_what_is_the_same(opened):
    """In a section, as many lines stand beside their like as difflib finds."""
    rows = opened("#grpo,ppo").evaluate(CELLS)
    ours, theirs = (sections(read(f"{name}.py")) for name in ("grpo", "ppo"))
    shared = [difflib.SequenceMatcher(None, lines, theirs[name], autojunk=False) for name, lines in ours.items()
              if name in theirs]
    expected = sum(block.size for matcher in shared for block in matcher.get_matching_blocks())
    found = sum(row["cells"][0]["text"] == row["cells"][1]["text"] and row["cells"][0]["line"] is not None
                for row in rows)
    assert found == expected > 200


def test_what_is_the_same_is_folded_but_for_its_first_line(opened):
    page = opened("#grpo,reinforce")
    rows = page.evaluate(CELLS)
    runs = [list(run) for same, run in itertools.groupby(
        rows, key=lambda row: len(set(texts_of(row))) == 1 and not (row["mark"] and row["cells"][0]["line"] is None))
        if same]
    runs = [part for run in runs for part in by_section(run)]
    assert len(runs) > 15
    for run in runs:
        first = next((i for i, row in enumerate(run) if row["cells"][0]["text"].strip()), len(run))
        hidden = len(run) - first - 1
        assert [row["hidden"] for row in run] == [i > first and hidden > 1 for i in range(len(run))]
    button = page.locator("#at-generate + tr.fold button")
    lines = sections(read("grpo.py"))["generate"]
    assert button.inner_text() == f"{len(lines) - 1} lines the same, into def main"
    line = page.locator("code", has_text="completions not finished yet").first
    for press in (button.click, lambda: button.press("Enter"), lambda: button.press("Space")):
        before = button.get_attribute("aria-expanded")
        press()
        assert button.get_attribute("aria-expanded") == {"true": "false", "false": "true"}[before]
        assert line.is_visible() == (before == "false")
    page.get_by_role("button", name="Unfold all").click()
    assert page.locator("tbody tr[hidden]").count() == 0
    assert page.locator("#all").get_attribute("aria-pressed") == "true"
    page.locator("#all").click()
    assert page.evaluate(CELLS) == rows


def by_section(run: list[dict]):
    """A run of rows, cut before each mark."""
    part = []
    for row in run:
        if row["mark"] and part:
            yield part
            part = []
        part.append(row)
    yield part


def test_pointing_at_a_name_tells_what_it_is(opened):
    page = opened("#grpo,ppo:4")
    tip, name = page.locator("#tip"), page.locator("#table").get_by_text("masked_whiten", exact=True).last
    assert not tip.is_visible()
    name.hover()
    assert tip.is_visible() and name.get_attribute("aria-describedby") == "tip"
    common = importlib.import_module("common")
    assert inspect.cleandoc(common.masked_whiten.__doc__) in tip.inner_text()
    assert "def masked_whiten(values, mask, mean=masked_mean):" in tip.inner_text() and "common.py" in tip.inner_text()
    box, of_name = tip.bounding_box(), name.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 1600 and box["y"] >= 0 and box["y"] + box["height"] <= 1000
    assert box["y"] >= of_name["y"] + of_name["height"] or box["y"] + box["height"] <= of_name["y"]  # not over it
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.wait_for_timeout(400)
    assert tip.is_visible()  # the pointer may go to it, to select its text
    page.mouse.move(5, 5)
    tip.wait_for(state="hidden")
    name.hover()
    page.keyboard.press("Escape")
    assert not tip.is_visible() and name.get_attribute("aria-describedby") is None


def test_tabbing_to_a_name_tells_what_it_is(opened):
    page = opened("#grpo,ppo")
    page.get_by_role("navigation").get_by_text("4. advantages").press("Enter")
    assert page.evaluate("document.activeElement.closest('tr').id") == "at-advantages"  # the next tabs go on from there
    seen = []
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "name":
            seen.append(page.evaluate("document.activeElement.dataset.key"))
            assert page.locator("#tip").is_visible()
            assert page.evaluate("""document.activeElement.getBoundingClientRect().top
                                    >= document.querySelector("#tools").getBoundingClientRect().bottom""")
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            assert f"def {seen[-1].rpartition('.')[2]}(" in page.locator("#tip").inner_text()
            page.keyboard.press("Escape")
            assert not page.locator("#tip").is_visible()
    assert {"kl_estimate", "masked_whiten", "global_mean", "Run.autocast"} <= set(seen)
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert page.locator("#tip").is_visible()


def test_tapping_a_name_tells_what_it_is(opened):
    page = opened("#grpo,ppo:4", width=400, height=800, has_touch=True, is_mobile=True)
    name = page.locator("#table").get_by_text("kl_estimate", exact=True).locator("visible=true").first
    name.tap()
    page.locator("#tip").wait_for()
    box = page.locator("#tip").bounding_box()
    assert box["x"] == 0 and box["width"] == 400 and box["y"] + box["height"] == pytest.approx(800, abs=1)
    assert "Per-token estimates" in page.locator("#tip").inner_text()
    page.locator("#at-advantages .count").locator("visible=true").tap()
    page.locator("#tip").wait_for(state="hidden")


def test_the_address_holds_columns_and_section(opened):
    page = opened("#reinforce,ppo:5")
    heads = page.locator("#heads select")
    assert [select.input_value() for select in heads.all()] == ["reinforce", "ppo"]
    assert top_of(page, "update") == pytest.approx([0, 0], abs=2)
    heads.nth(0).select_option("grpo")
    until(lambda: hash_of(page) == "#grpo,ppo:5")
    assert top_of(page, "update") == pytest.approx([0, 0], abs=2)  # the reader stays where they were
    assert page.evaluate("document.activeElement.dataset.column") == "0"
    page.get_by_role("button", name="Add a column").click()
    until(lambda: hash_of(page) == "#grpo,ppo,reinforce:5")
    assert page.title() == "grpo.py, ppo.py, reinforce.py, side by side"
    heads.nth(2).select_option("grpo")  # two columns change places
    until(lambda: hash_of(page) == "#reinforce,ppo,grpo:5")
    heads.nth(2).select_option("no third column")
    until(lambda: hash_of(page) == "#reinforce,ppo:5")
    page.go_back()
    until(lambda: heads.count() == 3)
    assert [select.input_value() for select in heads.all()] == ["reinforce", "ppo", "grpo"]


@pytest.mark.parametrize("address, columns, section", [
    ("", ["grpo", "ppo"], None), ("#dpo", ["dpo", "grpo"], None), ("#nothing,ppo:99", ["ppo", "grpo"], None),
    ("#grpo,grpo,dpo,ppo", ["grpo", "dpo", "ppo"], None), ("#dpo%2Cgrpo:2", ["dpo", "grpo"], "update"),
    ("#dpo,grpo:4", ["dpo", "grpo"], "advantages"), ("#ppo,grpo:the-critic", ["ppo", "grpo"], "the-critic")])
def test_any_address_opens(opened, address, columns, section):
    page = opened(address)
    assert [select.input_value() for select in page.locator("#heads select").all()] == columns
    if section:
        assert top_of(page, section) == pytest.approx([0, 0], abs=2)
    else:
        assert page.evaluate("scrollY") == 0


@pytest.mark.parametrize("columns", ["grpo,ppo", "dpo,grpo,reward_model"])
def test_every_section_has_an_address_of_its_own_that_leads_there(opened, columns):
    page = opened("#" + columns)
    links = page.locator("#sections a")
    addresses = [link.get_attribute("href") for link in links.all()]
    assert len(set(addresses)) == len(addresses) == page.locator("tr.mark").count() > 10
    for link, mark in zip(links.all(), page.locator("tr.mark").all()):
        link.click()
        assert hash_of(page) == link.get_attribute("href")
        at_end = page.evaluate("scrollY + innerHeight >= document.documentElement.scrollHeight - 1")
        assert at_end or set(map(round, top_of(page, mark.get_attribute("id")[3:]))) <= {-1, 0, 1}
        assert at_end or page.locator("#sections [aria-current]").get_attribute("href") == hash_of(page)


def test_step_4_of_ppo_is_one_click_away(opened):
    """What does PPO do that GRPO does not, in step 4? One click in the page as it opens."""
    page = opened()
    page.get_by_role("navigation").get_by_text("4. advantages").click()
    assert hash_of(page) == "#grpo,ppo:4" and top_of(page, "advantages") == pytest.approx([0, 0], abs=2)
    texts = page.evaluate("""[...document.querySelectorAll("td.only:nth-child(2)")].filter(cell =>
        cell.getBoundingClientRect().top > 0 && cell.getBoundingClientRect().bottom < innerHeight)
        .map(cell => cell.textContent.trim())""")
    assert "advantages, _ = gae(rewards, values, rollout.mask, args.gamma, args.gae_lambda)" in texts


def test_a_click_on_a_sections_name_in_the_code_scrolls_there(opened):
    page = opened("#grpo,ppo:5")
    for _ in range(2):  # the second time, the address does not change
        page.mouse.wheel(0, -300)
        until(lambda: top_of(page, "update")[0] > 100)
        page.locator("#at-update a").nth(1).click()
        until(lambda: top_of(page, "update") == pytest.approx([0, 0], abs=2))


def test_on_a_phone_one_column_is_seen_and_tabs_switch(opened):
    page = opened("#grpo,ppo:4", width=400, height=800, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    tabs = page.get_by_role("tab")
    assert tabs.all_inner_texts() == ["grpo", "ppo"] and page.get_by_role("tabpanel").count() == 1
    whiten, group = (page.locator("#table code", has_text=text).first
                     for text in ("advantages = masked_whiten(", "advantages = group_advantages("))
    assert group.is_visible() and not whiten.is_visible()
    tabs.nth(1).tap()
    until(whiten.is_visible)
    assert not group.is_visible()
    assert top_of(page, "advantages") == pytest.approx([0], abs=2)
    tabs.nth(1).press("ArrowRight")
    assert group.is_visible() and page.evaluate("document.activeElement.textContent") == "grpo"
    assert [tab.get_attribute("aria-selected") for tab in tabs.all()] == ["true", "false"]
    page.locator("#sections").get_by_text("the critic").tap()  # which PPO alone has
    until(lambda: tabs.nth(1).get_attribute("aria-selected") == "true")
    assert top_of(page, "the-critic") == pytest.approx([0], abs=2)
    widths = page.evaluate("""[...document.querySelectorAll("td[data-line]")].filter(cell => cell.offsetParent)
                              .map(cell => cell.offsetWidth)""")
    assert len(widths) > 100 and set(widths) == {400}


@pytest.mark.parametrize("columns, width", [("grpo,ppo", 1600), ("grpo,ppo,reinforce", 400), ("dpo,reward_model", 900)])
def test_no_width_scrolls_sideways(opened, columns, width):
    assert opened("#" + columns, width=width).evaluate("document.documentElement.scrollWidth") == width


def test_it_prints_two_columns(opened):
    page = opened("#grpo,ppo,reinforce:4", width=400, color_scheme="dark")
    page.evaluate("""() => addEventListener("beforeprint", () => window.printed =
                     [...document.querySelectorAll("thead th")].map(cell => cell.textContent))""")
    paper = page.pdf(prefer_css_page_size=True)
    assert paper.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", paper)) > 3
    assert page.evaluate("window.printed") == ["grpo.py", "ppo.py"]
    assert page.locator("thead th").count() == 3  # on the screen again
    page = opened("#grpo,ppo", width=1000)
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("#tools").is_visible() and page.locator("thead th").first.is_visible()
    boxes = [cell.bounding_box() for cell in page.locator("#at-advantages th").all()]
    assert [round(box["width"] / 500, 1) for box in boxes] == [1, 1] and boxes[0]["y"] == boxes[1]["y"]


def test_it_is_drawn_soon(opened):
    page = opened("#grpo,ppo,reinforce")
    took = page.evaluate("performance.getEntriesByName('draw')[0].duration")
    print(f"three columns drawn in {took:.0f} ms")
    assert 0 < took < 10_000  # no benchmark: a page that hangs fails


COLORS = """() => {
    const found = {}, walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const rgb = text => text.match(/[\\d.]+/g).map(Number);
    for (let node; node = walker.nextNode();) {
        if (!node.data.trim() || !node.parentElement.checkVisibility()) continue;
        let box = node.parentElement;
        const ink = rgb(getComputedStyle(box).color);
        while (box && rgb(getComputedStyle(box).backgroundColor)[3] === 0) box = box.parentElement;
        const paper = box ? rgb(getComputedStyle(box).backgroundColor) : [255, 255, 255];
        found[[ink, paper].join("|")] ??= [ink, paper, node.data.trim().slice(0, 40)];
    }
    return Object.values(found);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_drawn_text_has_contrast(opened, scheme):
    page = opened("#grpo,ppo,reinforce:4", color_scheme=scheme)
    page.locator("#table").get_by_text("kl_estimate", exact=True).last.hover()
    found = page.evaluate(COLORS)
    papers = {tuple(paper) for _, paper, _ in found}
    mode = palettes()[scheme == "dark"]
    assert {mode[name] for name in mode if name.startswith("paper")} <= papers  # each was seen
    assert len(found) > 15
    for ink, paper, text in found:
        assert len(ink) == len(paper) == 3 and contrast(ink, paper) >= 4.5, (text, ink, paper)


def test_roles_and_names(opened):
    page = opened("#grpo,ppo,reinforce")
    assert [page.get_by_role("combobox", name=f"Column {k}").count() for k in (1, 2, 3)] == [1, 1, 1]
    assert page.get_by_role("navigation", name="Sections").get_by_role("link").count() > 10
    assert page.get_by_role("main").count() == page.get_by_role("banner").count() == 1
    assert page.get_by_role("tab").count() == 0  # only where columns are switched
    assert page.evaluate("""[...document.querySelectorAll("button, a, [role=button]")]
                            .every(element => element.textContent.trim())""")
    assert page.evaluate("""[...document.querySelectorAll(".fold button")]
                            .every(button => button.getAttribute("aria-expanded") === "false")""")
    same = page.locator("#sections a", has_text="score them")
    assert "the same in all columns" in same.inner_text() and page.locator("#sections a.same").count() >= 4
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"  # past the bar


def test_text_is_selected_in_one_column(opened):
    page = opened("#grpo,ppo:4")
    first = page.locator("#at-advantages ~ tr td.only:nth-child(2)").first.bounding_box()
    page.mouse.move(first["x"] + 60, first["y"] + 5)
    page.mouse.down()
    page.mouse.move(first["x"] + 500, first["y"] + first["height"] * 8.5)
    page.mouse.up()
    text = page.evaluate("getSelection().toString()")
    assert "kl_estimate(old_logprobs, ref_logprobs)" in text and "args.whiten" in text
    assert "kl_in_reward" not in text  # which stands beside args.whiten
