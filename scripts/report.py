"""Tables and figures of runs: python scripts/report.py save/*

Runs that differ in nothing but trial and seed share a row; mean and standard deviation (n - 1) are over them. Printed
is a Markdown table, with the settings of each row below it; --csv, --html and --figures write files.
`python scripts/report.py --update_docs` makes the tables between the markers of README.md and docs/ anew from results/.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import UserError, run_script, starting

with starting():
    from helper.command_line import Parser
    from helper.run_folder import write_text, writing
    from helper.tables import figures
    from helper.tables.pages import (
        as_csv,
        as_html,
        describe_left,
        make_comparison,
        make_grid_report,
        make_overview,
        make_report,
        write_page,
    )
    from helper.tables.rows import Row, read_rows
    from setting import file_to_write, folder_to_write

#: A space at which no browser begins a new line, as it would within the narrow cells of a table.
UNBROKEN = "\N{NO-BREAK SPACE}"
ROOT = Path(__file__).resolve().parent.parent


def say_left(folders: Sequence[Path]) -> list[Row]:
    """The rows of run folders; what is in none is named on stderr, with the reason."""
    rows, left = read_rows(folders)
    for one in left:
        print(describe_left(one), file=sys.stderr)
    return rows


def print_report(folders: Sequence[Path], make: Callable[[Sequence[Row]], str] = make_report) -> list[Row]:
    """Print the table of run folders; returns its rows."""
    rows = say_left(folders)
    print(make(rows), end="")
    return rows


#: What a marker <!-- KIND GLOB,GLOB --> of a document asks for, up to <!-- end of KIND -->.
MARKERS: dict[str, Callable[[Sequence[Row]], str]] = {
    "overview": make_overview,
    "report": make_report,
    "comparison": make_comparison,
}


def fill_markers(text: str, root: Path = ROOT) -> str:
    """A document's text with everything between its markers made anew; raises `UserError` for one without runs."""

    def fill(match: re.Match) -> str:
        kind, pattern = match["kind"], match["glob"]
        folders = [path for one in pattern.split(",") for path in sorted(root.glob(one)) if path.is_dir()]
        if not folders:
            raise UserError(f"--update_docs: {pattern}, which a document names, matches no run folder")
        made = MARKERS[kind](say_left(folders)).replace(" ± ", f"{UNBROKEN}±{UNBROKEN}")
        return f"<!-- {kind} {pattern} -->\n{made}<!-- end of {kind} -->"

    kinds = "|".join(MARKERS)
    return re.sub(rf"<!-- (?P<kind>{kinds}) (?P<glob>\S+) -->\n.*?<!-- end of (?P=kind) -->", fill, text, flags=re.S)


def update_documents(root: Path = ROOT) -> list[Path]:
    """Fill the markers of README.md and docs/*.md; returns the documents that changed."""
    changed = []
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        old = path.read_text(encoding="utf-8")
        new = fill_markers(old, root)
        if new != old:
            write_text(path, new)
            changed.append(path)
    return changed


def make_parser() -> Parser:
    """The flags of this script."""
    parser = Parser.of_script(__doc__)
    add = parser.add_argument
    add("folders", nargs="*", type=Path, metavar="RUN", help="run folders, or folders of them")
    add("--csv", type=file_to_write, metavar="FILE", help="one line per run, unrounded")
    add("--html", type=file_to_write, metavar="FILE", help="one page with everything: tables, settings, figures")
    add("--grid", action="store_true", help="print methods as rows and pairs as columns")
    add("--comparison", action="store_true", help="print each row against ce and kd, with p and its fidelity")
    add("--figures", type=folder_to_write, metavar="DIR", help="learning curves, accuracy against N and cost, as SVG")
    add("--networks", action="store_true", help="for --html and --figures: t-SNE and correlations of logits")
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
    if args.grid and args.comparison:
        raise UserError("--comparison: --grid prints another table; leave one of them out")
    make = make_grid_report if args.grid else make_comparison if args.comparison else make_report
    rows = print_report(args.folders, make)
    if args.csv:
        write_page(args.csv, as_csv(rows))
    pictures = figures.of_networks(rows) if args.networks else {}
    if args.html:
        write_page(args.html, as_html(rows, pictures))
    if args.figures:
        with writing(args.figures):
            args.figures.mkdir(parents=True, exist_ok=True)
        for name, svg in (figures.of_rows(rows) | pictures).items():
            write_page(args.figures / f"{name}.svg", figures.standalone(svg))
        print(f"figures: {args.figures}")


if __name__ == "__main__":
    run_script(main)
