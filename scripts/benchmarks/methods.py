"""Time of a training step of every method, relative to KD on the same pair.

python scripts/benchmarks/methods.py [--pairs resnet32x4:resnet8x4,wrn_40_2:ShuffleV1] [--json FILE]

Steps of a method and of KD alternate, on the same images, so that what else the machine does falls on both; the ratio
is that of the medians. Only the main stage is timed. Of methods that a cached teacher can teach (--cache_teacher), a
step that reads the teacher's outputs from a disk is timed too.
"""

import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from dataset import VIEWS, Batch, RowCache
from distiller_zoo import DISTILLERS, Progress, Task
from errors import UserError, run_script
from helper.command_line import Parser
from helper.distributed import find_device
from helper.fast import Fast, keep_freed_memory
from helper.loops import forward_backward, set_modes
from helper.metrics import EpochMeter
from helper.optim import Guard, parameters_of
from helper.tables.pages import markdown_table
from helper.tables.plan import read_pairs
from helper.teacher import FrozenTeacher
from models import build_model
from models.backbone import Output
from scripts.benchmarks.parts import recipe_method, report, seconds_of
from setting import count, file_to_write

IMAGES, CLASSES, SIZE = 50_000, 100, 32


class Stepper:
    """A method with its optimizer, ready to take training steps on one batch of random images."""

    def __init__(
        self, name: str, pair: tuple[str, str], batch_size: int, device: torch.device, fast: Fast | None = None
    ):
        fast = fast or Fast()
        reads_teacher = DISTILLERS[name].reads_teacher
        network = build_model(pair[0], CLASSES) if reads_teacher else None
        targets = torch.arange(IMAGES) % CLASSES
        task = Task(CLASSES, SIZE, batch_size, targets)
        self.method = recipe_method(name, build_model(pair[1], CLASSES), network, pair, task).to(device)
        self.method = fast.prepare_student(self.method, device)
        *_, stage = self.method.stages(240)
        self.stage = stage._replace(respond=fast.passing(self.method, stage.respond))
        self.teacher, self.context = None, partial(fast.autocast, device)
        if stage.reads_teacher:
            self.teacher = FrozenTeacher(fast.prepare_teacher(network.eval().to(device), SIZE))
        set_modes(self.stage, self.method)
        trained = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9, fused=fast.fused_optimizer or None)
        views, _ = VIEWS[self.method.views]
        index = torch.arange(batch_size, device=device)
        images = torch.randn(views * batch_size, 3, SIZE, SIZE, device=device)
        self.guard, self.meter = Guard(), EpochMeter(device)
        self.number = torch.ones((), device=device)
        self.batch = Batch(fast.lay_out(images), targets.to(device)[index], index)

    def step(self) -> None:
        """Take one step: teacher, student, losses, guard, optimizer and meter."""
        output = None
        if self.teacher is not None:
            with self.context():
                output = self.teacher(self.batch.images, self.method.teacher_preact)
        self.optimizer.zero_grad(set_to_none=True)
        losses, logits = forward_backward(
            self.method, self.stage, self.batch, output, Progress(120, 240), self.context()
        )
        self.guard.judge(losses, parameters_of(self.optimizer), self.number)
        self.optimizer.step()
        self.meter.update(losses, logits, self.batch.targets)

    def seconds(self) -> float:
        """Time of one step."""
        return seconds_of(self.step, self.batch.images.device)


def read_from_disk(stepper: Stepper, folder: str) -> Callable[..., Output] | None:
    """The stepper's teacher, whose outputs for its batch are stored and read as a cached teacher's are; None where the
    method reads more than logits and pooled vectors."""
    method, index, device = stepper.method, stepper.batch.index.cpu().numpy(), stepper.batch.images.device
    if stepper.teacher is None or method.views != "plain" or not set(method.reads) <= {"pooled"}:
        return None
    with stepper.context():
        output = stepper.teacher(stepper.batch.images, method.teacher_preact)
    rows, names = RowCache(Path(folder) / "rows", {}, len(index), "--cache_teacher"), ("logits", *method.reads)
    kept = {name: getattr(output, name).float().cpu().numpy() for name in names}
    for name, values in kept.items():
        rows.write(name, 1, index, values)

    def teach(images: torch.Tensor, preact: bool) -> Output:
        found = {name: rows.read(name, 1, kept[name].shape[1], index) for name in names}
        tensors = {name: torch.from_numpy(values).to(device) for name, values in found.items()}
        absent: Any = None
        return Output([], absent, absent, tensors.get("pooled", absent), tensors["logits"])

    return teach


def cached_ratio(stepper: Stepper, steps: int) -> dict:
    """A step that reads the teacher's outputs from a disk, relative to one that computes them, where it can."""
    with tempfile.TemporaryDirectory() as folder:
        teachers = (stepper.teacher, read_from_disk(stepper, folder))
        if teachers[1] is None:
            return {}
        times: list[tuple[float, ...]] = []
        for _ in range(steps + 1):
            found = []
            for stepper.teacher in teachers:
                found.append(stepper.seconds())
            times.append(tuple(found))
    computed, read = (statistics.median(each) for each in zip(*times[1:], strict=True))
    return {"cached_step_s": read, "cached_ratio": read / computed}


def compare(name: str, pair: tuple[str, str], batch_size: int, steps: int, device: torch.device) -> dict:
    """One record: the method's step compared with KD's; `refused` holds the reason where the pair is not supported."""
    record = {"method": name, "teacher": pair[0], "student": pair[1], "batch_size": batch_size, "device": str(device)}
    try:
        steppers = [Stepper(each, pair, batch_size, device) for each in (name, "kd")]
    except UserError as refusal:
        return record | {"refused": str(refusal)}
    rounds = [[stepper.seconds() for stepper in steppers] for _ in range(steps + 1)][1:]  # the first one warms up
    step, kd_step = (statistics.median(times) for times in zip(*rounds, strict=True))
    record |= {"step_s": step, "kd_step_s": kd_step, "ratio": step / kd_step}
    return record | cached_ratio(steppers[0], steps)


def table(records: list[dict]) -> str:
    """A row per method, a column per pair; the ratio to KD's step."""
    columns = list(dict.fromkeys((record["teacher"], record["student"]) for record in records))
    rows = [["method", *(" -> ".join(pair) for pair in columns)]]
    by_key = {(record["method"], record["teacher"], record["student"]): record for record in records}
    for name in dict.fromkeys(record["method"] for record in records):
        rows.append([name, *(_cell(by_key[name, *pair]) for pair in columns)])
    return markdown_table(rows)


def _cell(record: dict) -> str:
    if "refused" in record:
        return "not supported"
    return f"{record['ratio']:.2f}"


def cached_table(records: list[dict]) -> str:
    """A row per method and pair that a cached teacher can teach: a step with the teacher computed, and with it read."""
    rows = [["method", "pair", "teacher computed", "read from a disk", "ratio"]]
    for record in records:
        if "cached_ratio" in record:
            read, ratio = record["cached_step_s"], record["cached_ratio"]
            pair = f"{record['teacher']} -> {record['student']}"
            rows.append([record["method"], pair, *(f"{1e3 * s:.1f} ms" for s in (read / ratio, read)), f"{ratio:.2f}"])
    return markdown_table(rows)


def both_tables(records: list[dict]) -> str:
    """What the script prints."""
    return f"{table(records)}\n\n{cached_table(records)}"


def main(argv=None) -> list[dict]:
    parser = Parser.of_script(__doc__)
    parser.add_argument(
        "--pairs", type=read_pairs, default="resnet32x4:resnet8x4,wrn_40_2:ShuffleV1", metavar="T:S,..."
    )
    parser.add_argument("--methods", default=",".join(DISTILLERS), metavar="NAME,...", help="all by default")
    parser.add_argument("--batch_size", type=count, default=64)
    parser.add_argument("--steps", type=count, default=5, help="timed steps of each (5)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the records there")
    args = parser.parse_args(argv)
    device = find_device(args.device)
    keep_freed_memory(device)
    cases = itertools.product(args.methods.split(","), args.pairs)
    return report((compare(*case, args.batch_size, args.steps, device) for case in cases), both_tables, args.json)


if __name__ == "__main__":
    run_script(main)
