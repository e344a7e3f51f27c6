"""FSDP's side of the benchmark is FSDP's, and its sums are the schedules' own."""

import pytest

from benchmarks import fsdp

TOY = {"hidden": 32, "blocks": 2, "vocab": 300, "samples": 4, "seq_len": 16}


@pytest.mark.slow
def test_hooks_under_fsdp_see_each_sample_s_gradient(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded over two ranks, streamed and resident: one table, the same bytes each."""
    fsdp.main(ranks=2, **TOY)
    rows = capfd.readouterr().out.splitlines()[-3:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [*fsdp.SIDES]
    assert all(row.endswith("| the same bytes |") for row in rows)

    def fail(_: object) -> None:
        raise ValueError

    monkeypatch.setattr(fsdp, "load_sharded", fail)
    with pytest.raises(ValueError, match="failed in its process"):
        fsdp.main(ranks=2, **TOY)
