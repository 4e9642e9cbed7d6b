"""What the tests of all recipes start from."""

import helpers
import pytest
import toy_stage2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return helpers.write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Pictures, tokenizer and text tokenizer of a transformer."""
    return toy_stage2.make_places(tmp_path_factory.mktemp("places"))
