"""What differs between runs, and whether their accuracies differ beyond seed noise.

python scripts/compare.py RUN RUN ...

Runs that differ in nothing but trial and seed are one group. Every two groups are compared by Welch's t-test of each
accuracy (two-sided; scipy.stats.ttest_ind with unequal variances).
"""

import itertools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helper.options import Parser

from errors import UserError, run_script
from helper.tables import ACCURACIES, SAME_ROW, Row, read_rows, spread

#: Below this probability of so large a difference by seeds alone, accuracies are said to differ.
SIGNIFICANCE = 0.05
#: With fewer seeds on a side a difference has to be very large to show.
FEW_SEEDS = 3


def differences(rows: list[Row]) -> dict[str, list]:
    """Setting -> its value in every group, for those that are not the same in all; None where it does not exist."""
    names = dict.fromkeys(name for row in rows for name in row.config if name not in SAME_ROW)
    values = {name: [row.config.get(name) for row in rows] for name in names}
    return {name: of_rows for name, of_rows in values.items() if any(value != of_rows[0] for value in of_rows)}


def judge(first: list[float], second: list[float]) -> str:
    """What two groups of accuracies (%) say: the difference of their means, its p, and in words."""
    from scipy.stats import ttest_ind

    difference = statistics.mean(second) - statistics.mean(first)
    smallest = min(len(first), len(second))
    if smallest < 2:
        return f"{difference:+.2f}: one seed on a side, too few to tell it from seed noise"
    if statistics.pstdev(first) == statistics.pstdev(second) == 0:
        return f"{difference:+.2f}: no spread on either side, so no test"
    p = float(ttest_ind(second, first, equal_var=False).pvalue)
    verdict = "beyond seed noise" if p < SIGNIFICANCE else "not beyond seed noise"
    few = f" (only {smallest} seeds on a side)" if smallest < FEW_SEEDS else ""
    return f"{difference:+.2f}, p = {p:.3g}: {verdict}{few}"


def letters(count: int) -> list[str]:
    """A, B, ... Z, AA, AB, ..."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return ["".join(word) for length in (1, 2) for word in itertools.product(alphabet, repeat=length)][:count]


def main(argv=None) -> None:
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN")
    rows, unfinished = read_rows(parser.parse_args(argv).folders)
    for folder in unfinished:
        print(f"{folder}: not finished, left out", file=sys.stderr)
    if len(rows) == 1:
        raise UserError(
            f"RUN: the {len(rows[0].folders)} runs differ in nothing but trial and seed; name runs of two settings"
        )
    names = letters(len(rows))
    for name, row in zip(names, rows, strict=True):
        seeds = ", ".join(str(result["seed"]) for result in row.results)
        print(f"{name}: {row.config['dataset']}, {row.pair}: {row.label}; {row.protocol}; seeds {seeds}")
        print("   " + ", ".join(f"{title} {spread(row.values(key))}" for key, title in ACCURACIES.items()))
    print("\nwhat differs:")
    for setting, values in differences(rows).items():
        print(f"  {setting:<18} {', '.join(f'{name} {value}' for name, value in zip(names, values, strict=True))}")
    for (first, row), (second, other) in itertools.combinations(zip(names, rows, strict=True), 2):
        print(f"\n{second} - {first}:")
        for key, title in ACCURACIES.items():
            print(f"  {title:<18} {judge(row.values(key), other.values(key))}")


if __name__ == "__main__":
    run_script(main)
