"""What differs between runs, and whether their accuracies differ beyond seed noise.

python scripts/compare.py RUN RUN ...

Runs that differ in nothing but trial and seed are one group. Every two groups are compared by Welch's t-test of each
accuracy (two-sided; scipy.stats.ttest_ind with unequal variances).
"""

import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import UserError, run_script, starting

with starting():
    from helper.command_line import Parser
    from helper.tables.pages import describe_left
    from helper.tables.rows import ACCURACIES, Row, differences, read_rows, shortened, spread, welch

#: Below this probability of so large a difference by seeds alone, accuracies are said to differ.
SIGNIFICANCE = 0.05
#: With fewer seeds on a side a difference has to be very large to show.
FEW_SEEDS = 3


def describe_teachers(rows: Sequence[Row]) -> list[str]:
    """Who taught every row: the file, and the digest of its weights."""
    named = [(row.config["path_t"], row.config["teacher_digest"]) for row in rows]
    return [f"{path or 'no teacher'}{f' (digest {shortened(digest)})' if digest else ''}" for path, digest in named]


def judge(first: list[float], second: list[float]) -> str:
    """What two groups of accuracies (%) say: the difference of their means, its p, and in words."""
    difference = statistics.mean(second) - statistics.mean(first)
    smallest, p = min(len(first), len(second)), welch(first, second)
    if smallest < 2:
        return f"{difference:+.2f}: one seed on a side, too few to tell it from seed noise"
    if p is None:
        return f"{difference:+.2f}: no spread on either side, so no test"
    verdict = "beyond seed noise" if p < SIGNIFICANCE else "not beyond seed noise"
    few = f" (only {smallest} seeds on a side)" if smallest < FEW_SEEDS else ""
    return f"{difference:+.2f}, p = {p:.3g}: {verdict}{few}"


def letters(count: int) -> list[str]:
    """A, B, ... Z, AA, AB, ..."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return ["".join(word) for length in (1, 2) for word in itertools.product(alphabet, repeat=length)][:count]


def main(argv=None) -> None:
    parser = Parser.of_script(__doc__)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN", help="run folders of both settings, of all seeds"
    )
    rows, left = read_rows(parser.parse_args(argv).folders)
    for one in left:
        print(describe_left(one), file=sys.stderr)
    if len(rows) == 1:
        raise UserError(
            f"RUN: the {len(rows[0].records)} runs differ in nothing but trial and seed; name runs of two settings"
        )
    names = letters(len(rows))
    for name, row in zip(names, rows, strict=True):
        seeds = ", ".join(str(record.config["seed"]) for record in row.records)
        print(f"{name}: {row.config['dataset']}, {row.pair}: {row.label}; {row.protocol}; seeds {seeds}")
        print("   " + ", ".join(f"{title} {spread(row.values(key))}" for key, title in ACCURACIES.items()))
    print("\nwhat differs:")
    for setting, values in differences(rows).items():
        is_teacher = setting == "teacher_digest"
        title, texts = ("teacher", describe_teachers(rows)) if is_teacher else (setting, list(map(str, values)))
        print(f"  {title:<18} {', '.join(f'{name} {text}' for name, text in zip(names, texts, strict=True))}")
    for (first, row), (second, other) in itertools.combinations(zip(names, rows, strict=True), 2):
        print(f"\n{second} - {first}:")
        for key, title in ACCURACIES.items():
            print(f"  {title:<18} {judge(row.values(key), other.values(key))}")


if __name__ == "__main__":
    run_script(main)
