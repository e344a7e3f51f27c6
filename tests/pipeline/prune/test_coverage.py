"""What a pruning leaves dense is said, and counts in the shares of the blocks and of the file."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from gradpipe import collect, prune
from gradpipe.pipeline.reports.tables import layer_table
from tests.support.architectures import save_architecture
from tests.support.cases import collecting, pruning, written
from tests.support.fused import save_fused
from tests.support.models import save_tiny
from tests.support.texts import write_text


def save(kind: str, root: Path) -> None:
    """A mixture of experts of one kind, and a text."""
    write_text(root / "text.txt")
    if kind == "gpt_oss":
        save_fused(kind, root / "model")
    else:
        save_architecture(kind, root / "model")


def collected(root: Path) -> None:
    """A store of two samples of the model in `root`."""
    collect(collecting(root, num_samples=2, statistics=("act_l2",)))


def pruned(root: Path, model: Path, **options: Any) -> tuple[dict[str, Any], str, str]:
    """Report, what was said, and the table of a pruning of `model`."""
    said, shown = io.StringIO(), io.StringIO()
    run = pruning(root, root / "out", model=str(model), method="wanda", **options)
    (result,) = prune(run, Console(file=said, width=200))
    Console(file=shown, width=200).print(layer_table(result))
    return (
        json.loads((root / "out" / "pruning.json").read_text()),
        said.getvalue(),
        shown.getvalue(),
    )


@pytest.mark.parametrize("kind", ["gpt_oss", "jamba", "qwen2_moe"])
def test_shares_of_the_blocks_and_of_the_file_are_true(kind: str, tmp_path: Path) -> None:
    """They are counted over everything that was written; routers and such are named."""
    save(kind, tmp_path)
    collected(tmp_path)
    report, said, table = pruned(tmp_path, tmp_path / "model")
    written = load_file(tmp_path / "out" / "model.safetensors")
    blocks = {key: x for key, x in written.items() if ".layers." in key}
    for name, tensors in (("blocks_sparsity", blocks), ("file_sparsity", written)):
        zeros = sum(int((x == 0).sum()) for x in tensors.values())
        share = zeros / sum(x.numel() for x in tensors.values())
        assert report[name] == pytest.approx(share, abs=1e-12)
        assert f"{share:.4f}" in table
    dense = report["dense_weights"]
    assert {key for key in dense if "router" in key or key.endswith("gate.weight")}
    assert not any(".experts." in key and not key.endswith("bias") for key in dense)
    assert all(dense[key] == blocks[key].numel() for key in dense)
    assert f"stays dense: {next(iter(dense))}" in said
    assert f"{sum(dense.values()):,} weights of the blocks: no layers of the store" in said


def test_blocks_that_the_store_does_not_have_are_said(tmp_path: Path) -> None:
    """A deeper model whose first blocks are those of the store: the rest stays dense, aloud."""
    written(tmp_path)
    collected(tmp_path)
    deeper = save_tiny("llama", tmp_path / "deeper", num_hidden_layers=3)
    report, said, _ = pruned(tmp_path, deeper, allow_mismatch=True)
    assert len(report["dense_weights"]) == 7
    assert all(key.startswith("model.layers.2.") for key in report["dense_weights"])
    assert "stays dense: model.layers.2.mlp.down_proj.weight and 6 more" in said
    assert any("no layers of the store" in note for note in report["notes"])
    assert report["blocks_sparsity"] == pytest.approx(1 / 3, abs=0.01)


def test_what_the_user_leaves_out_is_listed_and_not_announced(tmp_path: Path) -> None:
    """An excluded layer is in the report, as dense; nobody needs to be told."""
    written(tmp_path)
    collected(tmp_path)
    report, said, _ = pruned(tmp_path, tmp_path / "model", exclude=(r"layers\.0\.mlp",))
    assert len(report["dense_weights"]) == 3
    assert "stays dense" not in said
