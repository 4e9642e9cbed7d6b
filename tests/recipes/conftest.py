"""What the tests of all recipes start from."""

import helpers
import pytest


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return helpers.write_pictures(tmp_path_factory.mktemp("pictures"))
