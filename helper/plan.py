"""The runs of a table: which there are, which exist, which command trains each that does not."""

import copy
import itertools
import json
import re
import shlex
import zlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from distiller_zoo import DISTILLERS, find_distiller
from errors import UserError
from helper.configuration import foresee, run_name
from helper.options import student_parser, teacher_parser
from helper.recipes import CIFAR_PAIRS
from helper.run_folder import CONFIG, LAST, PREVIOUS, RESULT, is_taken, run_candidates
from helper.run_state import build_distiller
from helper.teacher import TeacherFile
from models import build_model
from models.backbone import Backbone
from models.external import is_external

#: The pairs of the NORM paper's tables: CIFAR-100 within a family, across families; ImageNet.
TABLES = {
    "1": CIFAR_PAIRS[:7],
    "2": CIFAR_PAIRS[7:],
    "3": (("resnet34", "resnet18"), ("resnet50", "MobileNet")),
    "6": (("resnet50", "resnet50_4"),),
}
IMAGENET_TABLES = ("3", "6")
#: What a table has beside one row per method: (method, flags).
COMBINATIONS = (("ft", "--ft plain"), ("ft", "--ft default"), ("crd", "-a 1"), ("norm", "-a 1"))
#: What does not make a run another one.
IRRELEVANT = (
    "trial",
    "data_seed",
    "path_t",
    "allow_teacher_gap",
    "origins",
    "save_dir",
    "resume",
    "num_workers",
    "device",
    "print_freq",
    "save_freq",
    "save_every_steps",
)
PUBLISHED_TEACHER = "{teacher}_vanilla/ckpt_epoch_240.pth"
#: Of a job; of several runs with its configuration the first of these is the one that counts.
STATES = ("finished", "running", "begun", "missing")
#: Characters of flags in a trial's name, where a path may be among them: systems take names of 255.
LONGEST_TRIAL = 80
#: Flags of the training scripts that a plan sets itself, and what to use instead.
SET_BY_PLAN = {
    **dict.fromkeys(("--trial", "--trials", "--seed"), "--trials K of reproduce.py trains seeds 1 to K of every row"),
    "--sweep": "--variants 'METHOD FLAGS; METHOD FLAGS' of reproduce.py lists such rows",
    "--resume": "leave it out, a run that was begun is gone on with anyway",
    "--save_dir": "give reproduce.py --save_dir itself, before any --",
    **dict.fromkeys(("--model", "--model_s", "--model_t"), "--pairs TEACHER:STUDENT of reproduce.py names networks"),
    "--path_t": "leave it out, reproduce.py trains or finds the teachers of --pairs",
    "--distill": "--methods or --variants of reproduce.py name methods",
}


class Variant(NamedTuple):
    """A row of a table: a method, and the flags in which it differs from its recipe."""

    distill: str
    flags: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " ".join((self.distill, *self.flags))


class Job(NamedTuple):
    """One run of a table."""

    row: str  # networks and method
    config: Namespace
    folder: Path  # where it lies, or will lie
    state: str  # one of `STATES`; running is in another process
    command: tuple[str, ...]  # script and flags that train what is left of it
    teacher: Path | None = None  # the folder of another job that must be finished first

    @property
    def title(self) -> str:
        return f"{self.row}, seed {self.config.seed}"


def trial_names(number: int, flags: Sequence[str]) -> tuple[str, ...]:
    """Names of a trial in the run folder's name: 1; with `-b 11` 1_b11 and, where other flags have that, 1_b_11."""
    if not flags:
        return (str(number),)
    short = re.sub(r"[^A-Za-z0-9.]", "", "".join(flags))
    words = (re.sub(r"[^A-Za-z0-9_.-]", "-", re.sub(r"^--?(?=[A-Za-z])", "", word)) for word in flags)
    long = "_".join(words)
    if len(long) > LONGEST_TRIAL:
        long = f"{long[:LONGEST_TRIAL]}_{zlib.crc32(' '.join(flags).encode()):08x}"
    return f"{number}_{short}", f"{number}_{long}"


def refuse_flags_of_plan(flags: Sequence[str], place: str) -> None:
    """Raise `UserError` for flags that the plan sets itself: they would be lost, or make all seeds one."""
    for name in (word.partition("=")[0] for word in flags):
        if name in SET_BY_PLAN:
            raise UserError(f"{name}: does not belong {place}, the plan sets it; {SET_BY_PLAN[name]}")


def read_variants(text: str) -> list[Variant]:
    """norm -c 0; norm -s 1 -> the rows; raises `UserError` for an unknown method."""
    words = [shlex.split(part) for part in text.split(";") if part.strip()]
    for distill, *flags in words:
        find_distiller(distill)
        refuse_flags_of_plan(flags, "in --variants")
    return [Variant(distill.lower(), tuple(flags)) for distill, *flags in words]


def all_variants() -> list[Variant]:
    """Every method with its recipe, and the combinations that tables list; `ce` is the baseline, which is no row."""
    combined = [Variant(distill, tuple(flags.split())) for distill, flags in COMBINATIONS]
    spelled_out = {"ft", "ce"}
    return [*(Variant(name) for name in DISTILLERS if name not in spelled_out), *combined]


class Plan:
    """Lists the jobs of pairs, rows and seeds; `common` are flags of every run, `of_teacher` those of teachers,
    `of_student` those of what a teacher teaches."""

    def __init__(
        self,
        save_dir: str,
        dataset: str | None = None,
        common: Sequence[str] = (),
        of_teacher: Sequence[str] = (),
        of_student: Sequence[str] = (),
    ):
        refuse_flags_of_plan(common, "behind --")
        refuse_flags_of_plan(of_teacher, "in --teacher_flags")
        refuse_flags_of_plan(of_student, "in --student_flags")
        self.save_dir, self.common = save_dir, tuple(common)
        self.of_teacher, self.of_student = tuple(of_teacher), tuple(of_student)
        names_dataset = any(word.partition("=")[0] == "--dataset" for word in common)
        self.common += ("--dataset", dataset) if dataset and not names_dataset else ()
        self.inapplicable: list[tuple[str, str]] = []  # (title, reason)
        self._claimed: dict[str, tuple[str, Namespace]] = {}  # a run's name -> (row, configuration) that has it
        self._teacher_parser, self._student_parser = teacher_parser(), student_parser()
        self._networks: dict[str, Backbone] = {}

    def jobs(self, pairs: Sequence[tuple[str, str]], variants: Sequence[Variant], trials: int) -> list[Job]:
        """Teachers and baselines first, then every row of every pair, seed by seed."""
        self._claimed.clear()
        # Baselines are asked first, so that they keep the plain names: a teacher with flags of its own takes another.
        students = dict.fromkeys(student for _, student in pairs)
        baselines = [self._network(student, number) for student in students for number in range(1, trials + 1)]
        teachers = {name: self._teacher(name) for name in dict.fromkeys(teacher for teacher, _ in pairs)}
        jobs = [job for job in teachers.values() if isinstance(job, Job)] + baselines
        for (teacher, student), variant in itertools.product(pairs, variants):
            if self._applies(teacher, student, variant, teachers[teacher]):
                for number in range(1, trials + 1):
                    jobs.append(self._student(teachers[teacher], teacher, student, variant, number))
        listed: dict[Path, Job] = {}
        for job in jobs:  # of a network that is teacher and baseline the teacher's job stays, with its --save_freq
            listed.setdefault(job.folder, job)
        return list(listed.values())

    def _teacher(self, name: str) -> "Job | str":
        """The job of a teacher, or what --path_t says of a published one, where there is one."""
        job = self._network(name, 1, self.of_teacher)
        if job.config.dataset == "imagenet":
            return name if is_external(name) else f"torchvision:{name}"
        published = Path(self.save_dir, "models", PUBLISHED_TEACHER.format(teacher=name))
        return str(published) if job.config.dataset == "cifar100" and published.exists() else job

    def _network(self, name: str, number: int, flags: Sequence[str] = ()) -> Job:
        argv = ["--model", name, "--seed", str(number), "--save_dir", self.save_dir, *self.common, *flags]
        config = foresee(_given(self._teacher_parser, argv), None)
        row = " ".join((f"{name} with labels alone", *flags))
        names = (str(number), trial_names(number, flags)[-1])
        return self._job(row, config, ("train_teacher.py", *argv), names)

    def _student(self, source: "Job | str", teacher: str, student: str, variant: Variant, number: int) -> Job:
        method = DISTILLERS[variant.distill]
        argv = ["--distill", variant.distill, "--model_s", student, *variant.flags, *self.common]
        argv += ["--seed", str(number), "--save_dir", self.save_dir]
        waits, file = None, None
        if method.needs_teacher:
            waits = source.folder if isinstance(source, Job) else None
            path = str(source.folder / LAST) if isinstance(source, Job) else source
            argv += ["--path_t", path, *self.of_student]
            if is_external(path):  # torchvision's weights of a name fit our network and theirs
                argv += ["--model_t", teacher]
            data = vars(source.config) if isinstance(source, Job) else {}
            fields = (data.get(name) for name in ("dataset", "data", "image_size"))
            file = TeacherFile(path, teacher, None, 0, *fields, None)
        config = foresee(_given(self._student_parser, argv), file)
        row = f"{f'{teacher} -> {student}' if method.needs_teacher else student}: {variant.label}"
        script = "train_imagenet_student.py" if config.dataset == "imagenet" else "train_cifar_student.py"
        return self._job(row, config, (script, *argv), trial_names(number, variant.flags), waits)

    def _job(
        self, row: str, config: Namespace, command: tuple[str, ...], names: Sequence[str], waits: Path | None = None
    ) -> Job:
        """The job under the trial name that a run of it has; else under the first that no other job has."""
        named = [Namespace(**vars(config) | {"trial": name}) for name in dict.fromkeys(names)]
        found = [(one, *find_run(self.save_dir, one)) for one in named]
        known = [one for one in found if one[2] != "missing"]
        one, folder, state = min(known or self._unclaimed(row, found), key=lambda one: STATES.index(one[2]))
        self._claimed.setdefault(run_name(one), (row, one))
        return _with_state(Job(row, one, folder, "missing", (*command, "--trial", one.trial), waits), folder, state)

    def _unclaimed(self, row: str, found: list[tuple[Namespace, Path, str]]) -> list[tuple[Namespace, Path, str]]:
        """Those whose run's name no job with another configuration has; raises `UserError` where there is none."""
        others = [self._claimed.get(run_name(one), (row, one)) for one, *_ in found]
        free = [one for one, (_, other) in zip(found, others, strict=True) if _agree(vars(one[0]), vars(other))]
        if not free:
            raise UserError(
                f"--variants: {row} and {others[0][0]} would have one run folder, {found[0][1]}; leave one of them out "
                "and start it by itself when the other is there"
            )
        return free

    def _applies(self, teacher: str, student: str, variant: Variant, source: "Job | str") -> bool:
        """Whether the method can be built on the pair; notes why not."""
        config = self._student(source, teacher, student, variant, 1).config
        targets = torch.arange(50_000) % 10
        try:
            with torch.device("meta"):  # shapes alone, so that hundreds of rows are listed in seconds
                for name in (teacher, student):
                    self._networks.setdefault(name, build_model(name, 10))
                networks = copy.deepcopy(self._networks[student]), self._networks[teacher]
                build_distiller(vars(config), *networks, 10, config.image_size, targets)
        except UserError as error:
            self.inapplicable.append((f"{teacher} -> {student}: {variant.label}", str(error)))
            return False
        except (NotImplementedError, RuntimeError):
            pass  # it reads numbers, which a network without weights does not have; its shapes were fine so far
        return True


def _with_state(job: Job, folder: Path, state: str) -> Job:
    command = (job.command[0], "--resume", str(folder)) if state == "begun" else job.command
    return job._replace(folder=folder, state=state, command=command)


def renew(job: Job) -> Job:
    """The job as it stands by now: another process may have begun or finished it."""
    folder, state = find_run(job.config.save_dir, job.config)
    return job if state == job.state else _with_state(job, folder, state)


def find_run(save_dir: str, config: Namespace) -> tuple[Path, str]:
    """(the folder of a run with this configuration, its state), or (a free folder for it, missing)."""
    begun = None
    for folder in run_candidates(save_dir, run_name(config)):
        if not folder.exists():
            return begun or (folder, "missing")
        if not _same(folder, config):
            continue
        if (folder / RESULT).exists():
            return folder, "finished"
        if is_taken(folder):
            return folder, "running"
        if (folder / LAST).exists() or (folder / PREVIOUS).exists():
            begun = (folder, "begun")
    raise AssertionError("there is always a next number")


def _same(folder: Path, config: Namespace) -> bool:
    """Whether a run folder's configuration is this one, in all that both of them name and that matters."""
    try:
        stored = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    stored.setdefault("init", None)  # runs from before there was --init had none
    return _agree(json.loads(json.dumps(vars(config))), stored)


def _agree(first: dict, second: dict) -> bool:
    """Whether two configurations are one in all that both of them name and that matters."""
    shared = (first.keys() & second.keys()) - set(IRRELEVANT)
    return all(first[name] == second[name] for name in shared)


def _given(parser, argv: Sequence[str]) -> dict:
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}


def by_state(jobs: Sequence[Job]) -> Iterator[tuple[str, int]]:
    """How many jobs are in which state."""
    for state in STATES:
        number = sum(job.state == state for job in jobs)
        if number or state != "running":
            yield state, number
