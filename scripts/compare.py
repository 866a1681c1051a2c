"""What differs between runs, and whether their accuracies differ beyond seed noise.

python scripts/compare.py RUN RUN ...

Runs that differ in nothing but trial and seed are one group. Every two groups are compared by Welch's t-test of each
accuracy (two-sided; scipy.stats.ttest_ind with unequal variances); of more than three groups each is compared with the
student alone and with KD of its student, its teacher and its number of epochs, of several with the one of the most
settings in common, or else with the first group there.
"""

import itertools
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import UserError, count_of, run_script, starting

with starting():
    from helper.command_line import Parser
    from helper.tables.pages import REFERENCES, describe_left
    from helper.tables.records import ACCURACIES
    from helper.tables.rows import (
        Row,
        describe_lead,
        differences,
        notes_of,
        read_rows,
        references_of,
        shortened,
        spread,
        welch,
    )
    from setting import as_text

#: Below this probability of so large a difference by seeds alone, accuracies are said to differ.
SIGNIFICANCE = 0.05
#: With fewer seeds on a side a difference has to be very large to show.
FEW_SEEDS = 3
#: More groups are not compared with each other, but with the references among them.
FEW_GROUPS = 3


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


def judge_briefly(first: list[float], second: list[float]) -> str:
    """The same for a cell of a table; a star where the difference is beyond seed noise."""
    p = welch(first, second)
    return f"{describe_lead(first, second, p)}{' *' if p is not None and p < SIGNIFICANCE else ''}"


def letters(count: int) -> list[str]:
    """A, B, ... Z, AA, AB, ..."""
    words = (word for length in itertools.count(1) for word in itertools.product(ascii_uppercase, repeat=length))
    return ["".join(word) for word in itertools.islice(words, count)]


def in_short(chosen: Sequence[str], names: Sequence[str]) -> str:
    """Some of the groups' names; three and more that follow each other by the first and the last: A C-F."""
    places = itertools.groupby(enumerate(map(names.index, chosen)), key=lambda one: one[1] - one[0])
    runs = [[names[place] for _, place in run] for _, run in places]
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(run) for run in runs)


def show_differences(named: Mapping[str, Row]) -> None:
    """Print the settings that are not the same in all groups; of many groups every value once."""
    print("\nwhat differs:" if len(named) <= FEW_GROUPS else "\nwhat differs (- in groups that are not named):")
    for setting, values in differences(list(named.values())).items():
        is_teacher = setting == "teacher_digest"
        title, texts = ("teacher", describe_teachers(list(named.values()))) if is_teacher else (setting, values)
        if len(named) <= FEW_GROUPS:
            told = [f"{name} {text}" for name, text in zip(named, texts, strict=True)]
        else:
            groups = defaultdict(list)
            for name, text in zip(named, texts, strict=True):
                if text is not None:
                    groups[as_text(text)].append(name)
            told = [f"{text} ({in_short(names, list(named))})" for text, names in groups.items()]
        print(f"  {title:<22} {', '.join(told)}")


def compare_all(named: Mapping[str, Row]) -> None:
    """Print every two groups, an accuracy on each line."""
    for (first, row), (second, other) in itertools.combinations(named.items(), 2):
        print(f"\n{second} - {first}:")
        for key, title in ACCURACIES.items():
            print(f"  {title:<18} {judge(row.values(key), other.values(key))}")


def compare_with_references(named: Mapping[str, Row]) -> None:
    """Print a table for every reference, a group on each line; without one of a student, data set, number of epochs and
    protocol for its first group."""
    kinds = defaultdict(dict)
    for name, row in named.items():
        kinds[row.config["model_s"], row.setting][name] = row
    count, width = 0, max(len(f"{name} {row.label}") for name, row in named.items())
    compared = set()
    for groups in kinds.values():
        found, names = defaultdict(list), {id(row): name for name, row in groups.items()}
        for (name, row), method in itertools.product(groups.items(), REFERENCES):
            for one in references_of(row, list(groups.values()), method):
                if one is not row:
                    found[names[id(one)]].append(name)
        first, *rest = groups
        if not found and rest:
            found[first] = rest
        for reference in (name for name in groups if name in found):
            of_reference, others = groups[reference], found[reference]
            against = f"against {reference} {of_reference.label}"
            print(f"\n{against:<{width + 3}} {' '.join(f'{title:<21}' for title in ACCURACIES.values())}".rstrip())
            for name in others:
                row = groups[name]
                pairs = [(of_reference.values(key), row.values(key)) for key in ACCURACIES]
                line = f"  {name + ' ' + row.label:<{width}}  {' '.join(f'{judge_briefly(*p):<21}' for p in pairs)}"
                print(line.rstrip())
            count += len(others)
            compared |= {reference, *others}
    alone = [name for name in named if name not in compared]
    print(
        f"\n*: beyond seed noise, p < {SIGNIFICANCE}; by chance alone that is one in {round(1 / SIGNIFICANCE)}, and "
        f"these are {count} comparisons; no test: one seed, or no spread"
    )
    if alone:
        why = "another student, teacher, data set, epochs or protocol, or a reference of none"
        print(f"compared with none ({why}): {' '.join(alone)}")
    print(f"name the runs of {FEW_GROUPS} settings or fewer to compare every two of them")


def main(argv=None) -> None:
    parser = Parser.of_script(__doc__, paragraphs=3)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN", help="run folders of both settings, of all seeds"
    )
    rows, left = read_rows(parser.parse_args(argv).folders)
    for one in left:
        print(describe_left(one), file=sys.stderr)
    if len(rows) == 1:
        runs = count_of(len(rows[0].records), "run")
        raise UserError(f"RUN: {runs} of one setting (trial and seed do not count); name runs of two settings")
    named = dict(zip(letters(len(rows)), rows, strict=True))
    for name, row in named.items():
        seeds = ", ".join(str(record.config["seed"]) for record in row.records)
        print(f"{name}: {row.dataset}, {row.pair}: {row.label}; {row.protocol}; seeds {seeds}")
        print("   " + ", ".join(f"{title} {spread(row.values(key))}" for key, title in ACCURACIES.items()))
    if notes := notes_of(rows):
        print(notes)
    show_differences(named)
    (compare_all if len(rows) <= FEW_GROUPS else compare_with_references)(named)


if __name__ == "__main__":
    run_script(main)
