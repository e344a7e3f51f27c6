"""The page of model types, made from the verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERDICTS = Path(__file__).with_name("verdicts.json")
PAGE = ROOT / "docs" / "models.md"

_TITLES = {
    "causal-lm": "Causal language models",
    "images": "Image classifiers",
    "other": "Models for something else, as they are refused",
}

_HEAD = """# Models

What gradpipe makes of each model type of transformers, tried on a toy of it by `make models`, which
prints what has changed. This page is made from `tests/models/verdicts.json` by
`python scripts/models.py --page`.

*Works* means: what `collect-grads` writes is the same to the bit whether the model is streamed or
resident, and is what ordinary autograd gives of one sample at a time (within 1e-3 of a layer's root
mean square); the model is pruned to 50 % and to 2:4, opened by `from_pretrained` with nothing
missing or unexpected, and evaluated. A toy may go another way than a model of full size.

A model whose code comes along in its folder (`auto_map` in its `config.json`) is loaded by
transformers' own class, where there is one; code from a folder or the Hub is never run.
`pipe doctor MODEL` says of one model what would be pruned, and what stays dense and why.
"""


def read_verdicts() -> dict[str, str]:
    """Case, such as `causal-lm/llama` -> verdict, as committed."""
    verdicts: dict[str, str] = json.loads(VERDICTS.read_text()) if VERDICTS.is_file() else {}
    return verdicts


def page(verdicts: dict[str, str]) -> str:
    """`docs/models.md`."""
    return "\n".join([_HEAD, *(line for kind in _TITLES for line in _section(kind, verdicts))])


def _section(kind: str, verdicts: dict[str, str]) -> Iterable[str]:
    """What works of a kind, in a paragraph; a table of what does not, by what is said."""
    own = {x.partition("/")[2]: y for x, y in verdicts.items() if x.startswith(f"{kind}/")}
    works = [f"`{name}`" for name, verdict in own.items() if verdict == "collected"]
    yield f"## {_TITLES[kind]}\n"
    if works:
        yield f"{len(works)} of {len(own)} types work: {', '.join(works)}.\n"
    reasons: dict[str, list[str]] = {}
    for name, verdict in own.items():
        if verdict != "collected":
            reasons.setdefault(verdict.replace("|", "\\|"), []).append(f"`{name}`")
    if reasons:
        yield "| type | what is said |\n|---|---|"
        yield from (f"| {', '.join(types)} | {reason} |" for reason, types in reasons.items())
        yield ""
