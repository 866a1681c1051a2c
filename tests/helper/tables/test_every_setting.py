"""Every setting that tells rows apart does so, and is seen in a table of one row; one without effect does neither."""

import json

import pytest

from distiller_zoo import DISTILLERS
from helper.settings import SETTINGS, settings_of
from helper.tables import pages
from helper.tables.rows import flags_of, read_rows
from setting import Setting
from tests.run_folders import make_run

#: Of these a digest tells apart, and another setting or a column is seen.
BY_DIGEST = {"data", "path_t", "teacher_digest", "data_digest", "init_digest"}
OF_FOLDERS = ("split", "background")
TEXTS = ("0.25", "3", "7", "2,5", "a", "0.5,0.5", "9,9,9", "resnet14", "16", "imagenet")
FOUND = {"images_per_pass": 16}


def another(setting: Setting, value):
    """A value that the setting may have, other than this one."""
    if setting.argument in FOUND:
        return FOUND[setting.argument]
    candidates = [not value] if setting.type is bool else [*(setting.choices or TEXTS)]
    for candidate in candidates:
        try:
            if (read := setting.read(candidate)) != value:
                return read
        except ValueError:
            pass
    raise AssertionError(f"no other value for {setting.argument}")


def all_terms(name: str) -> dict[str, float]:
    """A weight for every term of a method, so that all of its flags have an effect."""
    return {flag.argument: 1.0 for flag in DISTILLERS[name].flags if flag.is_weight}


@pytest.mark.parametrize("name", DISTILLERS)
def test_a_setting_makes_another_row_that_shows_it(name, tmp_path):
    teacher = "resnet20" if DISTILLERS[name].reads_teacher else None
    base = make_run(tmp_path, name, 1, [50.0, 60.0], teacher, **all_terms(name))
    stored = json.loads((base / "config.json").read_text())
    common = SETTINGS if name == "norm" else ()
    for setting in (*common, *DISTILLERS[name].flags):
        if setting.tells_apart != "row" or setting.argument in {*BY_DIGEST, *OF_FOLDERS, "distill"}:
            continue
        other = make_run(tmp_path / setting.argument, name, 1, [50.0, 60.0])
        changed = stored | {setting.argument: another(setting, stored.get(setting.argument))}
        (other / "config.json").write_text(json.dumps(changed))
        rows, left = read_rows([base, other])
        first, second, *_ = pages.make_table(rows).splitlines()[2:]
        assert len(rows) == 2 and not left and first != second, setting.argument
        alone = [row for [row], _ in map(read_rows, ([base], [other]))]
        seen = [(row.pair, row.setting, row.label, flags_of(row.records[0])) for row in alone]
        assert seen[0] != seen[1], setting.argument


UNUSED = [
    ("norm", {"lr_decay": "cos"}, ("lr_decay_epochs", "lr_decay_rate")),
    ("norm", {"optimizer": "adamw"}, ("momentum", "nesterov", "drop_momentum")),
    ("norm", {}, (*OF_FOLDERS, "kd_T")),
    ("kd", {"alpha": 0.0}, ("kd_T", "logit_standardization")),
    ("rkd", {"beta": 0.0}, ("distance_weight", "angle_weight")),
    ("distpro", {"distpro_style": "constant"}, ("init_epochs", "distpro_search_style")),
    ("sskd", {"ss_weight": 0.0}, ("ss_T", "ratio_ss", "init_epochs", "init_milestones")),
]


@pytest.mark.parametrize(("name", "given", "unused"), UNUSED, ids=lambda value: str(value)[:20])
def test_a_setting_that_another_leaves_unused_makes_no_row_and_is_not_shown(name, given, unused, tmp_path):
    base = make_run(tmp_path, name, 1, [50.0, 60.0], **given)
    for argument in unused:
        other, setting = make_run(tmp_path / argument, name, 2, [55.0, 60.0], **given), settings_of(name)[argument]
        stored = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(stored | {argument: another(setting, stored.get(argument))}))
        [row], [alone] = (read_rows(runs)[0] for runs in ([base, other], [other]))
        assert len(row.records) == 2 and alone.label == row.label, argument
        assert not any(flag.startswith(setting.names[0]) for flag in flags_of(alone.records[0])), argument
