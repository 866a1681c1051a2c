"""Rows on pages: Markdown lists and grids like the paper's, CSV, and one HTML page with everything."""

import csv
import io
import itertools
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from errors import UserError, count_of
from helper.distributed import is_main
from helper.run_folder import write_text
from helper.tables import figures
from helper.tables.records import ACCURACIES, FIDELITIES, HELD_OUT, Record
from helper.tables.rows import (
    Left,
    Row,
    describe_lead,
    differing_flags,
    flags_of,
    note_of_other_teachers,
    note_of_references,
    note_of_shared_order,
    notes_of,
    read_rows,
    references_of,
    spread,
    welch,
)
from models import build_model
from models.cost import measure_latency

NOT_RUN, ALONE = "not run", "student alone"
#: The columns of lists; those that say nothing of any row are left out.
HEADER = (
    "data set",
    "teacher",
    "student",
    "method",
    "epochs",
    "held out, last",
    *ACCURACIES.values(),
    "seeds",
    "protocol",
    "unreadable test images",
    "paper",
    "ours is",
)
NOTE = (
    "Test accuracy in percent, mean ± standard deviation over seeds. Best: the epoch chosen as the protocol says; "
    "chosen on the\ntest images it is optimistically biased."
)
#: The methods that `make_comparison` compares every row with.
REFERENCES = ("ce", "kd")
COMPARISON_NOTE = (
    "Test accuracy in percent after the last epoch, mean ± standard deviation over seeds; the difference from the "
    "student\nalone and from KD, with p of Welch's t-test (two-sided)."
)
SETTINGS = "Row by row, the settings were:"
#: With these a spreadsheet would take a cell for a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
TEMPLATE = "report.html.j2"


def write_page(path: Path, text: str) -> None:
    """Write a text file for people, and say so; raises `UserError` where that is impossible."""
    write_text(path, text, errors="backslashreplace")  # a file's name may be anything
    print(f"written: {path}")


# Markdown.


def in_markdown(text: str) -> str:
    """A text as a table's cell: a bar would begin the next one, a new line end the table."""
    return re.sub(r"(\\*)\|", r"\1\1\\|", " ".join(text.split()))


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Header and rows of cells as Markdown."""
    marked = [lines[0], ["--"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(map(in_markdown, cells))} |" for cells in marked)


def list_cells(row: Row) -> list[str]:
    """A row's cells under `HEADER`."""
    config, paper = row.config, row.published
    names = [row.dataset, row.teacher or "-", config["model_s"], row.label, row.trained]
    accuracies = [spread(row.values(name)) for name in ACCURACIES]
    published = ["-", "-"] if paper is None else [f"{paper.accuracy:.2f}", row.verdict]
    return [*names, row.held_out, *accuracies, str(len(row.records)), row.protocol, row.unreadable, *published]


def make_table(rows: Sequence[Row]) -> str:
    """One line per row; columns that say nothing of any row are left out."""
    columns = zip(HEADER, *map(list_cells, rows), strict=True)
    return markdown_table(list(zip(*(column for column in columns if set(column[1:]) != {"-"}), strict=True)))


def make_comparison(rows: Sequence[Row]) -> str:
    """One line per row: its last accuracy, its lead on the baseline and on KD of its student, and its fidelity."""
    fidelities = {
        name: title for name, (title, _, _) in FIDELITIES.items() if any(row.fidelity(name) != "-" for row in rows)
    }
    columns = {"data set": [row.dataset for row in rows], "teacher": [row.teacher or "-" for row in rows]}
    several = {title: texts for title, texts in columns.items() if len({*texts} - {"-"}) > 1}
    header = ["student", "method", "seeds", ACCURACIES["accuracy_last"], *(f"against {one}" for one in REFERENCES)]
    lines = [[*several, *header, *fidelities.values()]]
    for row, *texts in zip(rows, *several.values(), strict=True):
        against = [_lead(row, references_of(row, rows, name)) for name in REFERENCES]
        of_row = [*texts, row.config["model_s"], row.label]
        accuracy, measured = spread(row.values("accuracy_last")), map(row.fidelity, fidelities)
        lines.append([*of_row, str(len(row.records)), accuracy, *against, *measured])
    more = (note_of_references(rows, REFERENCES), note_of_other_teachers(rows), note_of_shared_order(rows))
    note = " ".join(filter(None, (COMPARISON_NOTE, *more, SETTINGS)))
    return f"{markdown_table(lines)}\n\n{note}\n\n{_commands(rows)}\n"


def _lead(row: Row, references: Sequence[Row]) -> str:
    """By how many points a row's last accuracy is above that of its reference, and p of Welch's t-test."""
    if len(references) != 1 or references[0] is row:
        return "-"
    first, second = references[0].values("accuracy_last"), row.values("accuracy_last")
    return describe_lead(first, second, welch(first, second))


def make_report(rows: Sequence[Row]) -> str:
    """The table and the rows' settings as Markdown."""
    return f"{make_table(rows)}\n\n{_note(rows)} {SETTINGS}\n\n{_commands(rows)}\n"


def _note(rows: Sequence[Row]) -> str:
    """What the accuracies of these rows are."""
    return " ".join(filter(None, (NOTE, notes_of(rows))))


def _commands(rows: Sequence[Row]) -> str:
    """The settings of every row as an indented line; what all of several rows share is said once, in front."""
    commands = [flags_of(row.records[0]) for row in rows]
    shared = [flag for flag in commands[0][1:] if len(rows) > 1 and all(flag in command for command in commands)]
    lines = [f"all rows: {' '.join(shared)}"] if shared else []
    lines += [" ".join(flag for flag in command if flag not in shared) for command in commands]
    return "\n".join(f"    {line}" for line in lines)


def summary(folders: Iterable[Path]) -> str:
    """The table of a few run folders, as a sweep ends with; empty where none of them is finished."""
    try:
        rows, left = read_rows(folders)
    except UserError:
        return ""
    notes = notes_of(rows)
    return "\n".join([make_table(rows), *([f"\n{notes}"] if notes else []), *map(describe_left, left)])


def show_table(folders: Iterable[Path]) -> None:
    """Print the table of the runs of a sweep; of several processes the main one does."""
    if is_main():
        print(f"\n{summary(folders)}")


def describe_left(left: Left) -> str:
    """A line on a folder that is in no table."""
    return f"{left.folder}: {left.reason}; left out"


# Grids.


class Grid(NamedTuple):
    """A table like the paper's, of one setting: rows methods, columns pairs; no cell where nothing was run."""

    setting: tuple[str, int, str]
    pairs: list[str]
    methods: list[str]
    cells: dict[tuple[str, str], Row]


def make_grids(rows: Sequence[Row]) -> list[Grid]:
    """One grid per data set, number of epochs and protocol that has a distilled row."""
    settings = dict.fromkeys(row.setting for row in rows if row.config["model_t"])
    return [_make_grid(rows, setting) for setting in settings]


def _make_grid(rows: Sequence[Row], setting: tuple[str, int, str]) -> Grid:
    """Teachers, students alone, then methods; what has no teacher is in every column of its network."""
    of_setting = [row for row in rows if row.setting == setting]
    pairs = list(dict.fromkeys(row.pair for row in of_setting if row.config["model_t"]))
    teachers, alone, distilled = {}, {}, {}
    for pair in pairs:
        teachers |= {(label, pair): row for label, row in _teachers(rows, pair, setting)}
        for row in of_setting:
            if row.pair == pair:
                distilled[row.label, pair] = row
            elif not row.config["model_t"] and row.config["model_s"] == pair.split(" -> ")[1]:
                is_baseline = row.config["distill"] == "ce"
                label = f"{ALONE}{row.label.removeprefix('ce')}" if is_baseline else row.label
                (alone if is_baseline else distilled).setdefault((label, pair), row)
    cells = teachers | alone | distilled
    return Grid(setting, pairs, list(dict.fromkeys(label for label, _ in cells)), cells)


def _teachers(rows: Sequence[Row], pair: str, setting: tuple) -> list[tuple[str, Row]]:
    """(label, row) of the runs that taught a pair; where no run says which those were, of every row that may have.

    A teacher may have been trained for longer, so its setting may be another.
    """
    taught = [row.config for row in rows if row.pair == pair and row.setting == setting]
    names = taught[0]["model_t"].split(",")  # of several teachers each
    alone = [row for row in rows if not row.config["model_t"] and row.dataset == setting[0]]
    alone = [row for row in alone if row.config["model_s"] in names and row.config["distill"] == "ce"]
    digests = {config["teacher_digest"] for config in taught}
    sources = [source for config in taught for source in (config.get("path_t") or "").split(",")]
    folders = {Path(source).parent.name for source in sources}  # they may have been moved here from another machine
    chosen = (
        _with_records(alone, lambda record: str(record.result.get("digest")) in digests)
        or _with_records(alone, lambda record: record.folder.name in folders)
        or alone
    )
    return [(f"teacher {text}".strip(), row) for row, text in zip(chosen, differing_flags(chosen), strict=True)]


def _with_records(rows: Sequence[Row], fits: Callable[[Record], bool]) -> list[Row]:
    """The rows with those of their records that fit; without rows that have none."""
    found = [row._replace(records=[record for record in row.records if fits(record)]) for row in rows]
    return [row for row in found if row.records]


def cell_lines(row: Row | None) -> list[str]:
    """What a cell of a grid says, line by line."""
    if row is None:
        return [NOT_RUN]
    seeds = len(row.records)
    lines = [f"{title} {spread(row.values(name))}" for name, title in ACCURACIES.items()]
    lines.append(count_of(seeds, "seed"))
    if row.published is not None:
        lines.append(f"paper {row.published.accuracy:.2f}: {row.verdict}")
    return lines


def title_of(setting: tuple[str, int, str]) -> str:
    """Data set, epochs and protocol of a table."""
    dataset, epochs, protocol = setting
    return f"{dataset}, {count_of(epochs, 'epoch')}; {protocol}"


def grid_markdown(grid: Grid) -> str:
    """The grid with every accuracy in its cells."""
    lines = [["", *grid.pairs]]
    for method in grid.methods:
        lines.append([method, *("<br>".join(cell_lines(grid.cells.get((method, pair)))) for pair in grid.pairs)])
    return f"**{title_of(grid.setting)}**\n\n{markdown_table(lines)}"


def make_overview(rows: Sequence[Row]) -> str:
    """Methods as rows, the pairs of all data sets, numbers of epochs and protocols as columns: the last accuracy
    alone."""
    columns = [(grid, pair) for grid in make_grids(rows) for pair in grid.pairs]
    lines = [["", *(f"{pair}, {count_of(grid.setting[1], 'epoch')}" for grid, pair in columns)]]
    for place in (0, 2):  # data set and protocol, where there are several
        if len({grid.setting[place] for grid, _ in columns}) > 1:
            lines[0][1:] = [
                f"{title}, {grid.setting[place]}" for title, (grid, _) in zip(lines[0][1:], columns, strict=True)
            ]
    for method in dict.fromkeys(method for grid, _ in columns for method in grid.methods):
        found = [grid.cells.get((method, pair)) for grid, pair in columns]
        lines.append([method, *(spread(row.values("accuracy_last")) if row else NOT_RUN for row in found)])
    return f"{markdown_table(lines)}\n"


def make_grid_report(rows: Sequence[Row]) -> str:
    """The tables with methods as rows and pairs as columns, as Markdown, and which rows are in none."""
    grids = make_grids(rows)
    shown = {record.folder for grid in grids for row in grid.cells.values() for record in row.records}
    absent = [row for row in rows if not shown & {record.folder for record in row.records}]
    named = "; ".join(f"{row.pair.removeprefix('- -> ')}: {row.label} ({title_of(row.setting)})" for row in absent)
    left = f"In none of these tables, as they belong to no student of a teacher there: {named}." if absent else ""
    return "\n\n".join(filter(None, [*map(grid_markdown, grids), notes_of(rows), left])) + "\n"


# CSV.


def in_csv(cell: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def as_csv(rows: Sequence[Row]) -> str:
    """One line per run, unrounded, with what the paper reports and the settings of its row."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    networks, training = ["dataset", "teacher", "student", "method"], ["epochs", "protocol", "seed"]
    writer.writerow([*networks, *training, *ACCURACIES, HELD_OUT, "paper", "source", "run", "settings"])
    for row in rows:
        paper = ["", ""] if row.published is None else [row.published.accuracy, row.published.source]
        settings = " ".join(flags_of(row.records[0]))
        for record in row.records:
            writer.writerow(map(in_csv, [*_csv_cells(row, record), *paper, record.folder.name, settings]))
    return output.getvalue()


def _csv_cells(row: Row, record: Record) -> list[Any]:
    config, result = row.config, record.result
    names = [row.dataset, row.teacher, config["model_s"], row.label, result["epochs"], row.protocol]
    return [*names, record.config["seed"], *(result[name] for name in ACCURACIES), record.held_out]


# HTML.


#: What the legend draws for a mark of `figures.MARKERS`, in the middle of a line of 26 x 10.
MARKS = {
    "o": "M10 5a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "s": "M10 2h6v6h-6z",
    "D": "M13 1l4 4l-4 4l-4-4z",
    "^": "M13 1l4 7h-8z",
    "v": "M13 9l-4-7h8z",
}


class Interval(NamedTuple):
    """Mean and standard deviation of a row on the axis of its table, in percent of the axis' length."""

    mean: float
    low: float
    high: float


def render(template: str, **values: Any) -> str:
    """A page from a template of this folder."""
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)


def as_html(rows: Sequence[Row], pictures: Mapping[str, str]) -> str:
    """One self-contained page: a table for every data set with settings and curves, figures, and `pictures` (name ->
    SVG) of networks. It needs no network, and scripts for sorting alone."""
    sections = [
        _section(number, title, of_title) for number, (title, of_title) in enumerate(figures.groups(rows).items(), 1)
    ]
    names = [(name.replace("_", " "), Markup(svg)) for name, svg in pictures.items()]
    note = Markup(re.sub("`(.*?)`", r"<code>\1</code>", str(escape(_note(rows)))))
    known = {"titles": ACCURACIES, "note": note, "marks": MARKS, "count_of": count_of}
    return render(TEMPLATE, sections=sections, pictures=names, **known)


def _section(number: int, title: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What the template shows of the rows of one data set."""
    drawn = figures.learning_curves(rows, legend=False) or ""
    prefix = f"s{number}-"
    curves = [
        {"name": name, **figures.line_style(place)}
        for place, name in enumerate(figures.names_of(figures.with_curves(rows)))
    ]
    others = {
        "Accuracy against N": figures.accuracy_against_n(rows),
        "Accuracy against cost": figures.accuracy_against_cost(rows),
    }
    return {
        "prefix": prefix,
        "title": title,
        "lines": _lines(rows),
        "has_paper": any(row.published for row in rows),
        "has_held_out": any(row.held_out != "-" for row in rows),
        "curves": curves,
        "drawing": Markup(re.sub(r'id="(curve|band)-', rf'id="{prefix}\1-', drawn)),
        "figures": {name: Markup(svg) for name, svg in others.items() if svg},
    }


def _lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the template shows of every row; the best of a student's rows are marked."""
    costs, latencies, axis = figures.multiply_adds(rows), _latencies(rows), _axis(rows)
    best: dict[tuple[str, str], float] = {}
    for row, name in itertools.product(rows, ACCURACIES):
        key = row.config["model_s"], name
        best[key] = max(best.get(key, 0.0), statistics.mean(row.values(name)))
    return [
        {
            "row": row,
            "accuracies": [
                (spread(row.values(name)), mean := statistics.mean(row.values(name)), mean == best[student, name])
                for name in ACCURACIES
            ],
            "interval": _interval(row.values("accuracy_last"), *axis),
            "parameters": row.records[0].result["parameters"],
            "multiply_adds": costs.get(figures.student_of(row)),
            "latency": latencies.get(figures.student_of(row)),
            "speed": row.images_per_s,
            "command": " ".join(flags_of(row.records[0])),
        }
        for row in rows
        for student in [row.config["model_s"]]
    ]


def _axis(rows: Sequence[Row]) -> tuple[float, float]:
    """The ends of the axis of all intervals of a table."""
    values = [value for row in rows for value in row.values("accuracy_last")]
    room = max(0.05 * (max(values) - min(values)), 0.5)
    return min(values) - room, max(values) + room


def _interval(values: Sequence[float], start: float, end: float) -> Interval:
    mean, deviation = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    places = [100 * (value - start) / (end - start) for value in (mean, mean - deviation, mean + deviation)]
    return Interval(*(min(max(place, 0.0), 100.0) for place in places))


def _latencies(rows: Sequence[Row]) -> dict[tuple[str, int], float]:
    """`figures.student_of` -> milliseconds for one image on this machine's CPU; without those that cannot be built
    here."""
    found = {}
    for name, size in dict.fromkeys(map(figures.student_of, rows)):
        with suppress(UserError, RuntimeError, ValueError):  # named where its multiply-adds are counted
            [found[name, size]] = measure_latency([build_model(name, 10, size).eval()], size)
    return found
