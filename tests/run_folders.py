"""Run folders: made without training, for the tests of tables and comparisons, and read again."""

import json
from pathlib import Path

import torch
from helper.configuration import foresee, run_name
from helper.teacher import TeacherFile

#: What two runs that are alike may differ in.
CLOCKS = ("images_per_s", "data_wait_s", "compute_s")


def metrics(run: Path) -> list[dict]:
    """The records of a run's epochs."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


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


def assert_same_end(whole: Path, other: Path) -> None:
    """Two runs have ended in the same weights, momentum and logged numbers, bit for bit."""
    a, b = load(whole / "last.pth"), load(other / "last.pth")
    for key in ("distiller", "optimizer", "epoch", "step", "accuracies"):
        assert same_state(a[key], b[key]), key
    for ours, theirs in zip(metrics(whole), metrics(other), strict=True):
        assert all(ours[key] == theirs[key] for key in ours if key not in CLOCKS)


def make_run(
    root: Path, distill: str, seed: int, curve: list[float], teacher: str | None = "resnet20", **flags
) -> Path:
    """A finished run of so many epochs with this test accuracy (%) after each; `flags` are of the configuration."""
    given = {"distill": distill, "model_s": "resnet8", "trial": str(seed), "epochs": len(curve), **flags}
    file = TeacherFile("t.pth", teacher, None, 0, given.get("dataset", "digits"), None, 32, None) if teacher else None
    config = foresee(given, file)
    label = "".join(str(value) for value in flags.values())
    folder = root / f"{run_name(config)}{label}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(vars(config)))
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
