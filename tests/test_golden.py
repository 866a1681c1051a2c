"""The golden folder, and that its checker can fail."""

import json
import shutil

import pytest

from tests import golden
from tests.conftest import SHARED

GOLDEN = SHARED / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden numbers at {GOLDEN}")


@needs_golden
@pytest.mark.parametrize("name", golden.FILES)
def test_this_implementation_gives_the_golden_numbers(name, tmp_path):
    for path in GOLDEN.glob(f"{name.removesuffix('.json')}.*"):
        shutil.copy(path, tmp_path)
    assert golden.main(["--dir", str(tmp_path)]) == 0


@needs_golden
@pytest.mark.parametrize("change", ["number", "key"])
def test_a_changed_number_or_an_unknown_key_is_noticed(change, tmp_path, capsys):
    content = json.loads((GOLDEN / "losses.json").read_text())
    entry = content["losses"]["DistillKL"]["T4"]["0"]
    if change == "number":
        entry["grad_first5_student"]["logit_s"][3] *= 1 + 1e-6
    else:
        entry["new_quantity"] = 1.0
    content["losses"] = {"DistillKL": content["losses"]["DistillKL"]}
    (tmp_path / "losses.json").write_text(json.dumps(content))
    assert golden.main(["--dir", str(tmp_path)]) == 1
    assert "1 DIFFER" in capsys.readouterr().out


def test_a_folder_without_golden_files_is_an_error(tmp_path):
    assert golden.main(["--dir", str(tmp_path)]) == 2
