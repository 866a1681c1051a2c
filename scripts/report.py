"""Tables and figures of runs: python scripts/report.py save/*

Runs that differ in nothing but trial and seed share a row; mean and standard deviation (n - 1) are over them. Printed
is a Markdown table, with the command of each row below it; --csv, --html and --figures write files.
`python scripts/report.py --update_docs` makes the tables between the markers of README.md and docs/ anew from results/.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helper.options import Parser

from distiller_zoo import find_distiller
from errors import UserError, run_script
from helper import figures
from helper.run_folder import replacing, writing
from helper.tables import (
    HEADER,
    Row,
    as_csv,
    as_html,
    grid_markdown,
    list_cells,
    make_grids,
    markdown_table,
    read_rows,
)

ROOT = Path(__file__).resolve().parent.parent
NOTE = (
    "Test accuracy in percent, mean ± standard deviation over seeds. Best: the epoch chosen as the protocol says; "
    "chosen on the\ntest images it flatters."
)


def command_of(config: dict) -> str:
    """The flags that tell the row from the others: networks, method, its hyper-parameters, length."""
    flags = find_distiller(config["distill"]).flags
    values = (flag.written(config[flag.argument]) for flag in flags if flag.argument in config)
    teacher = f"--model_t {config['model_t']}" if config["model_t"] else ""
    training = (
        f"--epochs {config['epochs']} --batch_size {config['batch_size']} --learning_rate {config['learning_rate']}"
    )
    parts = (f"--distill {config['distill']}", teacher, f"--model_s {config['model_s']}", *values, training)
    return " ".join(filter(None, parts))


def make_table(rows: Sequence[Row]) -> str:
    """One line per row; columns that say nothing of any row are left out."""
    lines = [HEADER, *map(list_cells, rows)]
    kept = [number for number in range(len(HEADER)) if any(line[number] != "-" for line in lines[1:])]
    return markdown_table([[line[number] for number in kept] for line in lines])


def make_report(folders: Sequence[Path]) -> str:
    """The table and the rows' commands as Markdown; unfinished runs are named on stderr."""
    rows, unfinished = read_rows(folders)
    for folder in unfinished:
        print(f"{folder}: not finished, left out", file=sys.stderr)
    commands = "\n".join(f"    {command_of(row.config)}" for row in rows)
    return f"{make_table(rows)}\n\n{NOTE} Row by row, the settings were:\n\n{commands}\n"


def make_grid_report(folders: Sequence[Path]) -> str:
    """The tables with methods as rows and pairs as columns, as Markdown."""
    return "\n\n".join(map(grid_markdown, make_grids(read_rows(folders)[0]))) + "\n"


#: What a marker <!-- KIND GLOB --> of a document asks for, up to <!-- end of KIND -->.
MARKERS: dict[str, Callable[[Sequence[Path]], str]] = {
    "table": lambda folders: make_table(read_rows(folders)[0]) + "\n",
    "report": make_report,
    "grid": make_grid_report,
}


def fill_markers(text: str, root: Path = ROOT) -> str:
    """A document's text with everything between its markers made anew; raises `UserError` for one without runs."""

    def fill(match: re.Match) -> str:
        kind, pattern = match["kind"], match["glob"]
        folders = sorted(path for path in root.glob(pattern) if path.is_dir())
        if not folders:
            raise UserError(f"--update_docs: {pattern}, which a document names, matches no run folder")
        return f"<!-- {kind} {pattern} -->\n{MARKERS[kind](folders)}<!-- end of {kind} -->"

    kinds = "|".join(MARKERS)
    return re.sub(rf"<!-- (?P<kind>{kinds}) (?P<glob>\S+) -->\n.*?<!-- end of (?P=kind) -->", fill, text, flags=re.S)


def update_documents(root: Path = ROOT) -> list[Path]:
    """Fill the markers of README.md and docs/*.md; returns the documents that changed."""
    changed = []
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        old = path.read_text(encoding="utf-8")
        new = fill_markers(old, root)
        if new != old:
            with replacing(path) as temporary:
                Path(temporary).write_text(new, encoding="utf-8")
            changed.append(path)
    return changed


def draw_figures(rows: Sequence[Row]) -> dict[str, object]:
    """The figures that need no network, by name."""
    drawn = {
        "learning_curves": figures.learning_curves(rows),
        "accuracy_against_n": figures.accuracy_against_n(rows),
        "accuracy_against_cost": figures.accuracy_against_cost(rows),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def draw_networks(rows: Sequence[Row], folder: Path) -> None:
    """t-SNE of every row's first student, and how its logits' correlations differ from the teacher's."""
    for row in rows:
        run = row.folders[0]
        outputs, title = figures.read_outputs(run), f"{row.pair}: {row.label}"
        figures.save(figures.feature_map(outputs, title), folder / f"tsne_{run.name}.png")
        if "teacher_logits" in outputs:
            figures.save(figures.correlation_difference(outputs, title), folder / f"correlation_{run.name}.png")


def write(path: Path, text: str) -> None:
    """Write a text file; raises `UserError` where that is impossible."""
    with replacing(path) as temporary:
        Path(temporary).write_text(text, encoding="utf-8")
    print(f"written: {path}")


def make_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("folders", nargs="*", type=Path, metavar="RUN")
    add("--csv", type=Path, metavar="FILE", help="one line per run, unrounded")
    add("--html", type=Path, metavar="FILE", help="one page with everything, laid out like the paper's tables")
    add("--grid", action="store_true", help="print methods as rows and pairs as columns")
    add("--figures", type=Path, metavar="DIR", help="learning curves, accuracy against N and against cost, as SVG")
    add("--networks", action="store_true", help="with --figures: t-SNE and correlations of logits, of checkpoints")
    add("--update_docs", action="store_true", help="make the tables of README.md and docs/ anew from results/")
    return parser


def main(argv=None) -> None:
    args = make_parser().parse_args(argv)
    if args.update_docs:
        for path in update_documents():
            print(f"updated: {path}")
    if not args.folders:
        if not args.update_docs:
            raise UserError("RUN: name run folders, like save/*, or --update_docs")
        return
    folders = [folder for folder in args.folders if folder.is_dir()]
    print(make_grid_report(folders) if args.grid else make_report(folders), end="")
    rows, _ = read_rows(folders)
    if args.csv:
        write(args.csv, as_csv(rows))
    if args.html:
        svgs = [(name.replace("_", " "), figures.as_svg(figure)) for name, figure in draw_figures(rows).items()]
        write(args.html, as_html(rows, svgs))
    if args.figures:
        with writing(args.figures):
            args.figures.mkdir(parents=True, exist_ok=True)
        for name, figure in draw_figures(rows).items():
            figures.save(figure, args.figures / f"{name}.svg")
        if args.networks:
            draw_networks(rows, args.figures)
        print(f"figures: {args.figures}")


if __name__ == "__main__":
    run_script(main)
