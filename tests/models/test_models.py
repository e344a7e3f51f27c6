"""The matrix of model types: one of each mechanism is run, and the page tells of all of them."""

from pathlib import Path

import pytest

from tests.models.check import names, verdict, write_data
from tests.models.page import PAGE, page, read_verdicts

SAMPLE = {  # one of each mechanism
    "causal-lm/gpt2": "transposed weights, a head tied to the embedding",
    "causal-lm/qwen3": "grouped queries, a gated MLP",
    "causal-lm/mixtral": "experts that the checkpoint holds one by one",
    "causal-lm/gpt_oss": "experts that the checkpoint keeps in one tensor",
    "causal-lm/bamba": "Mamba and attention in turn",
    "causal-lm/electra": "an encoder",
    "causal-lm/bart": "the decoder of an encoder-decoder",
    "causal-lm/doge": "a mask that requires a gradient: PyTorch computes attention otherwise",
    "causal-lm/youtu": "a row of weights that from_pretrained empties",
    "causal-lm/xlnet": "samples along the second axis",
    "causal-lm/hrm_text": "blocks that all run several times",
    "causal-lm/reformer": "a head that no gradient goes through",
    "images/vit": "an image classifier",
    "images/levit": "layers that read one vector, transposed activations",
    "images/swinv2": "a linear map that reads nothing of an image",
    "images/siglip2": "more than an image",
    "images/resnet": "an image classifier without linear maps",
    "other/t5": "an encoder-decoder",
    "other/llama": "a classifier of texts",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens and images."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_a_type_gets_the_verdict_that_is_committed(name: str, data: Path, tmp_path: Path) -> None:
    """The whole way on a toy: collected, pruned, evaluated, or refused with the same line."""
    assert verdict(name, data, tmp_path / "work") == read_verdicts()[name]


def test_every_type_that_transformers_builds_has_a_verdict() -> None:
    """A new version of transformers brings types that nobody has tried: run `make models`."""
    assert set(names()) <= set(read_verdicts())


def test_no_type_gives_a_wrong_result_or_a_traceback() -> None:
    """What is not collected is refused in a line."""
    assert not [name for name, found in read_verdicts().items() if "wrong: " in found]


def test_the_page_is_made_from_the_verdicts() -> None:
    """`python scripts/models.py --page` has been run since."""
    assert PAGE.read_text() == page(read_verdicts())
