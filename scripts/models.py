"""Run the matrix of model types, and write what has become of it.

    make models                             # all of them: prints what changed against the verdicts
    python scripts/models.py --write        # and keep what is found in tests/models/verdicts.json
    python scripts/models.py --page         # docs/models.md from the verdicts; runs nothing
    python scripts/models.py causal-lm/llama images/vit

A type takes a few seconds on one core; what is checked of it is told in `tests/models/check.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
_ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(_ROOT))

from tests.models.page import PAGE, VERDICTS, page, read_verdicts  # noqa: E402 (of this tree)


def main() -> None:
    """Run what is asked for; exit 1 if a verdict is another than before."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("types", nargs="*", help="as causal-lm/llama; default: all")
    parser.add_argument("--write", action="store_true", help="keep the verdicts that are found")
    parser.add_argument("--page", action="store_true", help="write docs/models.md, and stop")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    if asked.page:
        PAGE.write_text(page(read_verdicts()))
        return
    sys.exit(1 if _run(asked.types, asked.processes, write=asked.write) else 0)


def _run(types: list[str], processes: int, *, write: bool) -> int:
    """The number of verdicts that changed, each of which is printed."""
    from tests.models.check import names, write_data  # noqa: PLC0415 (torch, for those who run)

    wanted = types or names()
    kept = read_verdicts()
    changed = 0
    with tempfile.TemporaryDirectory(prefix="models-") as folder:
        root = write_data(Path(folder))
        spawned = multiprocessing.get_context("spawn")
        with spawned.Pool(processes, maxtasksperchild=60) as pool:
            for name, found, seconds in pool.imap_unordered(partial(_one, root=root), wanted):
                if found != kept.get(name):
                    changed += 1
                    print(f"{name}: {kept.get(name, 'new')} -> {found}", flush=True)
                print(f"{name} {seconds:.1f} s {found[:60]}", file=sys.stderr, flush=True)
                kept[name] = found
                if write:
                    VERDICTS.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    gone = [] if types else sorted(kept.keys() - set(wanted))
    for name in gone:
        print(f"{name}: is no longer built by transformers")
    print(f"{len(wanted)} types, {changed} changed")
    return changed + len(gone)


def _one(name: str, root: Path) -> tuple[str, str, float]:
    from tests.models.check import verdict  # noqa: PLC0415 (in the child)

    start = time.perf_counter()
    found = verdict(name, root, root / str(os.getpid()))
    return name, found, time.perf_counter() - start


if __name__ == "__main__":
    main()
