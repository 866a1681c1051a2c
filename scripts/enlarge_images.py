"""Make a folder in ImageNet's shape from small photographs: the first images of every class, enlarged, as JPEG.

python scripts/enlarge_images.py SOURCE TARGET --per_class 20 --size 375 --texture 20

SOURCE holds train/<class>/* and val/ or test/<class>/*; TARGET gets train/<class>/*.JPEG and val/<class>/*.JPEG, a
quarter as many. It is for trying and timing ImageNet's path where ImageNet is not at hand; nothing is learnt from it.
What is enlarged is smooth, and cheap to decode; `--texture` adds noise, so that a file has the size, and decoding the
cost, of a photograph (500x375 pixels at quality 90: about 110 kB with 20).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy
from PIL import Image

from errors import UserError, count_of, run_script
from helper.command_line import Parser
from setting import count, folder_to_write, number

QUALITY = 90


def enlarge(source: Path, target: Path, most: int, size: int, texture: float) -> int:
    """Write at most `most` images of every class folder of `source`; returns how many, raises `UserError`."""
    written, random = 0, numpy.random.default_rng(0)
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        place = target / folder.name
        place.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir())[:most]:
            try:
                with Image.open(path) as image:
                    # A little wider than high, as photographs are.
                    large = image.convert("RGB").resize((size * 4 // 3, size), Image.Resampling.BICUBIC)
            except OSError as error:
                raise UserError(f"SOURCE: {path} cannot be read as an image ({error}); take it out") from None
            if texture:
                rough = numpy.asarray(large) + random.normal(0, texture, (size, size * 4 // 3, 1))
                large = Image.fromarray(rough.clip(0, 255).astype(numpy.uint8))
            large.save(place / f"{path.stem}.JPEG", quality=QUALITY)
            written += 1
    return written


def main(argv=None) -> Path:
    parser = Parser.of_script(__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("target", type=folder_to_write, metavar="TARGET")
    parser.add_argument("--per_class", type=count, default=20, help="training images of each class (20)")
    parser.add_argument("--size", type=count, default=256, help="height in pixels (256)")
    parser.add_argument("--texture", type=number, default=0.0, help="deviation of added noise, of 255 (0)")
    args = parser.parse_args(argv)
    test = next((args.source / name for name in ("val", "test") if (args.source / name).is_dir()), None)
    if test is None or not (args.source / "train").is_dir():
        raise UserError(f"SOURCE: {args.source} must hold train/ and val/ or test/, one folder per class")
    train = enlarge(args.source / "train", args.target / "train", args.per_class, args.size, args.texture)
    tested = enlarge(test, args.target / "val", max(args.per_class // 4, 1), args.size, args.texture)
    print(f"{args.target}: {train} training and {count_of(tested, 'test image')}, {count_of(args.size, 'pixel')} high")
    return args.target


if __name__ == "__main__":
    run_script(main)
