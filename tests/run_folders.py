"""Run folders: made without training, for the tests of tables and comparisons, and read again."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from helper.command_line import resolve
from helper.tables.rows import Row, read_rows

#: What two runs that are alike may differ in.
CLOCKS = ("images_per_s", "data_wait_s", "compute_s")


def metrics(run: Path) -> list[dict]:
    """The records of a run's epochs."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def config_of(run: Path) -> dict:
    """What a run's config.json holds."""
    return json.loads((run / "config.json").read_text())


def new_run(main: Callable[[list[str]], object], save_dir: Path, *argv: str) -> Path | None:
    """Call a training script; returns the run folder that it makes, None where it makes none."""
    known = set(save_dir.iterdir()) if save_dir.exists() else set()
    main(["--save_dir", str(save_dir), *argv])
    return next(iter(set(save_dir.iterdir()) - known), None)


def load(path: Path) -> dict:
    """A checkpoint."""
    return torch.load(path, weights_only=True)


def same_state(a, b) -> bool:
    """Equality of nested dictionaries and lists of tensors and numbers, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same_state(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def state(run: Path, name: str = "last.pth") -> dict:
    """What only resuming needs of a run's checkpoint."""
    return load(run / name)["training"]


def weights(run: Path, name: str = "last.pth") -> dict:
    """The weights of a run's method: the student's and what it is trained with."""
    return state(run, name)["distiller"]


def without_clocks(record: dict) -> dict:
    """An epoch's record without what two runs that are alike may differ in."""
    return {key: value for key, value in record.items() if key not in CLOCKS}


def assert_same_end(whole: Path, other: Path) -> None:
    """Two runs have ended in the same weights, momentum and logged numbers, bit for bit."""
    assert same_state(load(whole / "last.pth")["model"], load(other / "last.pth")["model"])
    a, b = state(whole), state(other)
    for key in ("distiller", "optimizer", "epoch", "step"):
        assert same_state(a[key], b[key]), key
    assert list(map(without_clocks, a["records"])) == list(map(without_clocks, b["records"]))
    assert list(map(without_clocks, metrics(whole))) == list(map(without_clocks, metrics(other)))


def make_run(
    root: Path, distill: str, seed: int, curve: list[float], teacher: str | None = "resnet20", **flags
) -> Path:
    """A finished run with these test accuracies (%) after its epochs; `flags` are of the configuration."""
    given = {"distill": distill, "model_s": "resnet8", "trial": str(seed), "epochs": len(curve), **flags}
    of_teacher = {"path_t": "t.pth", "model_t": teacher, "teacher_digest": "0" * 64} if teacher else {}
    config = resolve(given, of_teacher=of_teacher)
    label = "".join(str(value) for value in flags.values())
    folder = root / f"{config.name}{label}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.as_json()))
    lines = [{"epoch": n, "test_accuracy": value, "images_per_s": 100.0} for n, value in enumerate(curve, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = {
        "accuracy_last": curve[-1],
        "accuracy_best": max(curve),
        "accuracy_mean_last_five": sum(curve[-5:]) / len(curve[-5:]),
        "best_epoch": curve.index(max(curve)) + 1,
        "epochs": len(curve),
        "seed": seed,
        "parameters": 78_042,
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def rows_of(runs: list[Path]) -> list[Row]:
    """The table's rows of run folders of which none is left out."""
    rows, left = read_rows(runs)
    assert not left
    return rows


def pretend(job, *files: str, **changed) -> Path:
    """A run folder of a plan's job: its settings, but for what is `changed`, and these files."""
    job.folder.mkdir(parents=True)
    (job.folder / "config.json").write_text(json.dumps(job.config.as_json() | changed))
    numbers = dict.fromkeys(("accuracy_last", "accuracy_best", "accuracy_mean_last_five"), 50.0)
    result = numbers | {"epochs": 1, "best_epoch": 1, "parameters": 1}
    for name in files:
        (job.folder / name).write_text(json.dumps(result) if name == "result.json" else "")
    return job.folder
