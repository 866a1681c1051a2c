"""What tests of folders of images share."""

import pytest

from tests.dataset.image_folders import write_images


@pytest.fixture
def folder(tmp_path):
    """Two classes, seven training and five test images of each."""
    return write_images(tmp_path / "data", side=32)
