"""The card of a store on the Hub: what it was measured on, and how to use it."""

import json

from gradpipe.errors import printable
from gradpipe.store.reader import GradientStore


def store_card(store: GradientStore) -> str:
    """A README.md that the Hub shows, and finds by its tags; a store's words are quoted in it."""
    spec = store.spec
    model, samples = spec.model, spec.samples
    rows = {
        "model": model.name,
        "revision": model.revision,
        "architecture": f"{model.architecture}, {model.dtype}",
        "data": samples.dataset,
        "its revision": samples.revision,
        "samples": f"{samples.num_samples} x {samples.seq_len} tokens, {samples.sampling}, "
        f"seed {samples.seed}",
        "statistics": ", ".join(spec.statistics),
        "encoding": spec.encoding,
        "layers": f"{len(spec.layers)}",
        "digest": store.digest,
        "gradpipe": spec.gradpipe,
    }
    table = "\n".join(f"| {name} | {_code(x)} |" for name, x in rows.items() if x is not None)
    tags = json.dumps(["gradpipe", "gradient-store", "pruning", *spec.statistics])
    title = json.dumps(f"Gradient store of {printable(model.name)}")
    return f"""---
pretty_name: {title}
tags: {tags}
viewer: false
---
# Gradient store

Statistics of a model's gradients and activations over calibration samples, from which
gradpipe prunes the model, without running it: `pipe prune MODEL hf://datasets/OWNER/NAME OUT`.

| | |
|---|---|
{table}

Made by

    {printable(spec.command)}

Every object is named in `commit.json`, with its size and digest: `pipe store verify` checks them,
and whatever reads the store does.
"""


def _code(words: str) -> str:
    """Somebody's words in a table's cell: no markup, no link, no end of the cell."""
    plain = printable(words).translate(dict.fromkeys(map(ord, "`|"), "'"))
    return f"`{plain}`"
