"""Every setting that tells rows apart does so, and is seen in a table of one row."""

import json

import pytest

from distiller_zoo import DISTILLERS
from helper.settings import SETTINGS
from helper.tables import pages
from helper.tables.rows import flags_of, read_rows
from setting import Setting
from tests.run_folders import make_run

#: Of these a digest tells apart, and another setting or a column is seen.
BY_DIGEST = {"data", "path_t", "teacher_digest", "data_digest", "init_digest"}
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


@pytest.mark.parametrize("name", DISTILLERS)
def test_a_setting_makes_another_row_that_shows_it(name, tmp_path):
    base = make_run(tmp_path, name, 1, [50.0, 60.0], "resnet20" if DISTILLERS[name].reads_teacher else None)
    stored = json.loads((base / "config.json").read_text())
    common = SETTINGS if name == "norm" else ()
    for setting in (*common, *DISTILLERS[name].flags):
        if setting.tells_apart != "row" or setting.argument in {*BY_DIGEST, "distill"}:
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
