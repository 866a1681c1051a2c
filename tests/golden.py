"""Check this implementation against a folder of golden numbers: `python tests/golden.py --dir DIR`.

Every file gives one summary line; the exit code is 1 as soon as a family differs. The format is described in the
folder's own README; golden_format.py regenerates the inputs.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import golden_losses, golden_models, golden_norm
from tests.golden_format import Mismatch

Family = tuple[str, Callable[[], None] | None]  # name, its check; None: the loss is not implemented yet

FILES: dict[str, Callable[[dict, Path], Iterator[Family]]] = {
    "models_cifar.json": golden_models.cifar_families,
    "students_norm_cifar.json": golden_norm.student_families,
    "norm_step.json": golden_norm.step_families,
    "imagenet.json": golden_models.imagenet_families,
    "losses.json": golden_losses.families,
}
#: Files of a golden folder that hold no golden numbers of their own.
BESIDE = ("timing_cpu.json",)


def check_file(path: Path) -> list[str]:
    """Print a summary line for one file; returns the failures."""
    passed, missing, failures = 0, [], []
    for name, check in FILES[path.name](json.loads(path.read_text()), path.parent):
        if check is None:
            missing.append(name)
            continue
        try:
            check()
            passed += 1
        except Mismatch as error:
            failures.append(f"{name}: {error}")
    parts = [f"{passed} families agree"]
    parts += [f"{len(failures)} DIFFER"] if failures else []
    parts += [f"{len(missing)} not implemented yet ({', '.join(missing)})"] if missing else []
    print(f"{path.name}: {', '.join(parts)}", flush=True)
    for failure in failures:
        print(f"  {failure}", flush=True)
    return failures


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", required=True, type=Path, help="folder with golden files")
    folder = parser.parse_args(argv).dir
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not any(path.name in FILES for path in files):
        print(f"error: --dir: {folder} holds none of {', '.join(FILES)}", file=sys.stderr)
        return 2
    failed = False
    for path in files:
        if path.name in FILES:
            failed |= bool(check_file(path))
        elif path.name not in BESIDE:
            print(f"{path.name}: not a golden file that is known here")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
