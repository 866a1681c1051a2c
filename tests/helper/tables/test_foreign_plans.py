"""Plans with networks of other libraries: what their runs would refuse is refused when the plan is made."""

import pytest

from errors import UserError
from helper.tables.plan import Plan, read_variants
from models import build_model

SMALL, HEADLESS = "torchvision:shufflenet_v2_x0_5", "torchvision:squeezenet1_1"


@pytest.mark.parametrize("pair", [("resnet20", SMALL), (SMALL, "resnet8")], ids="->".join)
def test_a_method_that_cannot_train_a_foreign_network_is_named_with_its_reason(pair, tmp_path):
    made = Plan(str(tmp_path))
    jobs = made.jobs((pair,), read_variants("ofd; hint; kd"), 1)
    [(title, reason)] = made.inapplicable
    assert title == f"{' -> '.join(pair)}: ofd" and f"which {SMALL} does not show" in reason
    assert [job.config.distill for job in jobs] == ["ce", "ce", "hint", "kd"]


def test_a_foreign_network_that_cannot_be_split_is_refused_as_its_run_would_refuse_it(tmp_path):
    with pytest.raises(UserError) as of_run:
        build_model(HEADLESS, 10, 32)
    for pair in (("resnet20", HEADLESS), (HEADLESS, "resnet8")):
        with pytest.raises(UserError) as caught:
            Plan(str(tmp_path)).jobs((pair,), read_variants("kd"), 1)
        assert str(caught.value) == str(of_run.value) and HEADLESS in str(caught.value)


def test_a_published_foreign_teacher_sees_images_of_its_own_size_so_the_run_judges_it(tmp_path):
    made = Plan(str(tmp_path), "imagenet")
    jobs = made.jobs(((SMALL, "resnet18"),), read_variants("kd"), 1)
    assert not made.inapplicable and [job.config.distill for job in jobs] == ["ce", "kd"]
