"""Points of sweeps as `pipe sweep` writes them, and text that means harm."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HOSTILE = "$\\alpha$ <img src=x onerror=document.title='taken'> </script>|`[a](b)"
_NOTHING = dict.fromkeys(
    ("sparsity", "pattern", "grad_norm", "alpha", "group", "allocation", "update", "recipe")
)


def point(
    spec: dict[str, Any] | None, value: float | None, samples: int | None = None, **more: Any
) -> dict[str, Any]:
    """A line of `results.jsonl`; `more` are fields of it."""
    line = {
        "format": 1,
        "key": json.dumps([spec, samples, more]),
        "study": None,
        "point": None if spec is None else _NOTHING | spec,
        "options": {} if samples is None else {"--num-samples": samples},
        "model": {"name": "embedded", "digest": "ab" * 16},
        "store": {"name": "store", "digest": "cd" * 16},
        "metric": {"name": "perplexity", "value": value, "tokens": 4096},
        "zeros": {"pruned": 0.5, "blocks": 0.49, "file": 0.3},
        "layers": {},
        "seconds": {"prune": 0.1, "evaluate": 1.5},
        "versions": {"gradpipe": "0.1.0"},
    }
    return line | more


def write_points(folder: Path, points: Iterable[dict[str, Any]], torn: str = "") -> None:
    """A sweep's folder."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(x) + "\n" for x in points)
    (folder / "results.jsonl").write_text(lines + torn)


def grid() -> list[dict[str, Any]]:
    """Two methods at three sparsities, in no order."""
    return [
        point(
            {"method": method, "sparsity": sparsity, "grad_norm": "l1"}, 10 + place + 10 * sparsity
        )
        for (place, method), sparsity in itertools.product(
            enumerate(("wanda", "gblm")), (0.7, 0.5, 0.6)
        )
    ]
