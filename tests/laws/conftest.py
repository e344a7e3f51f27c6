"""What the laws share: each case's store and oracle, made once."""

import pytest

from tests.support.cases import Shelf


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Models, samples, stores and oracles of all cases."""
    return Shelf(tmp_path_factory.mktemp("shelf"))
