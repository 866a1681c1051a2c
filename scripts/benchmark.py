"""Training speed: the plain formulation and the fast path side by side, in one run.

python scripts/benchmark.py [--pairs resnet32x4:resnet8x4,...] [--n 8] [--batch_size 64] [--json FILE] [--profile FILE]
    [--compile default] [--reference "OTHER/train_student.py --epochs 1"]

All thirteen pairs of the tables by default, with the geometric mean of their ratios; with
`--json docs/benchmarks/step_cpu.json` the records are kept.

Plain: the expanded feature is computed by convolutions, float32, eager, contiguous, images one by one through PIL in
worker processes. Fast: what `--fast auto` chooses here in a long run, images in memory; a compiler's own time is in
`compile_s` and in no step. Steps of both alternate, so that what else the machine does falls on both. The ratios are
what to quote. The floor is what a step would take at the measured rates of matrix products and of copying:
floor_s = max(operations / rate, bytes / bandwidth), in the fast path's precision. A step has the run's guard and meter.
Launches are counted without a compiler, as scripts/benchmarks/launches.py says.
"""

import itertools
import json
import shlex
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dataset import Batch, ImageData, Loader, load_data
from distiller_zoo import Progress, Task
from errors import UserError, run_script
from helper.command_line import Parser
from helper.distributed import find_device
from helper.fast import COMPILE, PRECISIONS, Fast, has_matrix_units, keep_freed_memory
from helper.loops import forward_backward, set_modes
from helper.metrics import EpochMeter
from helper.optim import Guard, parameters_of
from helper.recipes import CIFAR_PAIRS
from helper.settings import SETTINGS
from helper.tables.pages import markdown_table
from helper.tables.plan import read_pairs
from helper.teacher import FrozenTeacher
from models import build_model
from models.backbone import Output
from scripts.benchmarks.launches import count_launches
from scripts.benchmarks.parts import (
    count_bytes,
    count_flops,
    machine_name,
    matrix_rate,
    memory_rate,
    peak_memory,
    plain_batches,
    recipe_method,
    report,
    seconds_of,
    wait_for,
)
from scripts.benchmarks.plain_losses import PlainTransform
from setting import count, file_to_write, whole

PROGRESS = Progress(120, 240)


def choose(device: torch.device, is_long: bool = False) -> Fast:
    """What `--fast auto` enables on a device, in a run that is too short for a compiler or in a long one."""
    fast = Fast(**{setting.argument: setting.auto(device) for setting in SETTINGS if setting.auto is not None})
    return fast if is_long else fast._replace(compile="off")


class Contender:
    """One way of training a student with NORM: networks, optimizer, and the step."""

    def __init__(self, pair: tuple[str, str], n: int, data: ImageData, args: Namespace, form: str, fast: Fast):
        self.device, self.fast = args.device, fast
        torch.manual_seed(0)
        teacher = build_model(pair[0], data.num_classes, data.image_size).eval()
        task = Task(data.num_classes, data.image_size, args.batch_size, data.train.targets)
        student = build_model(pair[1], data.num_classes, data.image_size)
        self.method = recipe_method("norm", student, teacher, pair, task, co_sponge=n, ft_form=form).to(self.device)
        if form == "direct":
            self.method.transform = PlainTransform.like(self.method.transform)
        self.fast.prepare_student(self.method, self.device)
        self.teacher = FrozenTeacher(self.fast.prepare_teacher(teacher.to(self.device), data.image_size))
        self.teacher_pass = self.fast.compiled(self.teacher.forward, outlives=True)
        stage = self.method.main_stage(240)
        self.stage = stage._replace(respond=self.fast.passing(self.method, stage.respond))
        self.compute = self.fast.compiled(self.method.forward)
        set_modes(self.stage, self.method)
        self.optimizer = torch.optim.SGD(
            self.method.parameters(), 1e-3, 0.9, weight_decay=5e-4, fused=self.fast.fused_optimizer or None
        )
        self.guard, self.meter = Guard(), EpochMeter(self.device)
        self.number = torch.ones((), device=self.device)

    def teach(self, batch: Batch) -> Output:
        """The teacher's part of a step."""
        with self.fast.autocast(self.device):
            return self.teacher_pass(self.fast.lay_out(batch.images))

    def learn(self, batch: Batch, output: Output) -> None:
        """The student's part of a step."""
        batch = batch._replace(images=self.fast.lay_out(batch.images))
        autocast = self.fast.autocast(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        losses, logits = forward_backward(self.compute, self.stage, batch, output, PROGRESS, autocast)
        self.guard.judge(losses, parameters_of(self.optimizer), self.number)
        self.optimizer.step()
        self.meter.update(losses, logits, batch.targets)

    def step(self, batch: Batch) -> None:
        """One training step, teacher included."""
        with self.fast.naming_compiler():
            self.learn(batch, self.teach(batch))

    def seconds(self, batches: Iterator[Batch], steps: int) -> float:
        """Time of `steps` steps, waiting for their batches included."""

        def run() -> None:
            for batch in itertools.islice(batches, steps):
                self.step(batch)

        return seconds_of(run, self.device)


def _endless(loader: Loader) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from loader.batches(epoch)


def _times(
    contenders: Sequence[Contender], batches: dict[Contender, Iterator[Batch]], held: Batch, args: Namespace
) -> tuple[dict[Contender, float], ...]:
    """Seconds of each one's first step and of a later one, and images per second with its own input."""
    first = {}
    for contender in contenders:  # warm up: threads, caches, worker processes, compiler
        first[contender] = contender.seconds(itertools.repeat(held), 1)
        contender.seconds(batches[contender], 1)
    steps, epochs = ({contender: [] for contender in contenders} for _ in range(2))
    for _ in range(args.rounds):
        for contender in contenders:
            steps[contender].append(contender.seconds(itertools.repeat(held), args.steps) / args.steps)
            epochs[contender].append(contender.seconds(batches[contender], args.steps) / args.steps)
    step = {contender: statistics.median(times) for contender, times in steps.items()}
    return first, step, {contender: args.batch_size / statistics.median(times) for contender, times in epochs.items()}


def measure(pair: tuple[str, str], n: int, data: ImageData, args: Namespace, rates: dict) -> dict:
    """One record: both contenders on one pair and N."""
    plain = Contender(pair, n, data, args, "direct", Fast())
    fast = Contender(pair, n, data, args, "auto", args.fast)
    loader = Loader(data.train, data, args.batch_size, args.device, data.augmentation)
    batches = {plain: plain_batches(data, args.batch_size, args.workers, args.device), fast: _endless(loader)}
    held = next(_endless(loader))
    first, step, rate = _times((plain, fast), batches, held, args)
    counted = Contender(pair, n, data, args, "auto", args.fast._replace(compile="off"))  # what is compiled cannot be
    counted.step(held)  # the optimizer's state is made in the first one
    flops, launches = count_flops(lambda: counted.step(held)), _launches(plain, counted, held)
    moved = _bytes_of_a_step(counted, held)
    return {
        "pair": f"{pair[0]}:{pair[1]}",
        "n": n,
        "batch_size": args.batch_size,
        "device": str(args.device),
        "plain_step_s": step[plain],
        "fast_step_s": step[fast],
        "step_ratio": step[plain] / step[fast],
        "plain_epoch_images_per_s": rate[plain],
        "fast_epoch_images_per_s": rate[fast],
        "epoch_ratio": rate[fast] / rate[plain],
        "peak_memory_plain": peak_memory(lambda: plain.step(held), args.device),
        "peak_memory_fast": peak_memory(lambda: fast.step(held), args.device),
        "floor_s": max(flops / rates["flops_per_s"], moved / rates["bytes_per_s"]),
        "flops": flops,
        "bytes": moved,
        "achieved_flops_per_s": flops / step[fast],
        **launches,
        "fast": args.fast._asdict(),
        "compile_s": first[fast] - step[fast] if fast.fast.compile != "off" else 0.0,
        **rates,
        **(measure_trials(pair, n, data, args) if args.trials > 1 else {}),
    }


def _launches(plain: Contender, fast: Contender, batch: Batch) -> dict[str, int]:
    counts = {"plain": count_launches(lambda: plain.step(batch)), "fast": count_launches(lambda: fast.step(batch))}
    return {f"{what}_{name}": getattr(found, what) for name, found in counts.items() for what in found._fields[:2]}


def count_reference(command: str) -> dict[str, int]:
    """What a step of another code's training script launches; raises `UserError` where it cannot be counted."""
    counter = Path(__file__).resolve().parent / "benchmarks" / "launches.py"
    script, *arguments = shlex.split(command)
    script = Path(script).resolve()
    done = subprocess.run(
        [sys.executable, str(counter), str(script), *arguments], capture_output=True, text=True, cwd=script.parent
    )
    if done.returncode:
        raise UserError(f"--reference: {(done.stderr.strip().splitlines() or ['it failed'])[-1][:300]}")
    counts = json.loads(done.stdout.strip().splitlines()[-1])
    return {f"{name}_reference": value for name, value in counts.items()}


def measure_trials(pair: tuple[str, str], n: int, data: ImageData, args: Namespace) -> dict:
    """How much faster `args.trials` students are trained on one teacher pass (`--trials`) than on one pass each."""
    students = [Contender(pair, n, data, args, "auto", args.fast) for _ in range(args.trials)]
    held = next(_endless(Loader(data.train, data, args.batch_size, args.device, data.augmentation)))

    def apart() -> None:
        for student in students:
            student.step(held)

    def together() -> None:
        output = students[0].teach(held)
        for student in students:
            student.learn(held, output)

    times = {apart: [], together: []}
    for way in times:
        way()
    for _ in range(args.rounds):
        for way, measured in times.items():
            measured.append(seconds_of(lambda way=way: [way() for _ in range(args.steps)], args.device) / args.steps)
    seconds = {way: statistics.median(measured) for way, measured in times.items()}
    return {
        "trials": args.trials,
        "trials_apart_step_s": seconds[apart],
        "trials_together_step_s": seconds[together],
        "trials_ratio": seconds[apart] / seconds[together],
    }


def _bytes_of_a_step(contender: Contender, batch: Batch) -> int:
    """The layers' traffic of one step: the teacher's forward pass, and three passes of the student's."""

    def run(network) -> int:
        with torch.no_grad(), contender.fast.autocast(contender.device):
            return count_bytes([network], lambda: network.outputs(contender.fast.lay_out(batch.images)))

    return run(contender.teacher.network) + 3 * run(contender.method.student)


def loader_rate(data: ImageData, args: Namespace) -> float:
    """Images per second of the fast path's input alone, over one epoch."""
    loader = Loader(data.train, data, args.batch_size, args.device, data.augmentation)
    return len(data.train.targets) / seconds_of(lambda: all(True for _ in loader.batches(1)), args.device)


def profile(pair: tuple[str, str], n: int, data: ImageData, args: Namespace) -> None:
    """Print the fast step's most expensive operations and write a trace for chrome://tracing or Perfetto."""
    contender = Contender(pair, n, data, args, "auto", args.fast)
    batch = next(_endless(Loader(data.train, data, args.batch_size, args.device, data.augmentation)))
    contender.step(batch)
    with torch.profiler.profile(acc_events=True) as profiler:
        contender.step(batch)
        wait_for(args.device)
    key = "self_cuda_time_total" if args.device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=40))
    profiler.export_chrome_trace(str(args.profile))
    print(f"trace: {args.profile}")


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    head = ("pair", "N", "plain step", "fast step", "ratio", "plain epoch", "fast epoch", "ratio", "memory", "floor")
    compiled = any(record.get("compile_s") for record in records)
    rows = [(*head, *("compiler",) * compiled)]
    for record in records:
        plain_step, fast_step, floor = (
            f"{1000 * record[f'{name}_s']:.1f} ms" for name in ("plain_step", "fast_step", "floor")
        )
        plain_epoch, fast_epoch = (f"{record[f'{name}_epoch_images_per_s']:.0f}/s" for name in ("plain", "fast"))
        step_ratio, epoch_ratio = (f"{record[f'{name}_ratio']:.2f}" for name in ("step", "epoch"))
        memory = f"{record['peak_memory_plain'] / 2**20:.0f} -> {record['peak_memory_fast'] / 2**20:.0f} MiB"
        names = (record["pair"].replace(":", " -> "), str(record["n"]))
        step, epoch = (plain_step, fast_step, step_ratio), (plain_epoch, fast_epoch, epoch_ratio)
        rows.append((*names, *step, *epoch, memory, floor, *((f"{record.get('compile_s', 0):.0f} s",) * compiled)))
    lines = [markdown_table(rows)]
    if "launches_fast" in records[0]:
        lines.append(f"\n{_launch_table(records)}")
    ratios = ("step_ratio", "epoch_ratio", *(("trials_ratio",) if "trials_ratio" in records[0] else ()))
    for kind in ratios if len({record["pair"] for record in records}) > 1 else ():
        mean = statistics.geometric_mean(record[kind] for record in records)
        lines.append(f"\ngeometric mean of the {kind.replace('_', ' ')}s: {mean:.2f}")
    return "\n".join(lines)


def _launch_table(records: list[dict]) -> str:
    """A table of launches; with those of a reference, where they were counted."""
    names = [name for name in ("reference", "plain", "fast") if f"launches_{name}" in records[0]]
    rows = [["pair", "N", *(f"launches, {name}" for name in names), *(f"synchronisations, {name}" for name in names)]]
    for record in records:
        counts = [str(record[f"{what}_{name}"]) for what in ("launches", "synchronisations") for name in names]
        rows.append([record["pair"].replace(":", " -> "), str(record["n"]), *counts])
    return markdown_table(rows)


def counts(text: str) -> list[int]:
    """8,16 -> whole numbers above 0, read from a flag."""
    return [count(part) for part in text.split(",")]


def main(argv=None) -> list[dict]:
    parser = Parser.of_script(__doc__)
    every_pair = ",".join(":".join(pair) for pair in CIFAR_PAIRS)
    parser.add_argument("--pairs", type=read_pairs, default=every_pair, metavar="T:S,...", help="all of the tables")
    parser.add_argument("--n", type=counts, default="8", metavar="N,...")
    parser.add_argument("--batch_size", type=count, default=64)
    parser.add_argument("--steps", type=count, default=3, help="steps of a round (3)")
    parser.add_argument("--rounds", type=count, default=3, help="alternating rounds (3)")
    parser.add_argument("--trials", type=count, default=1, help="also time K students of one teacher (1)")
    parser.add_argument("--workers", type=whole, default=2, help="worker processes of the plain input (2)")
    parser.add_argument("--dataset", default="digits", help="images to train on (digits)")
    parser.add_argument("--data", metavar="PATH")
    parser.add_argument("--device", type=find_device, default="auto")
    parser.add_argument(
        "--compile", choices=COMPILE, help="of the fast path; default: what --fast auto chooses for a long run"
    )
    parser.add_argument(
        "--reference",
        metavar="COMMAND",
        help="also count the launches of another code's training script: FILE and flags",
    )
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the records there")
    parser.add_argument(
        "--profile", type=file_to_write, metavar="FILE", help="instead: one pair's kernels, and a trace in FILE"
    )
    args = parser.parse_args(argv)
    keep_freed_memory(args.device)
    data = load_data(args.dataset, args.data)
    args.fast = choose(args.device, is_long=True)
    args.fast = args.fast._replace(compile=args.compile or args.fast.compile)
    if args.profile:
        profile(args.pairs[0], args.n[0], data, args)
        return []
    machine = {"machine": machine_name(args.device), "matrix_units": has_matrix_units(args.device)}
    print(f"{machine['machine']}, {'with' if machine['matrix_units'] else 'without'} matrix units")
    reference = count_reference(args.reference) if args.reference else {}
    rates = {
        "flops_per_s": matrix_rate(args.device, PRECISIONS[args.fast.precision]),
        "bytes_per_s": memory_rate(args.device),
        "loader_images_per_s": loader_rate(data, args),
    }
    print(", ".join(f"{name} {value:.3g}" for name, value in rates.items()))
    cases = itertools.product(args.pairs, args.n)
    return report((measure(*case, data, args, rates) | machine | reference for case in cases), table, args.json)


if __name__ == "__main__":
    run_script(main)
