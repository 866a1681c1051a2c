"""Writes the tables of docs/benchmarks.md from the records in docs/benchmarks: `python scripts/benchmarks/tables.py`.

The page names a record file at each table: `<!-- step_cpu.json -->` ... `<!-- end -->`.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from errors import UserError, run_script
from helper.command_line import Parser
from helper.run_folder import write_text
from scripts import benchmark
from scripts.benchmarks import augmentation, estimate_imagenet, input, losses, memory, methods, overhead

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE, RECORDS = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks"
#: Which script's table shows a file, by the first word of its name.
TABLES = {
    "methods": methods.table,
    "cached": methods.cached_table,
    "losses": losses.table,
    "step": benchmark.table,
    "input": input.table,
    "augmentation": augmentation.table,
    "estimate": estimate_imagenet.table,
    "overhead": overhead.table,
    "memory": memory.table,
}
PLACE = re.compile(r"(<!-- ((\w+?)_\w+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str) -> str:
    """The page with its tables made anew; raises `UserError` where a record file is missing."""

    def make(place: re.Match) -> str:
        head, name, kind, end = place.groups()
        try:
            records = json.loads((RECORDS / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{RECORDS / name}: {error.strerror}; measure it with the command on the page") from None
        return f"{head}{TABLES[kind](records)}\n{end}"

    return PLACE.sub(make, page)


def main(argv=None) -> None:
    Parser.of_script(__doc__).parse_args(argv)
    write_text(PAGE, fill(PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    run_script(main)
