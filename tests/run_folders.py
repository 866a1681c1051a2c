"""Run folders as runs leave them, made without training, for the tests of tables and comparisons."""

import json
from pathlib import Path

from helper.configuration import foresee, run_name
from helper.teacher import TeacherFile


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
