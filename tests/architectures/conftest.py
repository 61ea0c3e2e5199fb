"""Rank maps and progress bars would take as long as everything else, and are tested elsewhere."""

import pytest

from tests.architectures.measure import without_pictures


@pytest.fixture
def plain_output():
    with without_pictures():
        yield
