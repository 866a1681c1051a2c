"""Draw the picture of NORM in the README, docs/figures/norm.svg.

python scripts/draw_norm.py [FILE]

The picture brings its own background and follows the reader's light or dark colour scheme.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from xml.sax.saxutils import escape

from errors import run_script
from helper.command_line import Parser
from helper.run_folder import write_text
from setting import file_to_write

SIZE = (960, 336)
FILE = Path(__file__).resolve().parent.parent / "docs" / "figures" / "norm.svg"
#: Where the drawn ones of the N segments are, and their names.
SEGMENTS = ((384, "y1"), (446, "y2"), (508, "y3"), (594, "yN"))
STYLE = """
svg { --page: #ffffff; --ink: #1f2328; --faint: #656d76; --line: #8c959f; --student: #ddf4ff; --student-line: #0969da;
      --teacher: #fff1e5; --teacher-line: #bc4c00; --norm: #e6f6e8; --norm-line: #1a7f37; }
@media (prefers-color-scheme: dark) {
  svg { --page: #161b22; --ink: #e6edf3; --faint: #9198a1; --line: #6e7681; --student: #10294d; --student-line: #58a6ff;
        --teacher: #43210b; --teacher-line: #f0883e; --norm: #12351f; --norm-line: #3fb950; }
}
text { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); text-anchor: middle; }
.small { font-size: 12px; fill: var(--faint); }
.title { font-weight: 600; text-anchor: start; }
.start { text-anchor: start; }
.page { fill: var(--page); stroke: var(--line); stroke-opacity: 0.4; }
.student { fill: var(--student); stroke: var(--student-line); }
.teacher { fill: var(--teacher); stroke: var(--teacher-line); }
.norm { fill: var(--norm); stroke: var(--norm-line); }
.group { fill: none; stroke: var(--norm-line); stroke-opacity: 0.5; }
.sum { fill: none; stroke: var(--line); }
.arrow { fill: none; stroke: var(--line); stroke-width: 1.5; marker-end: url(#head); }
.match { fill: none; stroke: var(--teacher-line); stroke-width: 1.5; stroke-dasharray: 4 3; }
.rule { stroke: var(--line); stroke-opacity: 0.4; }
.head { fill: var(--line); }
"""


def text(x: float, y: float, content: str, kind: str = "") -> str:
    """One line of text, centred at x unless its kind says otherwise."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, *lines: str) -> str:
    """A rounded rectangle with lines of text in its middle."""
    first = y + height / 2 + 5 - 9 * (len(lines) - 1)
    words = [text(x + width / 2, first + 18 * number, line) for number, line in enumerate(lines)]
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" class="{kind}"/>' + "".join(words)


def feature_map(x: float, y: float, side: float, channels: int, kind: str) -> str:
    """A feature map: a stack of squares, one for each drawn channel, the first one in front."""
    squares = [
        f'<rect x="{x + 5 * depth:g}" y="{y - 5 * depth:g}" width="{side:g}" height="{side:g}" class="{kind}"/>'
        for depth in reversed(range(channels))
    ]
    return "".join(squares)


def path(kind: str, *points: tuple[float, float]) -> str:
    """A polyline."""
    return f'<path class="{kind}" d="M{" L".join(f"{x:g} {y:g}" for x, y in points)}"/>'


def training(top: float) -> list[str]:
    """The upper part: student, transform and teacher while the student is trained."""
    middle = top + 172
    parts = [text(24, top + 28, "Training", "title")]
    parts += [box(24, top + 42, 104, 44, "teacher", "teacher"), path("arrow", (128, top + 64), (466, top + 64))]
    parts += [feature_map(470, top + 50, 32, 4, "teacher"), text(536, top + 58, "teacher's map t", "start")]
    parts += [text(536, top + 78, "loss: squared distance of every segment yi to t", "start small")]
    parts += [box(24, middle - 22, 104, 44, "student", "student"), path("arrow", (128, middle), (156, middle))]
    parts += [feature_map(160, middle - 16, 32, 2, "student"), text(178, middle + 34, "map x", "small")]
    parts += [
        path("arrow", (200, middle), (240, middle)),
        box(244, middle - 32, 92, 64, "norm", "1x1 conv", "BatchNorm"),
    ]
    parts += [path("arrow", (336, middle), (364, middle)), box(368, middle - 40, 280, 86, "group")]
    for x, name in SEGMENTS:
        parts += [feature_map(x, middle - 18, 28, 4, "norm"), text(x + 20, middle + 34, name, "small")]
        parts += [path("match", (488, top + 84), (x + 22, middle - 36))]
    parts += [text(574, middle + 4, "..."), path("arrow", (648, middle), (676, middle))]
    parts += [
        box(680, middle - 32, 92, 64, "norm", "1x1 conv", "BatchNorm"),
        path("arrow", (772, middle), (787, middle)),
    ]
    parts += [f'<circle cx="798" cy="{middle:g}" r="10" class="sum"/>', text(798, middle + 5, "+")]
    parts += [path("arrow", (218, middle), (218, middle + 62), (798, middle + 62), (798, middle + 12))]
    return [
        *parts,
        path("arrow", (808, middle), (828, middle)),
        box(832, middle - 22, 104, 44, "student", "classifier"),
    ]


def shipped(top: float) -> list[str]:
    """The lower part: the plain student that is left."""
    middle = top + 40
    parts = [path("rule", (24, top), (936, top)), text(24, top + 45, "Shipped", "title")]
    parts += [box(118, middle - 22, 104, 44, "student", "student"), path("arrow", (222, middle), (250, middle))]
    parts += [feature_map(254, middle - 13, 32, 2, "student"), path("arrow", (294, middle), (322, middle))]
    parts += [box(326, middle - 22, 104, 44, "student", "classifier")]
    parts += [text(470, middle - 4, "At test time the transform is linear and folds into the classifier:", "start")]
    return [
        *parts,
        text(470, middle + 16, "the shipped student is the plain network, at the plain network's cost.", "start small"),
    ]


def draw() -> str:
    """The whole picture as SVG."""
    width, height = SIZE
    marker = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        "<title>NORM: the student's last map is expanded to N segments, each matched to the teacher's map</title>",
        f"<style>{STYLE}</style>{marker}",
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" class="page"/>',
        *training(0),
        *shipped(256),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main(argv=None) -> Path:
    parser = Parser.of_script(__doc__)
    parser.add_argument("file", nargs="?", type=file_to_write, default=FILE, metavar="FILE", help=str(FILE.name))
    file = parser.parse_args(argv).file
    write_text(file, draw())
    print(f"written: {file}")
    return file


if __name__ == "__main__":
    run_script(main)
