"""Many runs of the scripts, several at a time, for the benchmarks that need them. A worker is a process, with
one thread, which imports torch once and calls a script's `main` for one run after the other."""
import contextlib
import functools
import importlib
import io
import json
import multiprocessing
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs"


def set_threads(threads: int):
    import torch
    if threads:
        torch.set_num_threads(threads)


def run_one(job: tuple):
    """job: (script, flags with run_dir, and perhaps module:context, a context manager of script and flags
    around the run). Returns the job, its seconds of CPU time, and the peak memory of the worker in MiB."""
    sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)
    script = importlib.import_module(job[0])
    start = time.process_time()
    around = contextlib.nullcontext()
    if len(job) > 2 and job[2]:
        module, _, name = job[2].partition(":")
        around = getattr(importlib.import_module(module), name)(script, job[1])
    with around, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            script.main(script.Args(**job[1]))
        except Exception as error:
            raise RuntimeError(f"{job}: {error}") from error
    return job, time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_all(jobs: list[tuple], workers: int = 2, fresh: bool = False, threads: int = 1):
    """Yields what run_one returns, as runs end. fresh: a new process for each, so that its memory is measured alone.
    threads of each worker (0: torch's own choice)."""
    commit()  # of now, not of when the runs end
    with multiprocessing.get_context("spawn").Pool(workers, set_threads, [threads], 1 if fresh else None) as pool:
        for done, found in enumerate(pool.imap_unordered(run_one, jobs), 1):
            print(f"{done}/{len(jobs)}  {Path(found[0][1]['run_dir']).name}  {found[1]:.0f} s", flush=True)
            yield found


def check_names(flag: str, names, known):
    if unknown := set(names) - set(known):
        sys.exit(f"error: {flag}: {min(unknown)!r} is none of {', '.join(known)}")


def read_jsonl(path) -> list[dict]:
    if not Path(path).exists():
        sys.exit(f"error: {path}: no results yet: run this without --table or --draw")
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_jsonl(path, rows: list[dict]):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def in_page(page: str, name: str) -> str:
    """The text between <!-- NAME --> and <!-- end NAME --> in docs/PAGE."""
    return (DOCS / page).read_text().partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- end {name} -->")[0]


def show_table(page: str, name: str, text: str):
    """Prints a table and puts it into docs/PAGE, between <!-- NAME --> and <!-- end NAME -->."""
    print(text)
    before, begin, rest = (DOCS / page).read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"\n<!-- end {name} -->")
    if not end:
        sys.exit(f"error: docs/{page}: no lines <!-- {name} --> and <!-- end {name} --> to put the table between")
    (DOCS / page).write_text(before + begin + text + end + after)


@functools.cache
def commit() -> dict:
    """What the runs of this process are made with, as it was at the first call: the commit ("-dirty": with changed
    scripts), torch and transformers."""
    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return {"commit": git("rev-parse", "--short", "HEAD") + "-dirty" * bool(changed), "torch": version("torch"),
            "transformers": version("transformers")}
