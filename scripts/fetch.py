"""Download published teachers: RepDistiller's for CIFAR-100, torchvision's for ImageNet.

python scripts/fetch.py cifar resnet32x4
python scripts/fetch.py imagenet

Without names all of the tables' teachers are fetched. NORM_MIRROR is another place to get the files from, a URL or a
folder. A file that was cut off is continued, and one that is here already is checked.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import run_script, starting

with starting():
    from helper.command_line import Parser
    from helper.recipes import PUBLISHED_TEACHERS
    from models.published import CIFAR_TEACHERS, IMAGENET_TEACHERS, cifar_teacher, imagenet_teacher, provide

KINDS = {"cifar": (CIFAR_TEACHERS, cifar_teacher), "imagenet": (IMAGENET_TEACHERS, imagenet_teacher)}


def main(argv=None) -> list[Path]:
    parser = Parser.of_script(__doc__)
    parser.add_argument("kind", choices=KINDS, help="RepDistiller's for CIFAR-100, or torchvision's for ImageNet")
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks; of torchvision's also NAME@WEIGHTS")
    args = parser.parse_args(argv)
    names, find = KINDS[args.kind]
    files = [find(name) for name in args.names or names]
    paths = []
    for name, file in zip(args.names or names, files, strict=True):
        path = provide(file)
        paths.append(path)
        published = PUBLISHED_TEACHERS.get(("cifar100", name)) if args.kind == "cifar" else None
        promise = f"; must test at {published:.2f} % on CIFAR-100, which every run checks" if published else ""
        checked = "its published checksum" if file.sha256 else "its structure and its first checksum"
        print(f"{path}: whole, {checked} agrees{promise}")
    return paths


if __name__ == "__main__":
    run_script(main)
