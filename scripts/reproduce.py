"""The runs of a table, or of your own choice of pairs and methods: listed, and trained where missing.

python scripts/reproduce.py --table 1 --dry_run
python scripts/reproduce.py --pairs resnet32x4:resnet8x4 --methods kd,norm --trials 3 -- --dataset folder --data PATH

What follows -- goes to every training run. Started again, it resumes where it was stopped; several may work on one
folder of runs.
"""

import argparse
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import UserError, count_of, run_script, starting

with starting():
    from helper.command_line import Parser
    from helper.log import format_duration
    from helper.run_folder import write_text
    from helper.settings import SETTINGS
    from helper.tables.jobs import (
        LOGS,
        Speeds,
        command_line,
        find_places,
        read_parameters,
        ready,
        run_jobs,
        submit,
    )
    from helper.tables.plan import (
        IMAGENET_TABLES,
        TABLES,
        Job,
        Plan,
        Variant,
        all_variants,
        by_state,
        read_pairs,
        read_variants,
    )
    from setting import count, file_to_write, folder_to_write, must_be


@must_be("numbers of GPUs like 0,1")
def gpus(text: str) -> list[int]:
    """0,1 -> numbers of GPUs, read from a flag."""
    return [int(part) for part in text.split(",")]


@must_be("flags with every quotation mark closed")
def flags(text: str) -> list[str]:
    """'--epochs 30' -> the words that a shell would pass on, read from a flag."""
    return shlex.split(text)


def read_rows(methods: str | None, variants: Sequence[str] | None) -> list[Variant]:
    """The rows that are asked for; all of them where nothing is named."""
    if methods is None and variants is None:
        return all_variants()
    rows = read_variants((methods or "").replace(",", ";"), "--methods") + read_variants(";".join(variants or ()))
    return list(dict.fromkeys(rows))


def choose_pairs(args: argparse.Namespace) -> Sequence[tuple[str, str]]:
    """The table's pairs, those that --pairs names, or those of them that are in the table."""
    if args.table is None and args.pairs is None:
        raise UserError("--table or --pairs: say what to reproduce, like --table 1 or --pairs resnet32x4:resnet8x4")
    chosen = args.pairs or TABLES[args.table]
    absent = [pair for pair in chosen if args.table and pair not in TABLES[args.table]]
    if absent:
        raise UserError(f"--pairs: {':'.join(absent[0])} is not in table {args.table}; leave --table out")
    return chosen


def show(plan: Plan, jobs: Sequence[Job], speeds: Speeds, places: int) -> None:
    """Print every row: its seeds by state, and how long what is left of them will take."""
    rows = defaultdict(list)
    for job in jobs:
        rows[job.row].append(job)
    total, unknown = 0.0, 0
    for row, of_row in rows.items():
        states = ", ".join(f"{n} {state}" for state, n in by_state(of_row) if n)
        left = [job for job in of_row if job.state in ("begun", "missing")]
        speed = speeds.estimate(of_row[0].config) if left else None
        about = "" if speed is None else f"  (about {format_duration(len(left) * speed[1])}, {speed[0]:.0f} images/s)"
        total, unknown = total + (len(left) * speed[1] if speed else 0), unknown + (0 if speed else len(left))
        print(f"{states:<24} {row}{about}")
    for title, reason in plan.inapplicable:
        print(f"{'does not apply':<24} {title}: {reason}")
    pace = "one after the other" if places == 1 else f"with {places} at a time"
    times = [f"about {format_duration(total / places)}"] if total else []
    times += [f"unknown for {count_of(unknown, 'run')} (none like them was measured yet)"] if unknown else []
    left_over = f"left {pace}: {', '.join(times) or 'what other processes are training'}"
    if all(job.state == "finished" for job in jobs):
        left_over = "nothing is left to train"
    print(f"{count_of(len(jobs), 'run')}: {', '.join(f'{n} {state}' for state, n in by_state(jobs))}; {left_over}")


def choose_places(args: argparse.Namespace) -> list[dict[str, str]]:
    """Where runs train at a time; one place where they are handed on, or only listed while no GPU is free."""
    if args.job_list or args.slurm is not None:
        return [{}]
    try:
        return find_places(args.gpus, args.jobs)
    except UserError:
        if not args.dry_run:
            raise
        return [{}]


def write_job_list(path: Path, jobs: Sequence[Job]) -> None:
    """One command per line, teachers first."""
    write_text(path, "".join(f"{shlex.join(command_line(job))}\n" for job in jobs))
    print(f"job list: {path}, {count_of(len(jobs), 'command')}")


def make_parser() -> Parser:
    """The flags of this script."""
    parser = Parser.of_script(__doc__, paragraphs=2)
    add = parser.add_argument
    add("--table", choices=TABLES, help="of the NORM paper: 1, 2: CIFAR-100; 3, 6: ImageNet")
    add(
        "--pairs",
        type=read_pairs,
        metavar="T:S,T:S",
        help="teacher:student, teacher+teacher:student; with --table: only these of its pairs",
    )
    add("--methods", metavar="M,M", help="rows, each with its recipe; default: every method that applies")
    add(
        "--variants",
        action="append",
        metavar="'M FLAGS; M FLAGS'",
        help="rows with flags of their own, like 'norm -c 0; norm -s 1'; may be given again",
    )
    add("--trials", type=count, default=3, metavar="K", help="seeds of every row and of the baseline (3)")
    add(
        "--save_dir",
        type=folder_to_write,
        default="save",
        metavar="ROOT",
        help="where run folders and models/ are (save)",
    )
    add("--teacher_flags", type=flags, default=[], metavar="'FLAGS'", help="for teachers only: '--epochs 30'")
    add("--student_flags", type=flags, default=[], metavar="'FLAGS'", help="for distilled students only")
    add("--dry_run", action="store_true", help="only list")
    add("--gpus", type=gpus, metavar="N,N", help="GPUs to train on; default: those that are free")
    add("--jobs", type=count, default=1, metavar="K", help="runs at a time on each GPU, or on the CPU (1)")
    add("--job_list", type=file_to_write, metavar="FILE", help="write the missing runs' commands, one a line, and stop")
    add(
        "--slurm", nargs="*", metavar="NAME=VALUE", help="submit through submitit, with its parameters: timeout_min=600"
    )
    add("--cluster", default="slurm", choices=("slurm", "local", "debug"), help="for --slurm; local tries it here")
    return parser


def parse(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """The flags of this script; those of the runs are pointed behind --."""
    _, unknown = parser.parse_known_args(argv)
    flags = {name for setting in SETTINGS for name in setting.names}
    if unknown and unknown[0].partition("=")[0] in flags:
        raise UserError(f"{unknown[0]}: flags of the runs come last, behind --, like -- {' '.join(unknown)}")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--") if "--" in argv else len(argv)
    args = parse(make_parser(), argv[:end])
    read_parameters(args.slurm or ())  # a dry run says too what is wrong with them
    chosen, rows = choose_pairs(args), read_rows(args.methods, args.variants)
    dataset = None if args.table is None else "imagenet" if args.table in IMAGENET_TABLES else "cifar100"
    plan = Plan(str(args.save_dir), dataset, argv[end + 1 :], args.teacher_flags, args.student_flags)
    jobs = plan.jobs(chosen, rows, args.trials)
    places = choose_places(args)
    show(plan, jobs, Speeds(str(args.save_dir)), len(places))
    logs = args.save_dir / LOGS
    if args.job_list:
        write_job_list(args.job_list, ready(jobs))
    elif args.slurm is not None and not args.dry_run:
        for job, handle in submit(ready(jobs), logs, args.slurm, args.cluster):
            print(f"submitted {handle.job_id}: {job.title}")
    elif not args.dry_run:
        train(plan, jobs, places)


def train(plan: Plan, jobs: Sequence[Job], places: Sequence[dict[str, str]]) -> None:
    """Train what is missing and print the table of what is finished; raises `UserError` where runs failed."""
    from scripts.report import print_report

    missing = [job for job in jobs if job.state != "finished"]
    failures = run_jobs(missing, places, plan.shelf)
    finished = [job.folder for job in map(plan.shelf.renew, jobs) if job.state == "finished"]
    if finished:
        print_report(finished)
    if failures:
        logs = Path(plan.save_dir, LOGS)
        raise UserError(f"{len(failures)} of {len(missing)} runs failed; their logs are in {logs}")


if __name__ == "__main__":
    run_script(main)
