"""Writes docs/side_by_side.html, one file in which the scripts are read side by side:

    python tools/side_by_side.py

Any two or three of the scripts, aligned section by section (their marks `# --- name` and
`# 1. name`) and line by line. The page loads nothing; its style and code are in
tools/side_by_side_template.html. Run this again when a script or a shared module changes.
"""
import argparse
import ast
import functools
import json
import re
import shutil
import sys
import textwrap
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEMPLATE = Path(__file__).with_name("side_by_side_template.html")
SCRIPTS = ["grpo", "ppo", "reinforce", "dpo", "reward_model"]
MARK = re.compile(r"^\s*# (?:--- (.+)|(\d)\. (.+))$")
HEAD = "docstring, imports, flags"  # the section before the first mark
MOST_FIELDS = 12  # of a class are shown; flags have more, and their own help
SIMILAR = 0.6  # lines with at least this share of words in common stand side by side


class Mistake(Exception):
    """A mistake of the user, told in one line."""


def read(path: Path) -> str:
    """The text of a file, or a Mistake that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise Mistake(f"{path}: cannot be read: {error.strerror}")


def parse(path: Path) -> ast.Module:
    """The syntax tree of a Python file, or a Mistake that names it and the line."""
    try:
        return ast.parse(read(path))
    except SyntaxError as error:
        raise Mistake(f"{path}:{error.lineno}: not Python: {error.msg}")


# --- sections

def sections(lines: list[str]) -> dict[str, tuple[str, int, int]]:
    """By name: the number of the step ("" for others), the first line, and the one after the last."""
    marks = [(HEAD, "", 0)]
    for i, line in enumerate(lines):
        if mark := MARK.match(line):
            marks.append((mark[1] or mark[3], mark[2] or "", i))
    ends = [start for _, _, start in marks[1:]] + [len(lines)]
    return {name: (number, start, end) for (name, number, start), end in zip(marks, ends)}


def merged(orders: list[list[str]]) -> list[str]:
    """All names in an order that agrees with each of the orders."""
    names = []
    for order in orders:
        place = 0
        for name in order:
            if name not in names:
                names.insert(place, name)
            elif names.index(name) < place:
                raise Mistake(f"section {name!r}: the scripts have it in different orders: move its mark")
            place = names.index(name) + 1
    return names


def slug(name: str) -> str:
    """A section's name in an address: the words before any parenthesis, comma or colon."""
    return "-".join(re.findall(r"\w+", re.split(r"[(,:]", name)[0].lower()))


# --- alignment

def words(line: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", line)


@functools.cache
def similarity(a: str, b: str) -> float:
    """Share of words in common; signs, and a comment after code, aside."""
    a, b = (re.findall(r"\w+", re.sub(r"(?<=\S)  # .*", "", line)) for line in (a, b))
    return SequenceMatcher(None, a, b, autojunk=False).ratio()


def changed(a: str, b: str) -> tuple[list[int], list[int]]:
    """Where the words of two lines differ: start and end, start and end ... of each. Where only the indentation
    does, that."""
    if a.strip() == b.strip():
        return [0, len(a) - len(a.lstrip())], [0, len(b) - len(b.lstrip())]
    marks, starts = ([], []), [list(places(words(x))) for x in (a, b)]
    for kind, *where in SequenceMatcher(None, words(a), words(b), autojunk=False).get_opcodes():
        for side, (first, last) in enumerate((where[:2], where[2:])):
            start, part = starts[side][first], "".join(words((a, b)[side])[first:last])
            if kind != "equal" and part.strip():
                start += len(part) - len(part.lstrip())
                marks[side].extend((start, start + len(part.strip())))
    return marks


def places(parts: list[str]):
    """Where each part of a line begins, and where the last one ends."""
    place = 0
    for part in parts:
        yield place
        place += len(part)
    yield place


def similar_lines(a: list[str], b: list[str], i: int, i_end: int, j: int, j_end: int) -> list[tuple[int, int]]:
    """Pairs of similar lines of a[i:i_end] and b[j:j_end], none of which cross: the most similar one first."""
    found = [(similarity(a[x], b[y]), -x, -y) for x in range(i, i_end) for y in range(j, j_end)
             if a[x].strip() and b[y].strip()]
    best, x, y = max(found, default=(0, 0, 0))
    if best < SIMILAR:
        return []
    return [*similar_lines(a, b, i, -x, j, -y), (-x, -y), *similar_lines(a, b, 1 - x, i_end, 1 - y, j_end)]


def align(a: list[str], b: list[str]) -> dict:
    """How two scripts match. same: [first line of a, of b, how many]; near: [line of a, of b, and
    where the words of each differ]."""
    same, near, theirs = [], [], sections(b)
    for name, (_, start, end) in sections(a).items():
        if name not in theirs:
            continue
        first, last = theirs[name][1:]
        if start and first:  # the marks: their numbers may differ
            same += [[start, first, 1]] if a[start] == b[first] else []
            near += [] if a[start] == b[first] else [[start, first, *changed(a[start], b[first])]]
            start, first = start + 1, first + 1
        i, j = start, first
        matcher = SequenceMatcher(None, a[start:end], b[first:last], autojunk=False)
        for x, y, n in matcher.get_matching_blocks():  # the last one is empty, at the end
            near += [[p, q, *changed(a[p], b[q])] for p, q in similar_lines(a, b, i, start + x, j, first + y)]
            same += [[start + x, first + y, n]] if n else []
            i, j = start + x + n, first + y + n
    return {"same": same, "near": near}


# --- colors of the syntax

@functools.cache
def kinds(source: str) -> list[list]:
    """For each line: start, end and kind of its parts, where the kind is k (keyword), s (string),
    c (comment), n (number or constant) or f (what is defined)."""
    try:
        from pygments import token
        from pygments.lexers import PythonLexer
    except ImportError:
        raise Mistake("Pygments is missing: pip install pygments")
    letters = [(token.Comment, "c"), (token.String, "s"), (token.Number, "n"), (token.Keyword.Constant, "n"),
               (token.Keyword, "k"), (token.Operator.Word, "k"), (token.Name.Function, "f"),
               (token.Name.Class, "f"), (token.Name.Decorator, "f")]
    lines, line, place = [[]], 0, 0
    for _, kind, text in PythonLexer(stripnl=False, ensurenl=False).get_tokens_unprocessed(source):
        letter = next((letter for group, letter in letters if kind in group), "")
        for n, part in enumerate(text.split("\n")):
            if n:
                lines.append([])
                line, place = line + 1, 0
            spans, end = lines[line], place + len(part)
            if letter and part.strip() and spans[-2:] == [place, letter]:
                spans[-2] = end
            elif letter and part.strip():
                spans += [place, end, letter]
            place = end
    return lines


# --- names of the shared modules

def shared_modules(root: Path) -> dict[str, ast.Module]:
    """The modules in the root that the scripts import, directly or through each other."""
    found, left = {}, list(SCRIPTS)
    while left:
        path = root / f"{left.pop()}.py"
        if path.stem in found or not path.exists():
            continue
        found[path.stem] = parse(path)
        left += [node.module for node in ast.walk(found[path.stem])
                 if isinstance(node, ast.ImportFrom) and node.module and not node.level]
        left += [alias.name for node in ast.walk(found[path.stem]) if isinstance(node, ast.Import)
                 for alias in node.names]
    return {name: tree for name, tree in sorted(found.items()) if name not in SCRIPTS}


def heading(node, lines: list[str]) -> list[str]:
    """The lines of a definition up to its body, or all where the body is one line without a docstring."""
    start = min([node.lineno] + [decorator.lineno for decorator in node.decorator_list])
    one_line = len(node.body) == 1 and not ast.get_docstring(node) and not isinstance(node, ast.ClassDef)
    end = node.end_lineno if one_line else max(node.lineno, node.body[0].lineno - 1)
    return lines[start - 1:end]


def signature(node, lines: list[str]) -> str:
    """A function's heading; a class's, with that of its __init__ or a few fields; all of an assignment."""
    if not hasattr(node, "body"):
        return "\n".join(lines[node.lineno - 1:node.end_lineno])
    text = heading(node, lines)
    if isinstance(node, ast.ClassDef):
        fields = [lines[x.lineno - 1] for x in node.body if isinstance(x, ast.AnnAssign)]
        made = [line for x in node.body if getattr(x, "name", "") == "__init__" for line in heading(x, lines)]
        text += made or fields * (len(fields) <= MOST_FIELDS)
    return textwrap.dedent("\n".join(text)).rstrip()


def described(module: str, node, lines: list[str]) -> dict[str, str]:
    """What the page shows of a definition."""
    doc = ast.get_docstring(node) if hasattr(node, "body") else ""
    return {"module": f"{module}.py", "signature": signature(node, lines), "doc": doc or ""}


def definitions(root: Path, modules: dict[str, ast.Module]) -> dict[str, dict]:
    """By name: what the shared modules define. `Class.method`, too, also where a base class has it."""
    found, bases = {}, {}
    for module, tree in modules.items():
        lines = read(root / f"{module}.py").splitlines()
        for node in tree.body:
            targets = [name for target in getattr(node, "targets", []) for name in ast.walk(target)]
            for name in [node.name] if hasattr(node, "name") else [x.id for x in targets if isinstance(x, ast.Name)]:
                found[name] = described(module, node, lines)
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        found[f"{node.name}.{method.name}"] = described(module, method, lines)
    for name in bases:
        for base in ancestors(name, bases):
            for key in [key for key in found if key.startswith(f"{base}.")]:
                found.setdefault(name + key[len(base):], found[key])
    return found


def ancestors(name: str, bases: dict[str, list[str]]) -> list[str]:
    return [x for base in bases.get(name, []) for x in [base, *ancestors(base, bases)]]


def returned(tree: ast.Module) -> dict[str, str]:
    """By name: the class that a function returns, where its signature names one."""
    return {node.name: node.returns.id for node in tree.body
            if isinstance(node, ast.FunctionDef) and isinstance(node.returns, ast.Name)}


def classes_of(tree: ast.Module, imported: set[str]) -> dict[str, str]:
    """By variable: its class, where that is an imported one: `run = Run(...)`, `run: Run`, or what a function of
    the script returns."""
    found, returns = {}, returned(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name):
            found[node.arg] = node.annotation.id
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            called, target = node.value.func, node.targets[0]
            if isinstance(called, ast.Name) and isinstance(target, ast.Name):
                found[target.id] = returns.get(called.id, called.id)
    return {name: cls for name, cls in found.items() if cls in imported}


def names(tree: ast.Module, modules: dict, known: dict, lines: list[str]) -> dict[int, list]:
    """By line (from 0): start, end and key of each name that comes from a shared module."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module in modules]
    imported = {alias.name for node in imports for alias in node.names if not alias.asname}
    variables = classes_of(tree, imported)
    in_strings = {id(x) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for x in ast.walk(node)}
    spots = [(alias.lineno, alias.col_offset, alias.name, alias.name)
             for node in imports for alias in node.names]
    for node in ast.walk(tree):
        if id(node) in in_strings:  # before Python 3.12, these have other columns
            continue
        if isinstance(node, ast.Name) and node.id in imported:
            spots.append((node.lineno, node.col_offset, node.id, node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in variables:
            spots.append((node.end_lineno, node.end_col_offset - len(node.attr.encode()), node.attr,
                          f"{variables[node.value.id]}.{node.attr}"))
    found = {}
    for line, column, name, key in sorted(set(spots)):
        if key in known:
            start = len(lines[line - 1].encode()[:column].decode())
            found.setdefault(line - 1, []).extend((start, start + len(name), key))
    return found


# --- the page

def title(tree: ast.Module) -> str:
    """What a script is, from the first sentence of its docstring."""
    return re.split(r" \(|\.(?: |$)|:$", " ".join((ast.get_docstring(tree) or "").split()))[0]


def page_data(root: Path) -> dict:
    """All that the page needs to lay out any two or three scripts."""
    modules = shared_modules(root)
    known, used, scripts, orders = definitions(root, modules), set(), {}, []
    for script in SCRIPTS:
        source, tree = read(root / f"{script}.py"), parse(root / f"{script}.py")
        lines = source.splitlines()
        spots = names(tree, modules, known, lines)
        used |= {key for spot in spots.values() for key in spot[2::3]}
        orders.append(list(sections(lines)))
        scripts[script] = {"title": title(tree), "lines": lines, "kinds": kinds(source)[:len(lines)], "names": spots,
                           "sections": {slug(name): place for name, place in sections(lines).items()}}
    order = merged(orders)
    if len({slug(name) for name in order}) < len(order):
        raise Mistake("two sections have the same address: give one of them another name")
    pairs = {f"{a},{b}": align(scripts[a]["lines"], scripts[b]["lines"]) for a, b in combinations(SCRIPTS, 2)}
    return {"scripts": scripts, "sections": {slug(name): name for name in order}, "pairs": pairs,
            "known": {key: known[key] for key in sorted(used)}}


def page(root: Path = ROOT) -> str:
    """The page of the scripts in a folder."""
    data = json.dumps(page_data(root), ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    before, after = read(TEMPLATE).split("{{data}}")
    return before + data + after


class Parser(argparse.ArgumentParser):
    """Tells a wrong flag in one line."""

    def error(self, message):
        raise Mistake(f"{message}: see --help")


def take_picture(page: Path):
    """docs/side_by_side.png: the page at step 4 of grpo.py and ppo.py."""
    try:
        from playwright.sync_api import sync_playwright
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1600, "height": 760}, color_scheme="light")
            tab.goto(f"{page.resolve().as_uri()}#grpo,ppo:4")
            tab.wait_for_timeout(1000)  # until it has scrolled
            tab.screenshot(path=ROOT / "docs/side_by_side.png")
            browser.close()
    except Exception as error:
        raise Mistake(f"--picture: no picture: {str(error).splitlines()[0]} (apt-get install chromium; "
                      "pip install '.[browser]')")


def main():
    """Writes the page."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/side_by_side.html", help="file to write")
    parser.add_argument("--picture", action="store_true", help="also docs/side_by_side.png (needs chromium, playwright)")
    try:
        args = parser.parse_args()
        out = args.out
        if not out.parent.is_dir():
            raise Mistake(f"--out {out}: the folder {out.parent} does not exist: make it first")
        text = page()
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise Mistake(f"--out {out}: cannot be written: {error.strerror}")
        print(f"{out}: {len(text.encode()) / 1000:.0f} kB")
        if args.picture:
            take_picture(out)
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
