"""The demo's table and figure: python scripts/demo_report.py TEACHER BASELINE NORM FOLDED.

Three run folders and an exported student.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import torch

from dataset import Loader, load_data
from distiller_zoo import Predictor
from errors import run_script
from helper.checkpoint import rebuild, upgrade
from helper.command_line import Parser
from helper.loops import evaluate
from helper.run_folder import LAST
from helper.tables.records import read_record
from models.checkpoints import load_exported, read_checkpoint
from models.cost import count_parameters, measure_latency

TITLES = ("teacher", "baseline", "NORM", "NORM, folded")


def draw_curves(folders: list[Path], path: Path) -> None:
    """Test accuracy by epoch of the three runs."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for title, folder in zip(TITLES, folders, strict=False):
        curve = read_record(folder).curve
        axes.plot(range(1, len(curve) + 1), curve, label=title)
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", title="digits, one seed")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(argv=None) -> None:
    parser = Parser.of_script(__doc__)
    parser.add_argument("folders", nargs=3, type=Path, metavar="RUN")
    parser.add_argument("folded", type=Path)
    args = parser.parse_args(argv)
    checkpoints = [upgrade(read_checkpoint(folder / LAST), str(folder)) for folder in args.folders]
    networks = [Predictor(rebuild(checkpoint, "RUN")[0]).eval() for checkpoint in checkpoints]
    exported, record = load_exported(read_checkpoint(args.folded), str(args.folded))
    networks.append(exported)
    data = load_data(record["dataset"], None, record["image_size"], may_download=False)
    loader = Loader(data.test, data, 256, torch.device("cpu"))
    latencies = measure_latency(networks, data.image_size)
    print(f"{'':<14}{'test accuracy':>14}{'parameters':>12}{'latency':>10}")
    for title, network, latency in zip(TITLES, networks, latencies, strict=True):
        accuracy = evaluate(network, loader)["test_accuracy"]
        print(f"{title:<14}{accuracy:>12.2f} %{count_parameters(network):>12,}{latency:>7.2f} ms")
    print(f"last epoch, {len(data.test.targets)} test images of {data.name}, one seed: a difference is no conclusion.")
    figure = args.folders[-1].parent / "learning_curves.png"
    draw_curves(args.folders, figure)
    print(f"figure: {figure}\nTensorBoard: .venv/bin/tensorboard --logdir {args.folders[-1].parent}")


if __name__ == "__main__":
    run_script(main)
