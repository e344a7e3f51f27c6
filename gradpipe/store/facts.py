"""What is to be known of a store, for people: as lines, and as HTML for a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradpipe.store.reader import GradientStore
    from gradpipe.store.schema import SampleSpec


def facts_of(store: GradientStore) -> dict[str, str]:
    """What a store holds, and of what, by name."""
    spec, sizes = store.spec, store.sizes()
    num_weights = sum(layer.num_weights for layer in spec.layers)
    return {
        "model": f"{spec.model.name} ({spec.model.architecture}, {spec.model.dtype})",
        "samples": f"{spec.samples.num_samples} x {_sample(spec.samples)} of "
        f"{spec.samples.dataset} ({spec.samples.sampling}, seed {spec.samples.seed})",
        "layers": f"{len(spec.layers)}, {num_weights:,} weights",
        "encoding": spec.encoding,
        **{name: f"{size / num_weights:.3f} bytes per weight" for name, size in sizes.items()},
        "size": f"{sum(sizes.values()):,} bytes",
        "digest": store.digest,
    }


def as_html(title: str, facts: Mapping[str, object]) -> str:
    """A table of two columns; names that other people gave are text, never markup."""
    rows = "".join(
        f'<tr><th scope="row" style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(str(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f"<table><caption>{html.escape(title)}</caption>{rows}</table>"


def _sample(samples: SampleSpec) -> str:
    if samples.image_shape is None:
        return f"{samples.seq_len} tokens"
    _, height, width = samples.image_shape
    return f"{height} x {width} pixels ({samples.seq_len} tokens)"
