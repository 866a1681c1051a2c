"""The runs of a table, or of your own choice of pairs and methods: listed, estimated, and trained where missing.

python scripts/reproduce.py --table 1 --dry_run
python scripts/reproduce.py --pairs resnet32x4:resnet8x4 --methods kd,norm --trials 3 -- --dataset folder --data PATH

What stands behind -- goes to every training run. Started again, it goes on where it was stopped.
"""

import argparse
import shlex
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helper.options import Parser, pairs

from distiller_zoo.base import count
from errors import UserError, run_script
from helper.cluster import submit
from helper.costs import Estimate, Rates, estimate, format_seconds
from helper.plan import (
    IMAGENET_TABLES,
    TABLES,
    Job,
    Plan,
    Variant,
    all_variants,
    by_state,
    read_variants,
)
from helper.run_folder import LAST, RESULT, replacing
from helper.running import LOGS, command_line, find_places, run_jobs

MEASURED_STEPS = "20"


def read_rows(methods: str | None, variants: str | None) -> list[Variant]:
    """The rows that are asked for; all of them where nothing is named."""
    if methods is None and variants is None:
        return all_variants()
    rows = read_variants((methods or "").replace(",", ";")) + read_variants(variants or "")
    return list(dict.fromkeys(row for row in rows if row.distill != "ce"))  # the baseline is there anyway


def choose_pairs(args: argparse.Namespace) -> Sequence[tuple[str, str]]:
    """The table's pairs, those that --pairs names, or those of them that are in the table."""
    if args.table is None and args.pairs is None:
        raise UserError("--table or --pairs: say what to reproduce, like --table 1 or --pairs resnet32x4:resnet8x4")
    chosen = args.pairs or TABLES[args.table]
    absent = [pair for pair in chosen if args.table and pair not in TABLES[args.table]]
    if absent:
        raise UserError(f"--pairs: {':'.join(absent[0])} is not in table {args.table}; leave --table out")
    return chosen


def show(plan: Plan, jobs: Sequence[Job], rates: Rates, places: int) -> None:
    """Print every row: its seeds by state, and what is left of them will cost."""
    estimates = [estimate(job, rates) for job in jobs]
    rows = defaultdict(list)
    for job, cost in zip(jobs, estimates, strict=True):
        rows[job.row].append((job, cost))
    for row, of_row in rows.items():
        states = ", ".join(f"{n} {state}" for state, n in by_state([job for job, _ in of_row]) if n)
        left = [cost for job, cost in of_row if job.state != "finished"]
        print(f"{states:<24} {row}{f'  ({_describe_cost(left)})' if left else ''}")
    for title, reason in plan.inapplicable:
        print(f"{'does not apply':<24} {title}: {reason}")
    known = [cost.seconds for cost in estimates if cost.seconds is not None]
    unknown = len(estimates) - len(known)
    print(
        f"{len(jobs)} runs: {', '.join(f'{n} {state}' for state, n in by_state(jobs))}; left about "
        f"{format_seconds(sum(known) / places)} with {places} at a time"
        + (f", and {unknown} runs whose cost nothing tells yet (--measure)" if unknown else "")
    )


def _describe_cost(left: Sequence[Estimate]) -> str:
    if any(cost.seconds is None for cost in left):
        return left[0].source
    return f"about {format_seconds(sum(cost.seconds for cost in left))}, {left[0].source}"


def measure(jobs: Sequence[Job], rates: Rates, places: list[dict[str, str]]) -> Rates:
    """The same rates and those of a few steps of every run without one, as far as its teacher is there."""
    unknown = [job for job in jobs if job.state == "missing" and (rates.find(job.config) or ("", ""))[1] != "measured"]
    first = {(job.config.distill, job.config.model_t, job.config.model_s): job for job in reversed(unknown)}
    with tempfile.TemporaryDirectory() as folder:
        short = [
            job._replace(
                command=(*job.command, "--max_steps", MEASURED_STEPS, "--save_dir", folder),
                row=f"{MEASURED_STEPS} steps of {job.row}",
                teacher=None,
            )
            for job in first.values()
            if job.teacher is None or (job.teacher / LAST).exists()
        ]
        run_jobs(short, places[:1], Path(folder, LOGS))
        return Rates([*rates.folders, *Path(folder).iterdir()])


def ready(jobs: Sequence[Job]) -> list[Job]:
    """The jobs to hand on; names the students left out because another process is training their teacher.

    A line of a list and a cluster's job know nothing of that process, so they would start without the teacher.
    """
    running = {job.folder for job in jobs if job.state == "running"}
    chosen = [job for job in jobs if job.state in ("begun", "missing")]
    for job in chosen:
        if job.teacher in running:
            print(
                f"left out: {job.title}: another process is training its teacher in {job.teacher}; start the same "
                "command again when that is finished"
            )
    return [job for job in chosen if job.teacher not in running]


def write_job_list(path: Path, jobs: Sequence[Job]) -> None:
    """One command per line, teachers first."""
    with replacing(path) as temporary:
        lines = "".join(f"{shlex.join(command_line(job))}\n" for job in jobs)
        Path(temporary).write_text(lines, encoding="utf-8")
    print(f"job list: {path}, {len(jobs)} commands")


def make_parser() -> Parser:
    """The flags of this script."""
    parser = Parser(__doc__.rsplit("\n\n", 1)[0])
    add = parser.add_argument
    add("--table", choices=TABLES, help="of the NORM paper: 1, 2: CIFAR-100; 3, 6: ImageNet")
    add("--pairs", type=pairs, metavar="T:S,T:S", help="teacher:student, ...; with --table: only these of its pairs")
    add("--methods", metavar="M,M", help="rows, each with its recipe; default: every method that applies")
    add("--variants", metavar="'M FLAGS; M FLAGS'", help="rows with flags of their own, like 'norm -c 0; norm -s 1'")
    add("--trials", type=count, default=3, metavar="K", help="seeds of every row and of the baseline (3)")
    add("--save_dir", default="save", metavar="ROOT", help="where run folders and models/ lie (save)")
    add("--teacher_flags", type=shlex.split, default=[], metavar="'FLAGS'", help="for teachers only: '--epochs 30'")
    add("--student_flags", type=shlex.split, default=[], metavar="'FLAGS'", help="for distilled ones only")
    add("--dry_run", action="store_true", help="only list")
    add("--measure", action="store_true", help="run a few steps of what was never measured, for the estimate")
    add("--gpus", type=lambda text: [int(part) for part in text.split(",")], metavar="N,N", help="default: free ones")
    add("--jobs", type=count, default=1, metavar="K", help="runs at a time on each GPU, or on the CPU (1)")
    add("--job_list", type=Path, metavar="FILE", help="write the missing runs' commands, one a line, and stop")
    add(
        "--slurm", nargs="*", metavar="NAME=VALUE", help="submit through submitit, with its parameters: timeout_min=600"
    )
    add("--cluster", default="slurm", choices=("slurm", "local", "debug"), help="for --slurm; local tries it here")
    return parser


def main(argv=None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    args = make_parser().parse_args(argv[:end])
    chosen, rows = choose_pairs(args), read_rows(args.methods, args.variants)
    dataset = None if args.table is None else "imagenet" if args.table in IMAGENET_TABLES else "cifar100"
    plan = Plan(args.save_dir, dataset, argv[end + 1 :], args.teacher_flags, args.student_flags)
    jobs = plan.jobs(chosen, rows, args.trials)
    missing = [job for job in jobs if job.state != "finished"]
    places = [{}] if args.dry_run or args.job_list or args.slurm is not None else find_places(args.gpus, args.jobs)
    rates = Rates(sorted(Path(args.save_dir).glob("*/")))
    show(plan, jobs, measure(missing, rates, places) if args.measure else rates, len(places))
    if args.job_list:
        write_job_list(args.job_list, ready(jobs))
    elif args.slurm is not None and not args.dry_run:
        Path(args.save_dir, LOGS).mkdir(parents=True, exist_ok=True)
        for job, handle in submit(ready(jobs), Path(args.save_dir, LOGS), args.slurm, args.cluster):
            print(f"submitted {handle.job_id}: {job.title}")
    elif not args.dry_run:
        failures = run_jobs(missing, places, Path(args.save_dir, LOGS))
        report(jobs)
        if failures:
            raise UserError(f"{len(failures)} of {len(missing)} runs failed; their logs are in {args.save_dir}/{LOGS}")


def report(jobs: Sequence[Job]) -> None:
    """The table of what is finished."""
    from scripts.report import make_report

    folders = [job.folder for job in jobs if (job.folder / RESULT).exists()]
    if folders:
        print(make_report(folders))


if __name__ == "__main__":
    run_script(main)
