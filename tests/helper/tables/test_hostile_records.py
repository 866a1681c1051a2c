"""Damaged and hostile records: never a traceback, the bad folder is named, the others are tabulated."""

import json
import os
import random
from pathlib import Path

import pytest

from errors import UserError
from helper.tables import figures, jobs, pages
from helper.tables.plan import Plan, read_variants
from helper.tables.rows import differences, read_rows
from scripts import compare
from tests.run_folders import make_run

NAMES = ("config.json", "result.json", "metrics.jsonl", "fidelity.json")
#: What an entry may be that no run has written.
STRANGE = (None, True, -1, 0, 1e308, 10**30, float("nan"), float("inf"), "", "x" * 300, "a|b\n=1", "\0", "$_^{", [], {})
STRANGE += ([None], [[1]], {"a": 1}, "-5", "1e999", "../..", "timm:", "torchvision:nonesuch", 2**63, 0.5, [1, "a"])


def damage(path: Path, random_: random.Random) -> None:
    """Change a record as a fault or an enemy might."""
    content = path.read_bytes()
    kind = random_.randrange(6)
    if kind == 0:
        path.write_bytes(content[: random_.randrange(len(content))])
    elif kind == 1:
        place = random_.randrange(len(content))
        path.write_bytes(content[:place] + bytes([random_.randrange(256)]) + content[place + 1 :])
    elif kind == 2:
        path.write_bytes(random_.choice([b"", b"\xff\xfe", b"[" * 50_000, b"1" * 6000, b"null", b"[]", b"{}", b'"x"']))
    else:
        lines = content.decode().splitlines() if path.suffix == ".jsonl" else [content.decode()]
        number = random_.randrange(len(lines))
        record = json.loads(lines[number])
        for name in random_.sample(sorted(record), min(len(record), random_.choice([1, 1, 2, 5]))):
            if random_.random() < 0.2:
                del record[name]
            else:
                record[name] = random_.choice(STRANGE)
        lines[number] = json.dumps(record)
        path.write_text("\n".join(lines))


def everything(root: Path) -> int:
    """Whatever reads records: returns how many runs were tabulated."""
    rows, left = read_rows([root])
    for make in (pages.make_report, pages.make_grid_report, pages.make_comparison, pages.make_overview, pages.as_csv):
        text = make(rows)
        text.encode("utf-8", "backslashreplace")
    differences(rows)
    for one in left:
        assert "\n" not in pages.describe_left(one)
    jobs.Speeds(str(root))
    return sum(len(row.records) for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 20))])
def test_no_damaged_record_ends_a_report(part, tmp_path, monkeypatch):
    random_ = random.Random(part)
    good = make_run(tmp_path / "save", "kd", 1, [50.0, 60.0])
    bad = make_run(tmp_path / "save", "norm", 1, [50.0, 61.0], co_sponge=4)
    result = json.loads((bad / "result.json").read_text()) | {"digest": "1", "test_images": 9, "test_unreadable": 0}
    (bad / "result.json").write_text(json.dumps(result))
    (bad / "fidelity.json").write_text(
        json.dumps({"agreement": 50.0, "kl": 0.5, "cka": 0.5, "teacher": {"digest": "1"}})
    )
    originals = {name: (bad / name).read_bytes() for name in NAMES}
    for number in range(100):
        for name, content in originals.items():
            (bad / name).write_bytes(content)
        damage(bad / random_.choice(NAMES), random_)
        assert everything(tmp_path / "save") >= 1, good
        if number % 25 == 0:  # slow
            rows, _ = read_rows([tmp_path / "save"])
            assert pages.as_html(rows, {}) and figures.of_rows(rows)
            try:
                compare.main([str(good), str(bad)])
            except UserError as error:
                assert "RUN" in str(error)
            Plan(str(tmp_path / "save")).jobs((("resnet20", "resnet8"),), read_variants("kd"), 1)


def test_a_record_that_would_be_waited_for_is_left_out(tmp_path):
    runs = [make_run(tmp_path, "kd", seed, [50.0]) for seed in (1, 2)]
    (runs[0] / "metrics.jsonl").unlink()
    os.mkfifo(runs[0] / "metrics.jsonl")
    [row], [left] = read_rows(runs)
    assert len(row.records) == 1 and left.folder == runs[0]
