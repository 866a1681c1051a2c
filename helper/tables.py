"""Finished runs as tables: one line per row and pair, or laid out like the paper's, rows methods and columns pairs."""

import csv
import html
import io
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from distiller_zoo import DISTILLERS, find_distiller
from errors import UserError
from helper.configuration import DEFAULTS
from helper.fast import OFF
from helper.plan import IRRELEVANT
from helper.published import PUBLISHED, Published, judge
from helper.recipes import resolve
from helper.reporting import describe_protocol
from helper.run_folder import CONFIG, RESULT
from helper.stored import DERIVED

#: The accuracies of `result.json` and their titles. "Best" is chosen as the protocol says.
ACCURACIES = {"accuracy_last": "last", "accuracy_best": "best", "accuracy_mean_last_five": "mean of last five"}
NOT_RUN, ALONE = "not run", "student alone"
#: What does not tell one row from another, beside what no run is told by.
SAME_ROW = (*IRRELEVANT, "seed")


class Row(NamedTuple):
    """Runs that differ in nothing but their seeds."""

    config: dict
    results: list[dict]
    folders: list[Path]
    apart: str = ""  # the settings that tell it from rows of the same pair, setting and method

    def values(self, accuracy: str) -> list[float]:
        """One accuracy (%) of every run."""
        return [result[accuracy] for result in self.results]

    @property
    def pair(self) -> str:
        return f"{self.config['model_t'] or '-'} -> {self.config['model_s']}"

    @property
    def protocol(self) -> str:
        return describe_protocol(self.config.get("holdout"))

    @property
    def setting(self) -> tuple:
        """What rows of one table have in common: data set, epochs, protocol."""
        folder = Path(self.config["data"]).name if self.config["dataset"] == "folder" else ""
        return f"{self.config['dataset']} {folder}".strip(), self.results[0]["epochs"], self.protocol

    @property
    def label(self) -> str:
        """The method, and what tells the row from others of it."""
        return f"{self.method} {self.apart}".strip()

    @property
    def method(self) -> str:
        """The method, and the flags in which it differs from its recipe."""
        config = self.config
        chosen = {flag.argument: config.get(flag.argument) for flag in find_distiller(config["distill"]).flags}
        recipe = resolve(config["dataset"], config["model_t"], config["model_s"], config["distill"], chosen)
        # Also keeps what started from other weights apart from a paper's value.
        label = [config["distill"], *([f"--init {config['init']}"] if config.get("init") else [])]
        for flag in DISTILLERS[config["distill"]].flags:
            usual = recipe.get(flag.argument, (flag.default, ""))[0]
            value = config.get(flag.argument, usual)
            if flag.full_run is None and flag.written(value) != flag.written(usual):
                label.append(flag.written(value))
        return " ".join(filter(None, label))

    def published(self) -> Published | None:
        config = self.config
        teacher = config["model_t"] if find_distiller(config["distill"]).needs_teacher else None
        return PUBLISHED.get((config["dataset"], teacher, config["model_s"], self.method))


def read_rows(folders: Iterable[Path]) -> tuple[list[Row], list[Path]]:
    """Run folders -> (rows of finished runs, folders that are not finished); raises `UserError` where none is.

    A folder that is given twice, also through a link, is one run.
    """
    rows, unfinished, different = defaultdict(list), [], {}
    for folder in folders:
        different.setdefault(folder.resolve(), folder)
    for folder in different.values():
        if not (folder / RESULT).exists():
            unfinished.append(folder)
            continue
        try:
            config, result = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (CONFIG, RESULT))
            key = json.dumps(_identity(config), sort_keys=True)
            rows[key].append((config, result, folder))
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise UserError(f"RUN: {folder} cannot be read: {error}") from None
    if not rows:
        raise UserError("RUN: none of the folders holds a finished run")
    made = [Row(runs[0][0], [run[1] for run in runs], [run[2] for run in runs]) for runs in rows.values()]
    return _in_order(_tell_apart(made)), unfinished


def _tell_apart(rows: Sequence[Row]) -> list[Row]:
    """The same rows; where several of one pair and setting have the same label, with what differs between them."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.pair, row.setting, row.method].append(row)
    texts = {id(row): text for group in groups.values() for row, text in zip(group, differences(group), strict=True)}
    return [row._replace(apart=texts[id(row)]) for row in rows]


def differences(rows: Sequence[Row]) -> list[str]:
    """The settings that are not the same in all of the rows, as flags; of every row its own."""
    identities = [_identity(row.config) for row in rows]
    names = dict.fromkeys(name for identity in identities for name in identity)
    differ = [name for name in names if any(one.get(name) != identities[0].get(name) for one in identities)]
    return [" ".join(_written(name, one[name]) for name in differ if one.get(name) is not None) for one in identities]


def _written(name: str, value: object) -> str:
    """A setting as it stands on a command line; what is no flag has no dashes."""
    dashes = "" if name in DERIVED else "--"
    if isinstance(value, bool):
        return f"{dashes}{'' if value else 'no-'}{name}"
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return f"{dashes}{name} {','.join(f'{one:.15g}' if isinstance(one, float) else str(one) for one in values)}"


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """Baselines first; then as given, but a method's rows of one pair together, -s 2 before -s 16."""
    places = {}
    for row in rows:
        places.setdefault((row.pair, row.config["distill"]), len(places))

    def place(row: Row) -> tuple:
        parts = re.split(r"(\d+)", row.label)
        natural = [int(part) if part.isdecimal() else part for part in parts]
        return row.config["distill"] != "ce", places[row.pair, row.config["distill"]], natural

    return sorted(rows, key=place)


def _identity(config: dict) -> dict:
    """What makes the run's row; runs from before a flag existed were what its default is now."""
    whole = {"images_per_pass": config["batch_size"]}
    method = {flag.argument: flag.default for flag in find_distiller(config["distill"]).flags}
    known = {name: value for name, value in config.items() if value is not None}
    return {name: value for name, value in (DEFAULTS | OFF | whole | method | known).items() if name not in SAME_ROW}


def spread(values: Sequence[float]) -> str:
    """mean ± standard deviation (n - 1), or the one value."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


HEADER = (
    "data set",
    "teacher",
    "student",
    "method",
    "epochs",
    "last",
    "best",
    "mean of last five",
    "seeds",
    "protocol",
    "paper",
    "ours is",
)


def list_cells(row: Row) -> list[str]:
    """A row's cells under `HEADER`."""
    config, published = row.config, row.published()
    names = [config["dataset"], config["model_t"] or "-", config["model_s"], row.label, str(row.results[0]["epochs"])]
    accuracies = [spread(row.values(name)) for name in ACCURACIES]
    seeds = str(len({result["seed"] for result in row.results}))
    paper = ["-", "-"] if published is None else [f"{published.accuracy:.2f}", _verdict(row, published)]
    return [*names, *accuracies, seeds, row.protocol, *paper]


def _verdict(row: Row, published: Published) -> str:
    return f"{judge(published, row.values(published.compared))} ({ACCURACIES[published.compared]})"


class Grid(NamedTuple):
    """A table like the paper's, of one setting: rows methods, columns pairs; None where nothing was run."""

    setting: tuple
    pairs: list[str]
    methods: list[str]
    cells: dict[tuple[str, str], Row]


def make_grids(rows: Sequence[Row]) -> list[Grid]:
    """One grid per data set, number of epochs and protocol. Networks without a teacher stand in every pair's column."""
    grids = []
    for setting in dict.fromkeys(row.setting for row in rows):
        of_setting = [row for row in rows if row.setting == setting]
        distilled = [row for row in of_setting if row.config["model_t"]]
        pairs = list(dict.fromkeys(row.pair for row in distilled)) or [row.pair for row in of_setting]
        cells: dict[tuple[str, str], Row] = {}
        for row in of_setting:
            for pair in [pair for pair in pairs if row.pair == pair]:
                cells.setdefault((row.label, pair), row)
        for row in [row for row in rows if not row.config["model_t"] and row.setting[0] == setting[0]]:
            for pair in pairs:
                student = pair.split(" -> ")[1]
                if row.config["model_s"] == student and row.setting == setting:
                    label = f"{ALONE} {row.apart}".strip() if row.method == "ce" else row.label
                    cells.setdefault((label, pair), row)
        teachers = {(label, pair): row for pair in pairs for label, row in _teachers(rows, pair, setting)}
        alone = [label for label, _ in cells if label.startswith(ALONE)]
        cells = teachers | cells
        methods = list(dict.fromkeys([*(label for label, _ in teachers), *alone, *(label for label, _ in cells)]))
        methods = [label for label in methods if any((label, pair) in cells for pair in pairs)]
        grids.append(Grid(setting, pairs, methods, cells))
    return [grid for grid in grids if any(not pair.startswith("- ") for pair in grid.pairs)]


def _teachers(rows: Sequence[Row], pair: str, setting: tuple) -> list[tuple[str, Row]]:
    """(label, row) of what taught a pair; where no run says which that was, of every row that may have.

    A teacher may have been trained for longer, so its setting may be another.
    """
    name = pair.split(" -> ")[0]
    alone = [row for row in rows if not row.config["model_t"] and row.setting[0] == setting[0]]
    alone = [row for row in alone if row.config["model_s"] == name and row.config["distill"] == "ce"]
    paths = [row.config.get("path_t") for row in rows if row.pair == pair and row.setting == setting]
    # By the folder's name: runs may have been moved here from another machine.
    taught_by = {Path(path).parent.name for path in paths if path}
    chosen = [row for row in alone if taught_by & {folder.name for folder in row.folders}] or alone
    return [(f"teacher {text}".strip(), row) for row, text in zip(chosen, differences(chosen), strict=True)]


def cell_lines(row: Row | None) -> list[str]:
    """What a cell of a grid says, line by line."""
    if row is None:
        return [NOT_RUN]
    seeds = len({result["seed"] for result in row.results})
    lines = [f"{title} {spread(row.values(name))}" for name, title in ACCURACIES.items()]
    lines.append(f"{seeds} seed{'s' if seeds > 1 else ''}")
    published = row.published()
    if published is not None:
        lines.append(f"paper {published.accuracy:.2f}: {_verdict(row, published)}")
    return lines


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Header and rows of cells as Markdown."""
    marked = [lines[0], ["--"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in marked)


def grid_title(grid: Grid) -> str:
    """Data set, epochs and protocol of a grid."""
    dataset, epochs, protocol = grid.setting
    return f"{dataset}, {epochs} epoch{'s' if epochs != 1 else ''}; {protocol}"


def grid_markdown(grid: Grid) -> str:
    """The grid with every accuracy in its cells."""
    lines = [["", *grid.pairs]]
    for method in grid.methods:
        lines.append([method, *("<br>".join(cell_lines(grid.cells.get((method, pair)))) for pair in grid.pairs)])
    return f"**{grid_title(grid)}**\n\n{markdown_table(lines)}"


def as_csv(rows: Sequence[Row]) -> str:
    """One line per run, unrounded, with what the paper reports."""
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(
        ["dataset", "teacher", "student", "method", "epochs", "protocol", "seed", *ACCURACIES, "paper", "source", "run"]
    )
    for row in rows:
        config, published = row.config, row.published()
        for result, folder in zip(row.results, row.folders, strict=True):
            names = [config["dataset"], config["model_t"] or "", config["model_s"], row.label, result["epochs"]]
            paper = ["", ""] if published is None else [published.accuracy, published.source]
            values = [result[name] for name in ACCURACIES]
            writer.writerow([*names, row.protocol, result["seed"], *values, *paper, folder.name])
    return output.getvalue()


STYLE = """body{font:15px/1.4 sans-serif;margin:2em;color:#222}table{border-collapse:collapse;margin:1em 0}
td,th{border-bottom:1px solid #ccc;padding:.35em .8em;text-align:left;vertical-align:top}
td small{color:#666;display:block}.none{color:#999}figure{display:inline-block;margin:1em}"""


def as_html(rows: Sequence[Row], figures: Sequence[tuple[str, str]]) -> str:
    """One self-contained page: grids, the list of all rows, and figures as (title, SVG)."""
    parts = [f"<!doctype html><meta charset='utf-8'><title>Results</title><style>{STYLE}</style><h1>Results</h1>"]
    for grid in make_grids(rows):
        parts.append(f"<h2>{html.escape(grid_title(grid))}</h2>")
        body = [
            [html.escape(method), *(_html_cell(grid.cells.get((method, pair))) for pair in grid.pairs)]
            for method in grid.methods
        ]
        parts.append(_html_table(["", *map(html.escape, grid.pairs)], body))
    cells = [[html.escape(cell) for cell in list_cells(row)] for row in rows]
    parts.append("<h2>All rows</h2>" + _html_table(HEADER, cells))
    parts.append("<p>Test accuracy in percent, mean ± standard deviation over seeds.</p>")
    parts += [f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>" for title, svg in figures]
    return "\n".join(parts) + "\n"


def _html_cell(row: Row | None) -> str:
    first, *rest = map(html.escape, cell_lines(row))
    if row is None:
        return f"<span class='none'>{first}</span>"
    return first + "".join(f"<small>{line}</small>" for line in rest)


def _html_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{cell}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for cells in body)
    return f"<table><tr>{head}</tr>{lines}</table>"
