"""What a step takes beyond its parts: whole step / (teacher's forward pass + the student's own step, each alone).

python scripts/benchmarks/overhead.py [--pairs timm:vit_small_patch16_224:torchvision:resnet18] [--image_size 224]
    [--n 8] [--batch_size 32] [--steps 3] [--rounds 3] [--json FILE]

All in the fast path. The student's own step is one with labels alone: cross entropy, gradients, optimizer. The three
alternate, so that what else the machine does falls on all of them.
"""

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from dataset import Batch, ImageData, Loader, load_data
from distiller_zoo import DISTILLERS, Task
from errors import run_script
from helper.loops import forward_backward, set_modes
from helper.tables.pages import markdown_table
from models import build_model
from scripts.benchmark import PROGRESS, Contender, choose
from scripts.benchmarks.parts import describe_step, pair_parser, report, seconds_of
from setting import count


def student_step(name: str, data: ImageData, args: Namespace) -> Callable[[Batch], None]:
    """A step of the student with labels alone."""
    torch.manual_seed(0)
    student = build_model(name, data.num_classes, data.image_size)
    task = Task(data.num_classes, data.image_size, args.batch_size, data.train.targets)
    method = DISTILLERS["ce"](student, None, task).to(args.device)
    args.fast.prepare_student(method, args.device)
    stage = method.main_stage(240)
    stage = stage._replace(respond=args.fast.passing(method, stage.respond))
    compute = args.fast.compiled(method.forward)
    set_modes(stage, method)
    optimizer = torch.optim.SGD(method.parameters(), 1e-3, 0.9, fused=args.fast.fused_optimizer or None)

    def step(batch: Batch) -> None:
        batch = batch._replace(images=args.fast.lay_out(batch.images))
        optimizer.zero_grad(set_to_none=True)
        forward_backward(compute, stage, batch, None, PROGRESS, args.fast.autocast(args.device))
        optimizer.step()

    return step


def measure(pair: tuple[str, str], data: ImageData, args: Namespace) -> dict:
    """One record: the medians of the three, and their ratio."""
    whole = Contender(pair, args.n, data, args, "auto", args.fast)
    ways = {"step_s": whole.step, "teacher_s": whole.teach, "student_s": student_step(pair[1], data, args)}
    batch = next(Loader(data.train, data, args.batch_size, args.device, data.augmentation).batches())
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):  # the first is for threads, caches and a compiler
        for name, run in ways.items():
            steps = args.steps if number else 1
            taken = seconds_of(lambda run=run, steps=steps: [run(batch) for _ in range(steps)], args.device)
            times[name] += [taken / steps] if number else []
    found = {name: statistics.median(each) for name, each in times.items()}
    ratio = found["step_s"] / (found["teacher_s"] + found["student_s"])
    return describe_step(pair, args.n, data, args) | {"ratio": ratio} | found


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    lines = [["pair", "image", "N", "whole step", "teacher", "student", "ratio"]]
    for one in records:
        times = [f"{1000 * one[name]:.1f} ms" for name in ("step_s", "teacher_s", "student_s")]
        size = f"{one['image_size']}x{one['image_size']}"
        lines.append([one["pair"], size, str(one["n"]), *times, f"{one['ratio']:.3f}"])
    return markdown_table(lines)


def main(argv=None) -> list[dict]:
    usual = "timm:vit_small_patch16_224:torchvision:resnet18"
    parser = pair_parser(__doc__, usual)
    parser.add_argument("--n", type=count, default=8)
    parser.add_argument("--steps", type=count, default=3, help="steps of a round (3)")
    parser.add_argument("--rounds", type=count, default=3, help="alternating rounds (3)")
    args = parser.parse_args(argv)
    args.fast, data = choose(args.device), load_data("digits", None, args.image_size)
    return report((measure(pair, data, args) for pair in args.pairs), table, args.json)


if __name__ == "__main__":
    run_script(main)
