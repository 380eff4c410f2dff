"""Writes a script and all that it needs of the shared modules as one file, to take away:

    python tools/single_file.py grpo
    python tools/single_file.py ppo --out my_ppo.py

The file (SCRIPT_single.py) begins with the script's docstring and the imports, has then those definitions of the
shared modules that the script reaches, directly or through each other, and at last the script itself. Every
definition is there to the letter, with its comments. What is not reached is left out; a class comes whole.

A file that this tool did not write, or that has changed since, is not overwritten.
"""
import argparse
import ast
import builtins
import contextlib
import re
import symtable
import sys
import textwrap
import zlib
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parent.parent
WIDTH = 95  # columns of the scripts
MARK = re.compile(r"# --- .+")  # a section of a file begins
WRITTEN_BY = "# Written by tools/single_file.py (checksum "
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)
MODULE_NAMES = {"__name__", "__doc__", "__file__"}  # which every module has


class Refused(Exception):
    """What the tool cannot do; one line says what to change."""


@dataclass(frozen=True)
class Import:
    """One name of an import statement."""
    module: str
    name: str  # "": the module itself
    alias: str
    comment: str = field(compare=False)  # behind it, on its line

    def bound(self) -> str:
        return self.alias or self.name or self.module.partition(".")[0]

    def standard(self) -> bool:
        return self.module.partition(".")[0] in sys.stdlib_module_names


@dataclass
class Statement:
    """A statement of a module that is no import."""
    node: ast.stmt
    number: int  # its place in the module
    text: str  # its lines, to the letter, and the comments above them
    blanks: int  # lines between it and what stands before it
    mark: str  # the "# --- name" that its section begins with
    binds: set
    uses: set  # names that it does not bind itself
    lazy: list  # Imports from project modules that stood inside of it
    early: bool = False  # stands before one of its module's imports, and does in the one file


@dataclass
class Module:
    """A file of the project, taken apart."""
    name: str
    docstring: str  # as it is written, with its quotes
    statements: list
    imports: list


# --- taking a file apart

def read_module(folder: Path, name: str) -> Module:
    """The statements and the imports of a file. Comments belong to the statement below them, or, if they are
    indented, to the one above."""
    source, tree = parsed(folder, name)
    lines, nodes = source.split("\n"), tree.body
    docstring, statements, imports, mark, end = "", [], [], "", 0
    if ast.get_docstring(tree) is not None:
        node, *nodes = nodes
        docstring, end = "\n".join(lines[node.lineno - 1:node.end_lineno]), node.end_lineno
    for node in nodes:
        if not alone(node, lines[:node.end_lineno]):
            raise Refused(f"{name}.py: line {node.end_lineno}: two statements on one line")
        start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        comments = lines[end:start]
        while statements and comments and comments[0].startswith((" ", "\t")) and comments[0].strip():
            statements[-1].text += "\n" + comments.pop(0)
        mark = next((line for line in comments if MARK.fullmatch(line)), mark)
        above = [line for line in comments if line.strip() and not MARK.fullmatch(line)]
        end = node.end_lineno
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for statement in statements:
                statement.early = True
            imports += names_of(node, name, lines[end - 1])
            for part in imports:
                if not (part.standard() or is_project(folder, part.module) or find_spec(part.module.partition(".")[0])):
                    raise Refused(f"{name}.py: imports {part.module}, no file of the project and not installed")
        else:
            text, lazy = without_lazy_imports(folder, name, node, lines[start:end], start)
            binds, uses = names_in(text)
            statements.append(Statement(
                node, len(statements), "\n".join(above + text), comments.count(""), mark, binds,
                uses | names_in_quotes(node), lazy))
    known, late = {*dir(builtins), *MODULE_NAMES, *(part.bound() for part in imports if part.standard())}, set()
    for s in statements:  # what needs more than the standard library does not stay early
        s.early = s.early and not s.lazy and s.uses <= known and not s.binds & late
        known, late = (known | s.binds, late) if s.early else (known - s.binds, late | s.binds)
    return Module(name, docstring, statements, imports)


def parsed(folder: Path, name: str) -> tuple[str, ast.Module]:
    """A file's text, which is Python, and its tree."""
    path, source = folder / f"{name}.py", ""
    try:
        source = path.read_text(encoding="utf-8-sig")
        compile(source, path.name, "exec", dont_inherit=True)  # finds more than parsing does
        return source, ast.parse(source)
    except OSError as error:
        raise Refused(f"{path.name}: cannot be read: {error.strerror}")
    except (SyntaxError, ValueError) as error:  # ValueError: not UTF-8, or a NUL byte
        before = error.object[:error.start] if isinstance(error, UnicodeError) else source.partition("\0")[0].encode()
        line = getattr(error, "lineno", None) or before.count(b"\n") + 1
        raise Refused(f"{path.name}: line {line}: not Python: {getattr(error, 'msg', error)}")


def alone(node, lines: list[str]) -> bool:
    """Whether nothing but a comment is behind a statement, on its last line."""
    return lines[-1].encode()[node.end_col_offset:].strip()[:1] in (b"", b"#")


def names_of(node, module: str, line: str) -> list[Import]:
    """The names that an import statement binds."""
    if isinstance(node, ast.ImportFrom) and (
            node.level or node.module == "__future__" or node.names[0].name == "*"):
        raise Refused(f"{module}.py: {ast.unparse(node)}: write it as `from module import name`")
    comment = line[node.end_col_offset:].strip() if node.lineno == node.end_lineno else ""
    return [Import(alias.name, "", alias.asname or "", comment) if isinstance(node, ast.Import) else
            Import(node.module, alias.name, alias.asname or "", comment) for alias in node.names]


def is_project(folder: Path, module: str) -> bool:
    return (folder / f"{module}.py").is_file()


def without_lazy_imports(folder: Path, name: str, node, lines: list[str], start: int):
    """A statement's lines without the imports from project modules inside of it, and these Imports: in one file
    their names are there already."""
    lazy, dropped = [], set()
    blocks = [block for parent in ast.walk(node) for block in (
        getattr(parent, key, None) for key in ("body", "orelse", "finalbody")) if isinstance(block, list)]
    for block in blocks:
        inner = [child for child in block if isinstance(child, (ast.Import, ast.ImportFrom))]
        found = [child for child in inner if any(
            is_project(folder, part.module) for part in names_of(child, name, lines[child.end_lineno - 1 - start]))]
        if found and len(found) == len(block):
            raise Refused(f"{name}.py: line {found[0].lineno}: nothing but an import from {found[0].module}.py "
                          "is in this block: import it at the top of the file")
        if found and not all(alone(child, lines[:child.end_lineno - start]) for child in block):
            raise Refused(f"{name}.py: line {found[0].lineno}: at or beside this import, two statements on one line")
        for child in found:
            lazy += names_of(child, name, lines[child.end_lineno - 1 - start])
            dropped |= set(range(child.lineno - 1 - start, child.end_lineno - start))
    return [line for i, line in enumerate(lines) if i not in dropped], lazy


def names_in(lines: list[str]) -> tuple[set, set]:
    """What a statement binds in its module, and the names that it takes from there (or from builtins), in
    annotations, decorators and default values, too."""
    table = symtable.symtable("\n".join(lines), "statement", "exec")
    binds = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_namespace() or s.is_imported()}
    uses = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    tables = list(table.get_children())
    while tables:
        inner = tables.pop()
        tables += inner.get_children()
        uses |= {s.get_name() for s in inner.get_symbols() if s.is_global()}
    return binds, uses - binds


def names_in_quotes(node) -> set:
    """Names in annotations that are strings."""
    found = set()
    for part in ast.walk(node):
        for annotation in (getattr(part, "annotation", None), getattr(part, "returns", None)):
            found |= quoted_names(annotation) if isinstance(annotation, ast.AST) else set()
    return found


def quoted_names(annotation) -> set:
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).endswith(("Literal", "Annotated")):
        return set()  # their strings are values
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        with contextlib.suppress(SyntaxError):  # a string that is no expression names nothing
            tree = ast.parse(annotation.value, mode="eval")
            return {part.id for part in ast.walk(tree) if isinstance(part, ast.Name)}
    return {name for part in ast.iter_child_nodes(annotation) for name in quoted_names(part)}


# --- what a script reaches

def modules_of(folder: Path, script: str) -> list[Module]:
    """The shared modules that a script imports, directly or through each other, each after those that it needs;
    the script is the last."""
    done, open_ = {}, []

    def visit(name):
        if name in open_:
            raise Refused(f"{name}.py: imports itself through {', '.join(open_[open_.index(name) + 1:])}: import it "
                          "inside the function that needs it")
        open_.append(name)
        module = read_module(folder, name)
        for other in dict.fromkeys(part.module for part in module.imports if is_project(folder, part.module)):
            if other not in done:
                visit(other)
        done[open_.pop()] = module
    visit(script)
    while late := [part.module for module in done.values() for s in module.statements for part in s.lazy
                   if part.module not in done]:
        visit(late[0])
    return [done[name] for name in done if name != script] + [done[script]]


def reached(folder: Path, modules: list[Module]) -> tuple[set, dict]:
    """Which statements, (module, number), and which imports (with their comments) the last module needs: all of its
    own, what they name, what that names, and every statement of an imported module that is no definition, since
    importing runs it. The last module's imports are all needed: they can register things."""
    by_name = {module.name: module for module in modules}
    script, taken, imports, owners, plain = modules[-1], set(), {}, {}, {}
    for module, s in ((module, s) for module in modules[:-1] for s in module.statements if is_main(s.node)):
        if s.node.orelse or ast.unparse(s.node.test) not in ("__name__ == '__main__'", "'__main__' == __name__"):
            raise Refused(f"{module.name}.py: line {s.node.lineno}: write `if __name__ == \"__main__\":`, without else")
    left = [(module, s) for module in modules for s in module.statements
            if module is script or not (s.binds and isinstance(s.node, DEFINITIONS) or is_main(s.node))]

    def resolve(module, name, user):
        """Where a name comes from: adds statements to `left`, or an import."""
        lazy = [part for part in user.lazy if part.bound() == name] if user else []
        definitions = [] if lazy else [s for s in module.statements if name in s.binds]
        left.extend((module, s) for s in definitions)
        found = lazy or [part for part in module.imports if part.bound() == name]
        for part in found:
            if is_project(folder, part.module):
                if part.alias or not part.name:
                    raise Refused(f"{module.name}.py: imports {part.module}.py or a name of it under another name: "
                                  "write `from module import name`")
                resolve(by_name[part.module], part.name, None)
            else:
                own(name, part.module + "." + part.name)
                imports[part] = imports.get(part) or part.comment
        if not (found or definitions):
            if not hasattr(builtins, name) and name not in MODULE_NAMES:
                raise Refused(f"{module.name}.py: {name!r} is defined nowhere")
            plain[name] = module.name

    def own(name, source):
        root = source.partition(".")[0] if source.endswith(".") else source
        if owners.setdefault(name, root) != root:
            raise Refused(f"{name!r} is two things in one file, of {owners[name].rstrip('.')} and of "
                          f"{root.rstrip('.')}: rename one")
    for part in script.imports:
        if not is_project(folder, part.module):
            resolve(script, part.bound(), None)
    while left:
        module, statement = left.pop()
        if (module.name, statement.number) in taken:
            continue
        taken.add((module.name, statement.number))
        for name in statement.binds:
            own(name, module.name + ".py")
        for part in statement.lazy:
            resolve(module, part.bound(), statement)
        for name in sorted(statement.uses):
            resolve(module, name, statement)
    for name in sorted(plain.keys() & owners.keys()):
        raise Refused(f"{name!r} is Python's own in {plain[name]}.py, and of {owners[name]}: rename that one")
    return taken, imports


def is_main(node) -> bool:
    return isinstance(node, ast.If) and any(getattr(part, "id", "") == "__name__" for part in ast.walk(node.test))


# --- putting it together

def import_lines(imports: dict, standard: bool) -> list[str]:
    """Sorted import statements: of the standard library, or the others."""
    chosen = sorted((part for part in imports if part.standard() == standard),
                    key=lambda part: (part.module, part.name, part.alias))
    lines, of_module = [], {}
    for part in chosen:
        renamed = f" as {part.alias}" if part.alias else ""
        comment = f"  {imports[part]}" if imports[part] else ""
        if not part.name:
            lines.append(f"import {part.module}{renamed}{comment}")
        else:
            of_module.setdefault(part.module, []).append(part.name + renamed)
    for module, names in of_module.items():
        begin = f"from {module} import "
        if len(begin + ", ".join(names)) <= WIDTH:
            lines.append(begin + ", ".join(names))
        else:
            lines += textwrap.wrap(f"{begin}({', '.join(names)})", WIDTH,
                                   subsequent_indent=" " * (len(begin) + 1))
    return lines


def heading(module: Module, with_docstring: bool = True) -> list[str]:
    """A line with the file's name, and its docstring as comments."""
    line = f"# === {module.name}.py "
    text = ast.literal_eval(module.docstring).strip() if module.docstring and with_docstring else ""
    return [line + "=" * (WIDTH - len(line)), *(f"# {part}".rstrip() for part in text.splitlines())]


def body(module: Module, taken: set) -> list[str]:
    """The statements of a module that are taken, in its order."""
    lines, mark, before = [], "", None
    for s in module.statements:
        if (module.name, s.number) not in taken or s.early:
            continue
        if s.mark != mark:
            mark = s.mark
            lines += ["", "", mark, ""]
        elif before is not None and before.number + 1 == s.number:
            lines += [""] * s.blanks
        else:
            lines += ["", ""]
        lines += s.text.split("\n")
        before = s
    return lines


def single_file(script: str, folder: Path = ROOT) -> tuple[str, dict]:
    """The text of the one file, and how many of its lines are of each module."""
    modules = modules_of(folder, script)
    taken, imports = reached(folder, modules)
    early = [line for module in modules for s in module.statements
             if s.early and (module.name, s.number) in taken for line in s.text.split("\n")]
    lines = [modules[-1].docstring] if modules[-1].docstring else []
    groups = import_lines(imports, standard=True), early, import_lines(imports, standard=False)
    for group in filter(None, groups):
        lines += [*group, ""]
    counts = {}
    for module in modules:
        own = body(module, taken)
        if own:
            lines += ["", *heading(module, module is not modules[-1]), *own, ""]
            counts[f"{module.name}.py"] = len(own)
    counts = {"docstring and imports": 0} | counts
    used = [name for name in counts if name.endswith(".py") and name != f"{script}.py"]
    note = f"{script}.py of plain-rlhf (Apache-2.0), with what it needs of {', '.join(used)}."
    text = "\n".join([*textwrap.wrap(note, WIDTH, initial_indent="# ", subsequent_indent="# "), *lines])
    text = text.rstrip("\n") + "\n"
    text = f"{WRITTEN_BY}{zlib.crc32(text.encode()):08x}).\n{text}"
    compile(text, f"{script}_single.py", "exec")
    counts["docstring and imports"] = text.count("\n") - sum(counts.values())
    return text, counts


def unchanged(text: str) -> bool:
    """Whether this tool wrote a text, and nobody has changed it since."""
    first, _, rest = text.partition("\n")
    return first == f"{WRITTEN_BY}{zlib.crc32(rest.encode()):08x})."


def scripts(folder: Path = ROOT) -> list[str]:
    """The files that are run, by their names without .py."""
    found = set()
    for path in folder.glob("*.py"):
        with contextlib.suppress(Refused):  # said where the file is needed
            found |= {path.stem for node in parsed(folder, path.stem)[1].body if is_main(node)}
    return sorted(found)


def write(script: str, out: str, folder: Path = ROOT) -> str:
    """Writes the file; returns a line that says what it holds."""
    name = Path(script).name.removesuffix(".py")
    if not (is_project(folder, name) and any(map(is_main, parsed(folder, name)[1].body))):
        raise Refused(f"{script}: no such script: name one of {', '.join(scripts(folder))}")
    path = Path(out or f"{name}_single.py")
    text, counts = single_file(name, folder)
    part = Path(f"{path.resolve()}.part")
    try:
        if path.exists() and not (path.is_file() and unchanged(path.read_text(encoding="utf-8", errors="replace"))):
            raise Refused(f"{path}: was not written by this tool, or has changed since: move it away, or name "
                          "another --out")
        part.write_text(text, encoding="utf-8")
        part.replace(path.resolve())
    except OSError as error:
        raise Refused(f"--out: {path} cannot be written: {error.strerror}")
    parts = ", ".join(f"{part} {n}" for part, n in counts.items())
    return f"wrote {path}: {text.count(chr(10))} lines ({parts})"


def main():
    try:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("script", help=", ".join(scripts()))
        parser.add_argument("--out", default="", help="file to write (default: SCRIPT_single.py)")
        args = parser.parse_args()
        print(write(args.script, args.out))
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
