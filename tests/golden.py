"""Check this implementation against a folder of golden numbers: `python tests/golden.py --dir DIR`.

A file is read by its sections, whatever its name. Every file gives one summary line; the exit code is 1 as soon as a
family differs, or holds something that cannot be read. The format is described in the folder's own README;
golden_format.py regenerates the inputs. `--table` writes docs/methods.md.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import golden_facts, golden_losses, golden_models, golden_steps, golden_table, golden_zoo
from tests.golden_case import Difference
from tests.golden_format import Family, Mismatch

#: Section of a file -> its families, from the whole file and its path.
SECTIONS: dict[str, Callable[[dict, Path], Iterator[Family]]] = {
    "models": golden_models.families,
    "losses": golden_losses.families,
    "pairs": golden_steps.pair_families,
    "unit": golden_steps.unit_families,
    "schedules": golden_facts.schedule_families,
    "cases": golden_zoo.families,
    "recipes": golden_facts.recipe_families,
    "initialisation": golden_facts.initialisation_families,
}
#: Sections that hold text for people.
PROSE = ("meta", "notes", "about", "how", "references")


class Result(NamedTuple):
    """What the check of a file has given."""

    passed: int
    failures: list[str]
    differences: list[Difference]


def check_file(path: Path, content: dict) -> Result:
    """Run every family of a file and print a summary line."""
    passed, failures, differences = 0, [], []
    for name, check in _families(content, path):
        try:
            found = check()
            passed += 1
            if isinstance(found, Difference):
                differences.append(found)
        except Mismatch as error:
            failures.append(f"{name}: {error}")
        except Exception as error:  # whatever stops one family, the others are still checked
            failures.append(f"{name}: cannot be read ({type(error).__name__}: {error})".replace("\n", " "))
    print(f"{path.name}: {passed} families agree" + (f", {len(failures)} DIFFER" if failures else ""), flush=True)
    for failure in failures:
        print(f"  {failure}", flush=True)
    return Result(passed, failures, differences)


def _families(content: dict, path: Path) -> Iterator[Family]:
    """The families of every section; a section that nothing here can read is a family that fails."""
    for section in content:
        if section in PROSE:
            continue
        try:
            yield from SECTIONS[section](content, path)
        except Exception as error:
            reason = "nothing checks it" if section not in SECTIONS else f"{type(error).__name__}: {error}"
            yield f"section {section}", _failure(reason)


def _failure(reason: str) -> Callable[[], None]:
    def fail() -> None:
        raise Mismatch(reason)

    return fail


def _read(path: Path) -> dict:
    """The content of a file; {} where it holds no golden numbers."""
    content = json.loads(path.read_text())
    return content if isinstance(content, dict) and set(content) & set(SECTIONS) else {}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", required=True, type=Path, help="folder with golden files")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the methods' tables there (docs/methods.md)")
    args = parser.parse_args(argv)
    contents = {path: _read(path) for path in sorted(args.dir.glob("*.json"))} if args.dir.is_dir() else {}
    if not any(contents.values()):
        print(f"error: --dir: no file of {args.dir} has a section {', '.join(SECTIONS)}", file=sys.stderr)
        return 2
    results = []
    for path, content in contents.items():
        if content:
            results.append(check_file(path, content))
        else:
            print(f"{path.name}: no golden numbers")
    if args.table:
        found = [difference for result in results for difference in result.differences]
        args.table.write_text(golden_table.document(found))
    return int(any(result.failures for result in results))


if __name__ == "__main__":
    sys.exit(main())
