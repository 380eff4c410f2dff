"""Checks every kind of causal LM that transformers has, a line for each: python tests/families_table.py [NAME ...]

Ends with code 1 if one of them is silently wrong, or raises anything but a UserError."""
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
warnings.filterwarnings("ignore")

from transformers import logging

from modeling import first_line
from helpers import families

logging.set_verbosity_error()
logging.disable_progress_bar()


def main(names):
    built = failed = 0
    names = names or sorted([*families.TYPES, *families.VARIANTS])
    for name in names:
        start = time.time()
        if name in families.NOT_BUILT:
            print(f"{name}: not built: {families.NOT_BUILT[name]}", flush=True)
            continue
        try:
            found = families.verdicts(name)
            built += 1
        except Exception as error:
            found = {"built": f"RAISED {type(error).__name__}: {first_line(error)}"}
        bad = any(text.startswith(("WRONG", "RAISED")) for text in found.values())
        failed += bad
        text = " | ".join(f"{check} {text}" for check, text in found.items())
        print(f"{name}: {'FAILED: ' * bad}{text} ({time.time() - start:.1f} s)", flush=True)
    print(f"{built} of {len(names)} families were built, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
