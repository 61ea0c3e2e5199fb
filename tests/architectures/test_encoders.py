"""Every row of encoders, and encoders with decoders: see ``check``."""

import pytest

from tests.architectures.check import check_and_compare
from tests.architectures.encoders import ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.cls)
def test_it_is_converted_saved_loaded_merged_and_trained(row, tmp_path, plain_output):
    check_and_compare(row, tmp_path)
