"""Classes and probabilities of image files, by an exported network.

python scripts/predict.py MODEL IMAGE... [--top K]

MODEL is a .pth, .pt2 or .onnx file by scripts/export_student.py, which knows the image size, the normalisation and the
names of the classes. Images of any size are read as the data set's were.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import UserError, run_script, starting

with starting():
    import torch

    from dataset import read_normalised
    from helper.command_line import Parser
    from helper.export import NEEDED, Deployed, read_deployed
    from setting import count

BATCH = 64


def read_model(path: str) -> Deployed:
    """Read MODEL; raises `UserError` where its file does not say how images are to be prepared."""
    model = read_deployed(path)
    missing = [name for name in NEEDED if not model.record.get(name)]
    if missing:
        raise UserError(
            f"MODEL: {path} does not say {', '.join(missing)}; export it again from the checkpoint of a run of this "
            "toolbox"
        )
    return model


@torch.inference_mode()
def predict(model: Deployed, paths: list[str], top: int) -> list[list[tuple[str, float]]]:
    """The `top` likeliest (class, probability) of every image file, likeliest first."""
    found, classes = [], model.record["classes"]
    for start in range(0, len(paths), BATCH):
        images = torch.stack([read_normalised(path, model.record) for path in paths[start : start + BATCH]])
        probabilities, indices = model.predict(images).float().softmax(1).topk(min(top, len(classes)), 1)
        for row in zip(indices.tolist(), probabilities.tolist(), strict=True):
            found.append([(classes[index], probability) for index, probability in zip(*row, strict=True)])
    return found


def main(argv=None) -> None:
    parser = Parser((__doc__ or "").split("\n")[0])
    parser.add_argument("model", metavar="MODEL", help="a .pth, .onnx or (your own) .pt2 by export_student.py")
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    parser.add_argument("--top", type=count, default=1, metavar="K", help="classes to print of every image (1)")
    args = parser.parse_args(argv)
    for path, classes in zip(args.images, predict(read_model(args.model), args.images, args.top), strict=True):
        print(f"{path}: {', '.join(f'{name} {100 * probability:.1f} %' for name, probability in classes)}")


if __name__ == "__main__":
    run_script(main)
