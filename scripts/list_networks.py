"""What works with the networks of other libraries, tried: `python scripts/list_networks.py [--out FILE] [NAME...]`.

Of each family the smallest network, with random weights, is a teacher (KD, NORM, AT) and a student (NORM) for two steps
and is exported with the transform folded in. A refusal is shown by its reason. The result is a Markdown table.

With `--out FILE` each row is written to the page when it is known. Rows of other networks that the page has are kept,
and without names their families are not tried again: a stopped list is resumed, and a page is made anew where its
file is removed before.
"""

import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dataset import Batch
from distiller_zoo import DISTILLERS, Distiller, Predictor, Progress, Task
from errors import UserError, first_line, run_script
from helper.command_line import Parser
from helper.run_folder import write_text
from models import build_model
from models.backbone import Backbone, FinalConv
from models.cost import count_parameters
from setting import file_to_write

CLASSES, IMAGES, STEPS = 7, 4, 2
#: Image sizes that are tried in turn: some networks read only one.
SIZES = (64, 224, 240, 256)
HEAD = ("family", "smallest network", "images", "teacher: KD", "NORM", "AT", "student: NORM", "ships", "remarks")
PAGE = """# Networks of other libraries: what works

Of each family the smallest network, with random weights, as a teacher and as a student of two training steps, folded
and exported. Made by `python scripts/list_networks.py --out docs/networks_table.md`; with a name behind that, its row.

"""
#: How far the exported network may be from the trained one, relative to the largest logit.
TOLERANCE = 1e-3


class Tried(NamedTuple):
    """A cell of the table and a remark on it."""

    cell: str
    remark: str = ""


def family_of(name: str) -> str:
    """The library and the file of it that defines a network."""
    library, _, architecture = name.partition(":")
    if library == "timm":
        from timm.models import model_entrypoint as find
    else:
        from torchvision.models import get_model_builder as find
    return f"{library} {find(architecture).__module__.rpartition('.')[2]}"


def families(library: str) -> dict[str, list[str]]:
    """Names of a library's networks by the file that defines them."""
    if library == "timm":
        import timm

        return {
            family: timm.list_models(module=family) for family in timm.list_modules() if timm.list_models(module=family)
        }
    import torchvision

    found: dict[str, list[str]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        family = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        found.setdefault(family, []).append(name)
    return found


def smallest(library: str, names: list[str]) -> str:
    """The network with the fewest parameters."""
    if library == "timm":
        from timm import create_model as build
    else:
        from torchvision.models import get_model as build
    sizes = {}
    for name in names:
        try:
            with torch.device("meta"):
                sizes[name] = count_parameters(build(name))
        except Exception:  # a library's constructors raise anything; what cannot be built here is not the smallest
            continue
    return f"{library}:{min(sizes, key=sizes.get, default=names[0])}"


def steps(method: Distiller, teacher: Backbone, size: int) -> None:
    """Train a method for some steps on random images; raises what its parts raise, and `ValueError` for bad losses."""
    optimizer = torch.optim.SGD(method.parameters(), lr=1e-3)
    batch = Batch(torch.randn(IMAGES, 3, size, size), torch.arange(IMAGES) % CLASSES, torch.arange(IMAGES))
    with torch.no_grad():
        seen = teacher.eval().outputs(batch.images)
    for _ in range(STEPS):
        _, losses = method.train()(batch, seen, Progress(0, STEPS))
        total = sum(losses.values())
        if not total.isfinite():
            raise ValueError("the loss is not finite")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()


def build_method(distill: str, student: Backbone, teacher: Backbone, size: int) -> Distiller:
    """A method with every term that it has."""
    weights = {"alpha": 1.0} | ({"co_sponge": 2} if distill == "norm" else {})
    return DISTILLERS[distill](student, teacher, Task(CLASSES, size, IMAGES, torch.arange(IMAGES) % CLASSES), **weights)


def attempt(what: str, run: Callable[[], str]) -> Tried:
    """What `run` returns, or why it refuses; a fault of ours is named as one."""
    try:
        return Tried(run())
    except UserError as error:
        return Tried("no", f"{what}: {error}")
    except Exception as error:  # the table is to show what is wrong
        return Tried("FAULT", f"{what}: {type(error).__name__} {first_line(error)[:120]}")


def try_teacher(distill: str, network: Backbone, size: int) -> str:
    """Whether a small student is trained by `network`."""
    steps(build_method(distill, build_model("resnet8", CLASSES), network, size), network, size)
    return "yes"


def try_student(network: Backbone, size: int) -> str:
    """What is shipped of `network`, trained with NORM."""
    teacher = build_model("resnet14", CLASSES)
    method = build_method("norm", network, teacher, size)
    steps(method, teacher, size)
    images, exported = torch.randn(2, 3, size, size), method.eval().export()
    with torch.no_grad():
        expected, folded = Predictor(method)(images), exported(images)
    if not (folded - expected).abs().max() <= TOLERANCE * expected.abs().max():
        raise ValueError("the exported network differs from the trained one")
    ships = "plain" if not isinstance(exported, FinalConv) else "+ linear layer"
    try:
        torch.export.export(exported, (images,))
    except Exception:  # torch's tracer raises anything; files of weights need none
        return f"{ships}, no .pt2 or .onnx"
    return ships


def row(family: str, name: str) -> tuple[str, ...]:
    """The results of one network."""
    torch.manual_seed(0)
    for size in SIZES:
        network, built = None, Tried("no")
        try:
            network = build_model(name, CLASSES, size)
            network.describe(size)
            break
        except UserError as error:
            built = Tried("no", str(error))
        except Exception as error:  # the table is to show what is wrong
            built = Tried("FAULT", f"{type(error).__name__} {first_line(error)[:120]}")
    else:
        return family, f"`{name}`", "-", *[built.cell] * 4, "-", built.remark
    tried = [
        attempt(distill.upper(), lambda distill=distill: try_teacher(distill, network, size))
        for distill in ("kd", "norm", "attention")
    ]
    tried.append(attempt("student", lambda: try_student(network, size)))
    remarks = "; ".join(dict.fromkeys(each.remark for each in tried if each.remark))
    *cells, ships = (each.cell for each in tried)
    trained = ships if ships in ("no", "FAULT") else "yes"
    return family, f"`{name}`", str(size), *cells, trained, "-" if trained != "yes" else ships, remarks


def rows(names: list[str], known: Collection[str]) -> Iterator[tuple[str, ...]]:
    """The results of the named networks, or of the smallest of every family that is not `known`."""
    if names:
        yield from (row(family_of(name), name) for name in names)
        return
    for library in ("torchvision", "timm"):
        for family, members in families(library).items():
            if f"{library} {family}" not in known:
                yield row(f"{library} {family}", smallest(library, members))


def markdown(cells: tuple[str, ...]) -> str:
    """A row of the table; a bar in a reason would begin another cell."""
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def read_rows(page: Path | None) -> dict[tuple[str, str], str]:
    """The rows of a page, by family and network; none where there is no page."""
    if page is None or not page.exists():
        return {}
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {tuple(line.removeprefix("| ").split(" | ")[:2]): line for line in lines[2:]}


def main(argv=None) -> None:
    parser = Parser.of_script(__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="networks to try; default: the smallest of each family"
    )
    parser.add_argument(
        "--out", type=file_to_write, metavar="FILE", help="the page of the table; its rows of other networks are kept"
    )
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    head, found = [markdown(cells) for cells in (HEAD, ("--",) * len(HEAD))], read_rows(args.out)
    print("\n".join(head), flush=True)
    for cells in rows(args.names, {family for family, _ in found}):
        found[cells[0], cells[1]] = markdown(cells)
        print(found[cells[0], cells[1]], flush=True)
        if args.out:
            write_text(args.out, PAGE + "\n".join([*head, *(found[key] for key in sorted(found))]) + "\n")


if __name__ == "__main__":
    run_script(main)
