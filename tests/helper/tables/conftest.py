"""Run folders that the tests of pages show."""

import pytest

from tests.run_folders import make_run


@pytest.fixture
def runs(tmp_path):
    """Three seeds of KD and NORM, one of the baseline and of the teacher, two values of N."""
    root = tmp_path / "save"
    made = [make_run(root, "kd", seed, [50.0, 61.0, 60.0 + seed]) for seed in (1, 2, 3)]
    made += [make_run(root, "norm", seed, [50.0, 70.0, 65.0 + seed]) for seed in (1, 2, 3)]
    made += [make_run(root, "norm", 1, [50.0, 55.0, 52.0], co_sponge=2)]
    made += [make_run(root, "ce", 1, [40.0, 45.0, 44.0], None)]
    made += [make_run(root, "ce", 1, [80.0] * 5, None, model_s="resnet20")]
    return made
