"""The runs of a table: which there are, which exist, which command trains each that does not."""

import copy
import itertools
import os
import re
import shlex
import zlib
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from distiller_zoo import DISTILLERS, build_distiller, find_distiller
from errors import UserError
from helper.command_line import parse, resolve, student_parser, teacher_parser
from helper.configuration import Configuration, run_key
from helper.networks import INIT, Network, digest_together, naming, read_network, with_class_names
from helper.recipes import CIFAR_PAIRS, IMAGENET_PAIRS
from helper.run_folder import CONFIG, LAST, PREVIOUS, is_taken, next_folder
from helper.settings import FOUND, SETTINGS
from helper.tables.records import read_config, read_result
from helper.tables.rows import key_text
from models import build_model, find_builder
from models.backbone import Backbone, Output, probe_shapes
from models.checkpoints import read_checkpoint
from models.ensemble import Ensemble, shares_of
from models.external import DROPS, is_external

#: The pairs of the NORM paper's tables: CIFAR-100 within a family, across families; ImageNet.
TABLES = {
    "1": CIFAR_PAIRS[:7],
    "2": CIFAR_PAIRS[7:],
    "3": IMAGENET_PAIRS[:2],
    "6": IMAGENET_PAIRS[2:],
}
IMAGENET_TABLES = ("3", "6")
#: What a table has besides one row per method: (method, flags).
COMBINATIONS = (("ft", "--ft plain"), ("ft", "--ft default"), ("crd", "-a 1"), ("norm", "-a 1"))
PUBLISHED_TEACHER = "{teacher}_vanilla/ckpt_epoch_240.pth"
#: Of a job; of several runs with its settings the first of these is the one that counts.
STATES = ("finished", "running", "begun", "missing")
#: Characters of flags in a trial's name, where a path may be among them: systems take names of 255.
LONGEST_TRIAL = 80
#: Flags of the training scripts that a plan sets itself, and what to use instead.
SET_BY_PLAN = {
    "--trials K of reproduce.py trains seeds 1 to K of every row": "--trial --trials --seed",
    "--variants 'METHOD FLAGS; METHOD FLAGS' of reproduce.py lists such rows": "--sweep",
    "leave it out, a run that was begun is resumed anyway": "--resume",
    "give reproduce.py --save_dir itself, before any --": "--save_dir",
    "--pairs TEACHER:STUDENT of reproduce.py names networks": "--model --model_s --model_t",
    "leave it out, reproduce.py trains or finds the teachers of --pairs A:STUDENT and A+B:STUDENT": "--path_t",
    "--methods or --variants of reproduce.py name methods": "--distill",
}
DIGEST = "teacher_digest"
#: What only the run itself finds out: a plan reads the files of weights, not the data.
FOUND_OUT = {setting.argument for setting in SETTINGS if setting.group == FOUND} - {DIGEST, "init_digest"}
#: The digests of files' weights, and the path that each is of.
DIGESTS = {one.argument: one.instead_of for one in SETTINGS if one.instead_of and one.argument not in FOUND_OUT}


def teachers_of(teacher: str) -> list[str]:
    """The names in the first part of a pair: of one teacher, or of several that teach together, A+B."""
    return teacher.split("+")


def read_pairs(text: str) -> list[tuple[str, str]]:
    """(teacher, student) names, read from a flag like resnet32x4:resnet8x4,wrn_40_2:ShuffleV1; of several teachers
    their names with + between them."""
    name = "(?:timm:|torchvision:)?[^:+]+"
    matches = [re.fullmatch(rf"({name}(?:\+{name})*):({name})", part) for part in text.split(",")]
    found = [(match[1], match[2]) for match in matches if match]
    if len(found) < len(matches):
        raise ArgumentTypeError(
            f"must be pairs like resnet32x4:resnet8x4,wrn_40_2:ShuffleV1, or like A+B:STUDENT, not {text}"
        )
    for network in {network for teacher, student in found for network in (*teachers_of(teacher), student)}:
        try:
            find_builder(network)
        except UserError as error:
            raise ArgumentTypeError(str(error)) from None  # argparse names the flag
    return found


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
    config: Configuration
    flags: tuple[str, ...]  # of the script, but for --trial and --path_t
    sources: tuple["Job | str", ...] = ()  # its teachers: runs of the plan, and files or published weights
    folder: Path = Path()  # where it is, or will be
    state: str = "missing"  # one of `STATES`; running is in another process

    @property
    def title(self) -> str:
        return f"{self.row}, seed {self.config.seed}"

    @property
    def key(self) -> str:
        """Equal for two jobs that would train the same run."""
        if not self.teachers:
            return _planned_key(self.config)
        names = (source.key if isinstance(source, Job) else source for source in self.sources)
        return " ".join((_planned_key(self.config, with_teacher=False), *names))

    @property
    def teachers(self) -> list["Job"]:
        """The runs of the plan that must be finished first."""
        return [source for source in self.sources if isinstance(source, Job)]

    @property
    def command(self) -> tuple[str, ...]:
        """Script and flags that train what is left of it."""
        distill, dataset = self.config.distill, self.config.dataset
        of_student = "train_imagenet_student.py" if dataset == "imagenet" else "train_cifar_student.py"
        script = "train_teacher.py" if distill == "ce" else of_student
        if self.state == "begun":
            return script, "--resume", str(self.folder)
        path = self.config.path_t
        trial = ("--trial", self.config.trial)
        return (script, *self.flags, *(("--path_t", path) if path else ()), *trial)


def _planned_key(config: Mapping[str, Any], with_teacher: bool = True) -> str:
    """What a plan can know of a run's `run_key`, as a text. Weights of another library are their name."""
    published = {digest: None for digest, path in DIGESTS.items() if is_external(config.get(path) or "")}
    left_out = FOUND_OUT if with_teacher else FOUND_OUT | {DIGEST, DIGESTS[DIGEST]}
    told = run_key({**config, **published, **dict.fromkeys(FOUND_OUT)})
    return key_text({name: value for name, value in told.items() if name not in left_out})


def trial_name(number: int, flags: Sequence[str]) -> str:
    """The name of a trial in the run folder's name: 1; with `-b 11` 1_b_11, with `-b 1e-5` 1_b_1e_5."""
    words = [re.sub(r"[^A-Za-z0-9_.-]", "-", re.sub(r"^--?(?=[A-Za-z])", "", word)) for word in flags]
    name = re.sub(r"-(\d+)$", r"_\1", "_".join(words))  # name-5 is the folder of a fifth run of one name
    if len(name) > LONGEST_TRIAL:
        name = f"{name[:LONGEST_TRIAL]}_{zlib.crc32(' '.join(flags).encode()):08x}"
    return f"{number}_{name}" if name else str(number)


def refuse_flags_of_plan(flags: Sequence[str], place: str) -> None:
    """Raise `UserError` for flags that the plan sets itself: they would be lost, or make all seeds one."""
    for name in (word.partition("=")[0] for word in flags):
        for instead, names in SET_BY_PLAN.items():
            if name in names.split():
                raise UserError(f"{name}: does not belong {place}, the plan sets it; {instead}")


def read_variants(text: str, flag: str = "--variants") -> list[Variant]:
    """norm -c 0; norm -s 1 -> the rows; raises `UserError`, naming the flag, for an unknown method."""
    words = [shlex.split(part) for part in text.split(";") if part.strip()]
    for _, *flags in words:
        refuse_flags_of_plan(flags, "in --variants")
    return [Variant(find_distiller(distill, flag).name, tuple(flags)) for distill, *flags in words]


def all_variants() -> list[Variant]:
    """Every method with its recipe, and the combinations that tables list; `ce` is the baseline, which is no row."""
    combined = [Variant(distill, tuple(flags.split())) for distill, flags in COMBINATIONS]
    spelled_out = {"ft", "ce"}
    return [*(Variant(name) for name in DISTILLERS if name not in spelled_out), *combined]


class Shelf:
    """The runs of a folder, found by their settings whatever their folders are called; read again where they change."""

    def __init__(self, save_dir: str):
        self.save_dir = save_dir
        self._read: dict[tuple, dict | None] = {}  # a config.json as it was -> its settings
        self._digests: dict[tuple, str] = {}
        self._runs: dict[str, list[Path]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look for what has changed."""
        self._runs = {}
        try:
            folders = sorted(Path(self.save_dir).iterdir())
        except OSError:
            return
        for folder in folders:
            config = self._config(folder)
            if config is not None:
                self._runs.setdefault(_planned_key(config), []).append(folder)

    def _config(self, folder: Path) -> dict | None:
        version = _version(folder / CONFIG)
        if version is None:
            return None
        if version not in self._read:
            try:
                self._read[version] = read_config(folder)
            except UserError:
                self._read[version] = None  # report.py names it
        return self._read[version]

    def find(self, config: Configuration) -> tuple[Path, str]:
        """(the folder of a run with these settings, its state), or (the folder that a new one gets, missing)."""
        found = [(folder, _state(folder)) for folder in self._runs.get(_planned_key(config), ())]
        found = [one for one in found if one[1] != "missing"]
        if not found:
            return next_folder(self.save_dir, config.name), "missing"
        return min(found, key=lambda one: STATES.index(one[1]))

    def digest(self, path: Path, name: str, flag: str = "--save_dir", ema: bool = False) -> str:
        """Of a file's weights, a teacher's or initial ones; raises `UserError` where the file is gone or none."""
        version = _version(path)
        if version is None:
            raise UserError(f"{flag}: {path} is gone, which the students of {name} read")
        key = (*version, ema)
        if key not in self._digests:
            record = read_checkpoint(path, flag).get("record")
            known = record.get("digest") if isinstance(record, Mapping) else None
            if isinstance(known, str) and not ema:  # it is of the raw weights
                self._digests[key] = known
            else:
                self._digests[key] = read_network(str(path), name, flag, "--model_s", ema).digest
        return self._digests[key]

    def renew(self, job: Job) -> Job:
        """The job as it is by now: another process may have begun or finished it, or one of its teachers."""
        if job.teachers:
            sources = tuple(self.renew(each) if isinstance(each, Job) else each for each in job.sources)
            job = job._replace(sources=sources)
            if any(teacher.state != "finished" for teacher in job.teachers):  # whatever exists has learnt from another
                return job._replace(folder=next_folder(self.save_dir, job.config.name), state="missing")
            job = self.with_digest(job)
        folder, state = self.find(job.config)
        return job._replace(folder=folder, state=state)

    def with_digest(self, job: Job) -> Job:
        """A job whose teachers are files, with the digest of their weights that the run will compute."""
        paths, names, shares = _paths(job.sources), job.config.model_t.split(","), job.config.teacher_weights
        pairs = zip(paths, names, strict=True)
        digests = [self.digest(Path(path), name, ema=job.config.ema) for path, name in pairs]
        digest = digests[0] if shares is None else digest_together(digests, shares)
        return job._replace(config=job.config.replace("teacher", path_t=",".join(paths), **{DIGEST: digest}))


def _paths(sources: Sequence[Job | str]) -> list[str]:
    """What --path_t says of each teacher."""
    return [str(each.folder / LAST) if isinstance(each, Job) else each for each in sources]


def _version(path: Path) -> tuple | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return str(path), status.st_mtime_ns, status.st_size, status.st_ino


def _state(folder: Path) -> str:
    """What has become of the run of a folder; a result that no report would show is none."""
    try:
        read_result(folder)
        return "finished"
    except UserError:
        if is_taken(folder):
            return "running"
        has_checkpoint = (folder / LAST).exists() or (folder / PREVIOUS).exists()
        return "begun" if has_checkpoint else "missing"


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
        self.save_dir, self.shelf = save_dir, Shelf(save_dir)
        self.of_teacher, self.of_student = tuple(of_teacher), tuple(of_student)
        names_dataset = any(word.partition("=")[0] == "--dataset" for word in common)
        self.common = (*common, *(("--dataset", dataset) if dataset and not names_dataset else ()))
        self.inapplicable: list[tuple[str, str]] = []  # (title, reason)
        self._parsers = {"--model": teacher_parser(), "--distill": student_parser()}
        self._given: dict[tuple[str, ...], dict[str, Any]] = {}
        self._networks: dict[tuple[str, str], Backbone] = {}

    def jobs(self, pairs: Sequence[tuple[str, str]], variants: Sequence[Variant], trials: int) -> list[Job]:
        """Teachers and baselines first, then every row of every pair, seed by seed."""
        self.shelf.refresh()
        self.inapplicable.clear()
        students = dict.fromkeys(student for _, student in pairs)
        teachers = dict.fromkeys(name for pair in pairs for name in teachers_of(pair[0]))
        sources = {name: self._source(name) for name in teachers}
        jobs = [source for source in sources.values() if isinstance(source, Job)]
        jobs += [self._network(student, number) for student in students for number in range(1, trials + 1)]
        for (teacher, student), variant in itertools.product(pairs, variants):
            of_pair = tuple(sources[name] for name in teachers_of(teacher))
            first = self._student(of_pair, teacher, student, variant, 1)
            reason = self._refusal(teacher, student, first)
            if reason:
                self.inapplicable.append((first.row, reason))
                continue
            rest = range(2, trials + 1)
            jobs += [first, *(self._student(of_pair, teacher, student, variant, number) for number in rest)]
        listed: dict[str, Job] = {}
        for job in jobs:  # of a network that is teacher and baseline the teacher's job stays, with its --save_freq
            listed.setdefault(job.key, job)
        return [self.shelf.renew(job) for job in listed.values()]

    def _source(self, name: str) -> Job | str:
        """The job of a teacher, or what --path_t says of a published one, where there is one."""
        job = self._network(name, 1, self.of_teacher)
        if job.config.dataset == "imagenet":
            return name if is_external(name) else f"torchvision:{name}"
        published = Path(self.save_dir, "models", PUBLISHED_TEACHER.format(teacher=name))
        if job.config.dataset == "cifar100" and published.exists():
            return str(published)
        return self.shelf.renew(job)

    def _network(self, name: str, number: int, flags: Sequence[str] = ()) -> Job:
        own = self._job(f"{name} with labels alone", ("--model", name, *self.common, *flags), number, flags)
        if is_external(name):
            self._foreign_of_shapes(name, "student", own.config)
        if not flags:
            return own
        usual = self._network(name, number)
        if own.key == usual.key:  # the flags change no result
            return own._replace(config=own.config.replace("--trial", trial=usual.config.trial))
        return own._replace(row=f"{own.row} {' '.join(flags)}")

    def _student(
        self, sources: tuple[Job | str, ...], teacher: str, student: str, variant: Variant, number: int
    ) -> Job:
        if variant.distill == "ce":
            return self._network(student, number, variant.flags)
        words = ("--distill", variant.distill, "--model_s", student, *self.common)
        if not DISTILLERS[variant.distill].reads_teacher:
            return self._job(f"{student}: {variant.label}", (*words, *variant.flags), number, variant.flags)
        words += (*self.of_student, *variant.flags)  # of one that is given twice the last counts: the row's own
        first, *others = sources
        known: dict[str, Any] = {"model_t": ",".join(teachers_of(teacher)), "path_t": ",".join(_paths(sources))}
        known["teacher_weights"] = shares_of(None, len(sources)) if others else None
        if isinstance(first, Job):
            known |= {name: first.config[name] for name in Network._fields if name in first.config}
        published = is_external(known["path_t"])
        if published:  # torchvision's weights of a name fit our network and theirs
            words += ("--model_t", known["model_t"])
        job = self._job(f"{teacher} -> {student}: {variant.label}", words, number, variant.flags, known)
        with naming("--teacher_weights"):
            if not others and job.config.teacher_weights is not None:
                raise UserError(f"{teacher}:{student} has one teacher; name several, {teacher}+OTHER:{student}")
            shares_of(job.config.teacher_weights, len(sources))
        job = job._replace(sources=sources)
        return job if job.teachers or published else self.shelf.with_digest(job)

    def _job(
        self,
        row: str,
        words: tuple[str, ...],
        number: int,
        flags: Sequence[str],
        of_teacher: Mapping[str, Any] | None = None,
    ) -> Job:
        """The job of a seed, whose flags are `words`; those that its trial is named by are `flags`."""
        if words not in self._given:
            [given] = parse(self._parsers[words[0]], words).runs
            self._given[words] = with_class_names(given)
        trial = trial_name(number, flags)
        given = dict(self._given[words], seed=number, trial=trial, save_dir=self.save_dir)
        config = resolve(given, of_teacher=of_teacher)
        if config.init is not None and os.path.isfile(config.init):
            found = self.shelf.digest(Path(config.init), config.model_s, INIT, config.ema)
            config = config.replace("initial weights", init_digest=found)
        return Job(row, config, (*words, "--seed", str(number), "--save_dir", self.save_dir))

    def _network_of_shapes(self, name: str, role: str) -> Backbone:
        """A network without values, whose passes cost nothing from the second on."""
        if (name, role) not in self._networks:
            network = build_model(name, 10)
            with torch.device("cpu"):  # what is computed without values imports torch's compiler, which takes a second
                computing = build_model(name, 10).eval()
            network.outputs = _remembering(computing.outputs)
            network.get_bn_before_relu = lambda: computing.get_bn_before_relu()  # OFD reads their weights
            self._networks[name, role] = network
        return self._networks[name, role]

    def _foreign_of_shapes(self, name: str, role: str, config: Configuration) -> Backbone:
        """The same of another library, which is split by the numbers it computes: built with them first, as its run
        does; raises `UserError` where that is impossible."""
        drops = {one: rate for one in DROPS if role == "student" and (rate := config[one]) is not None}
        key = name, f"{role} {config.image_size} {drops}"
        if key not in self._networks:
            computing = build_model(name, 10, config.image_size, drops).eval()
            network = copy.deepcopy(computing).to("meta")
            network.outputs = _remembering(computing.outputs)
            probe_shapes(network, config.image_size)
            self._networks[key] = network
        return self._networks[key]

    def _refusal(self, teacher: str, student: str, job: Job) -> str:
        """Why the method cannot be built on the pair; empty where it can, or where that depends on the images that
        another library's published teacher sees."""
        config, names = job.config, teachers_of(teacher) if job.config.model_t else []
        targets = torch.arange(1000) % 10  # more than a batch, and few: a method may sort them
        if any(is_external(name) for name in names) and len(job.teachers) < len(names):
            return ""
        known = [(student, "student"), *((name, "teacher") for name in names)]
        try:
            foreign = {one: self._foreign_of_shapes(*one, config) for one in known if is_external(one[0])}
            with torch.device("meta"), ShapesAlone():  # so that hundreds of rows are listed in seconds
                of_student, *networks = (foreign.get(one) or self._network_of_shapes(*one) for one in known)
                of_teacher = Ensemble(networks) if len(networks) > 1 else next(iter(networks), None)
                parts = list(of_student.modules())
                try:
                    build_distiller(config, of_student, of_teacher, 10, config.image_size, targets)
                finally:
                    if list(of_student.modules()) != parts:  # a method that replaces parts of its student
                        self._networks = {key: one for key, one in self._networks.items() if one is not of_student}
        except UserError as error:
            return str(error)
        except (NotImplementedError, RuntimeError):
            pass  # it reads numbers, which a network without weights does not have; its shapes were fine so far
        return ""


class ShapesAlone(TorchFunctionMode):
    """Within its block, random initial values, BatchNorm and ReLU return what they are given: they change no shape,
    tensors of the device "meta" have no values, and these calls would take half of the time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_initial = getattr(func, "__module__", None) == "torch.nn.init" or func is torch.Tensor.normal_
        if is_initial or func in (F.batch_norm, F.relu):
            return args[0] if args else next(iter(kwargs.values()))
        return func(*args, **kwargs)


def _remembering(forward: Callable) -> Callable:
    """A pass, computed once for every shape, whose outputs have no values."""
    known: dict[tuple, Output] = {}

    def call(images: torch.Tensor, preact: bool = False) -> Output:
        key = images.shape, preact
        if key not in known:
            maps, *others = forward(torch.zeros(images.shape, device="cpu"), preact)[:-1]
            known[key] = Output([one.to("meta") for one in maps], *(one.to("meta") for one in others))
        return known[key]

    return call


def by_state(jobs: Sequence[Job]) -> Iterator[tuple[str, int]]:
    """How many jobs are in which state."""
    counts = Counter(job.state for job in jobs)
    for state in STATES:
        if counts[state] or state != "running":
            yield state, counts[state]
