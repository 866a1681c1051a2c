"""The rows of tables: runs that differ in nothing but their seeds."""

import json
import re
import statistics
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distiller_zoo import find_distiller
from errors import UserError, count_of
from helper import command_line
from helper.configuration import has_effect, row_key, run_key
from helper.log import describe_protocol
from helper.recipes import recipe_of
from helper.run_folder import RESULT
from helper.settings import AUGMENTATION, DATA, FOUND, INITIAL, SETTINGS, SPEED, TEACHER, TRAINING, settings_of
from helper.tables.published import PUBLISHED, TEST_IMAGES, Published, judge
from helper.tables.records import ACCURACIES, FIDELITIES, MEAN_OF_FIVE, UNREADABLE, Record, find_folders, read_record
from setting import Setting, as_text

#: Settings by which the same images are read otherwise, and have another digest.
READ_BY = [one.argument for one in SETTINGS if one.group == DATA and one.tells_apart == "row" and not one.is_path]


class Row(NamedTuple):
    """Runs that differ in nothing but their seeds."""

    records: list[Record]
    dataset: str  # as tables call it: of a folder with its name, and with its digest where a name is of several
    teacher: str = ""  # its network, with the digest where the rows of a data set have several of the name
    apart: str = ""  # the settings that tell it from rows of the same pair, setting and method

    @property
    def config(self) -> dict[str, Any]:
        """Of the first run."""
        return self.records[0].config

    @property
    def epochs(self) -> int:
        """Of the main stage; with early stopping (`--patience`) those that it may have."""
        return self.config["epochs"] if self.config["patience"] else self.records[0].result["epochs"]

    @property
    def trained(self) -> str:
        """The epochs of its runs: 20, or 12 to 17 of 20 where they stopped early."""
        numbers = sorted({record.result["epochs"] for record in self.records})
        return str(self.epochs) if numbers == [self.epochs] else f"{_range(numbers)} of {self.epochs}"

    def values(self, accuracy: str) -> list[float]:
        """One accuracy (%) of every run."""
        return [record.result[accuracy] for record in self.records]

    @property
    def held_out(self) -> str:
        """The accuracy (%) on the held-out images after the last epoch; a dash where there are none."""
        return self._known([record.held_out for record in self.records])

    def fidelity(self, name: str) -> str:
        """One entry of `FIDELITIES`; a dash where no run has it."""
        return self._known([record.fidelity.get(name) for record in self.records], FIDELITIES[name][2])

    def _known(self, values: Sequence[float | None], decimals: int = 2) -> str:
        """The mean of what is known, and of how many runs that is where it is not of all."""
        known = [value for value in values if value is not None]
        of = "" if len(known) == len(values) else f" ({len(known)} of {count_of(len(values), 'seed')})"
        return f"{spread(known, decimals)}{of}" if known else "-"

    @property
    def unreadable(self) -> str:
        """How many test images of its runs could not be read, of how many; a dash where all could."""
        found = [(record.result.get(UNREADABLE, 0), record.result.get("test_images")) for record in self.records]
        number, of = max(found, key=lambda one: one[0])
        return "-" if not number else f"{number} of {of}" if of else str(number)

    @property
    def images_per_s(self) -> float | None:
        """The median of its runs."""
        speeds = [record.images_per_s for record in self.records]
        known = [speed for speed in speeds if speed is not None]
        return statistics.median(known) if known else None

    @property
    def pair(self) -> str:
        return f"{self.teacher or '-'} -> {self.config['model_s']}"

    @property
    def protocol(self) -> str:
        return describe_protocol(self.config["holdout"], self.config.get("best_by", "accuracy"))

    @property
    def setting(self) -> tuple[str, int, str]:
        """What rows of one table have in common: data set, epochs, protocol."""
        return self.dataset, self.epochs, self.protocol

    def is_taught_like(self, other: "Row") -> bool:
        """Whether both have the same teacher, or one of them has none."""
        teachers = [(row.config["model_t"], row.config["teacher_digest"]) for row in (self, other)]
        return teachers[0] == teachers[1] or any(name is None for name, _ in teachers)

    @property
    def label(self) -> str:
        """The method, and what tells the row from others of it."""
        return f"{self.method} {self.apart}".strip()

    @property
    def method(self) -> str:
        """The method, and the flags in which it differs from its recipe."""
        config, known = self.config, settings_of(self.config["distill"])
        label = [config["distill"]]
        # A run that started from other weights or was cut short is not what a paper reports.
        unusual = {
            "init": config["init"] and "/".join(Path(config["init"]).parts[-2:]),
            "max_steps": config["max_steps"],
        }
        label += [known[name].written(value) for name, value in unusual.items() if value is not None]
        label += self.unusual_flags
        if config.get("teacher_steps"):  # a full run may have learnt from a try-out
            label.append(f"teacher {known['max_steps'].written(config['teacher_steps'])}")
        return " ".join(filter(None, label))

    @property
    def unusual_flags(self) -> list[str]:
        """The method's own flags in which it differs from its recipe."""
        config, recipe, written = self.config, self._recipe, []
        for flag in find_distiller(config["distill"]).flags:
            usual = recipe.get(flag.argument, (flag.default, ""))[0]
            value = config.get(flag.argument, usual)
            told = flag.tells_apart == "row" and flag.full_run is None and has_effect(flag, config)
            if told and flag.written(value) != flag.written(usual):
                written.append(_written(flag, value))
        return written

    @property
    def _recipe(self) -> Mapping[str, tuple[Any, str]]:
        config = self.config
        chosen = {flag.argument: config.get(flag.argument) for flag in find_distiller(config["distill"]).flags}
        return recipe_of(config["dataset"], config["model_t"], config["model_s"], config["distill"], chosen)

    @property
    def published(self) -> Published | None:
        """What a paper reports of this row, if it is known."""
        config = self.config
        teacher = config["model_t"] if find_distiller(config["distill"]).reads_teacher else None
        return PUBLISHED.get((config["dataset"], teacher, config["model_s"], self.method))

    @property
    def verdict(self) -> str:
        """Whether ours lies within the published band, or what was trained otherwise; empty where nothing is
        published."""
        paper = self.published
        if paper is None:
            return ""
        usual = {**_usual(self.config, epochs=self.epochs), "epochs": self._recipe["epochs"][0]}
        otherwise = _unusual(self.config, usual, (TEACHER, DATA, TRAINING, AUGMENTATION, INITIAL))
        told = [_written(one, self.config[one.argument]) for one in otherwise]
        tested: set[Any] = {record.result.get("test_images") for record in self.records}
        tested -= {None, TEST_IMAGES[self.config["dataset"]]}
        told += [f"{number} test images" for number in sorted(tested)]
        if told:
            return f"not to be compared: {' '.join(told)}"
        return f"{judge(paper, self.values(paper.compared))} ({ACCURACIES[paper.compared]})"


class Left(NamedTuple):
    """A folder that is in no row, and why."""

    folder: Path
    reason: str


def read_rows(folders: Iterable[Path]) -> tuple[list[Row], list[Left]]:
    """Run folders -> (rows of finished runs, what is left out); raises `UserError` where nothing is left.

    A folder that is given twice is one run. Of runs of one row with the same seed the newest counts.
    """
    runs: dict[str, Record] = {}
    left = []
    for folder in find_folders(folders):
        try:
            record = read_record(folder)
            key = key_text(run_key(record.config))
            older = runs.get(key)
            if older is not None:
                older, record = sorted((older, record), key=_age)
                orders = [one.config.get("data_seed") for one in (older, record)]
                but = "" if orders[0] == orders[1] else f" (but --data_seed {orders[0]}, not {orders[1]})"
                left.append(Left(older.folder, f"the same settings and seed{but} as {record.folder}, which is newer"))
            runs[key] = record
        except UserError as error:
            left.append(Left(folder, str(error)))
    if not runs:
        reasons = f"; {left[0].folder}: {left[0].reason}" if left else ""
        raise UserError(f"RUN: none of the folders holds a finished run{reasons}")
    rows = defaultdict(list)
    for record in runs.values():
        rows[key_text(row_key(record.config))].append(record)
    return _in_order(_tell_apart(_named(list(rows.values())))), left


def _age(record: Record) -> tuple:
    return (record.folder / RESULT).stat().st_mtime_ns, _natural(record.folder.name)


def key_text(key: Mapping[str, Any]) -> str:
    """What `row_key` or `run_key` gives, as a key of a dictionary."""
    return json.dumps(key, sort_keys=True, default=str)


def _named(rows: Sequence[list[Record]]) -> list[Row]:
    """Rows with what tables call their data and their teachers; data that were renamed have one name."""
    configs, known = [records[0].config for records in rows], {}
    for config in configs:
        folder = Path(config["data"] or "").name if config["dataset"] == "folder" else ""
        known.setdefault(_data_of(config), f"{config['dataset']} {folder}".strip())
    read_by = [tuple(config[name] for name in READ_BY) for config in configs]
    datasets = _with_digests([known[_data_of(config)] for config in configs], configs, "data_digest", read_by)
    teachers = _with_digests([config["model_t"] or "" for config in configs], configs, "teacher_digest", datasets)
    return list(map(Row, rows, datasets, teachers))


def _data_of(config: Mapping[str, Any]) -> tuple:
    return config["dataset"], config["data_digest"] or config["data"]


def _with_digests(
    names: Sequence[str], configs: Sequence[Mapping[str, Any]], digest: str, places: Sequence
) -> list[str]:
    """Names, with the digest where in the same place there is another of the name."""
    found = defaultdict(set)
    for name, config, place in zip(names, configs, places, strict=True):
        found[name, place] |= {config[digest]} - {None}
    return [
        f"{name} ({shortened(config[digest])})" if config[digest] and len(found[name, place]) > 1 else name
        for name, config, place in zip(names, configs, places, strict=True)
    ]


def _tell_apart(rows: Sequence[Row]) -> list[Row]:
    """The same rows; where several of one pair and setting have the same label, with what differs between them."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.pair, row.setting, row.method].append(row)
    texts: dict[int, str] = {}
    for group in groups.values():
        texts |= zip(map(id, group), differing_flags(group), strict=True)
    return [row._replace(apart=texts[id(row)]) for row in rows]


def differences(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Setting -> its value in every row, for those that are not the same in all; None where it does not exist."""
    keys = [row_key(row.config) for row in rows]
    names = dict.fromkeys(name for key in keys for name in key)
    values = {name: [key.get(name) for key in keys] for name in names}
    return {name: of_rows for name, of_rows in values.items() if any(value != of_rows[0] for value in of_rows)}


def references_of(row: Row, rows: Sequence[Row], method: str) -> list[Row]:
    """The rows of a method, with its recipe's flags, that a row is compared with: of the same student, teacher, data
    set, epochs and protocol, and of several those that differ from the row in the fewest settings. A row without a
    teacher has some for each."""
    own, found = row.config, defaultdict(lambda: defaultdict(list))
    for one in rows:
        config = one.config
        same = config["model_s"] == own["model_s"] and one.setting == row.setting and row.is_taught_like(one)
        same &= (config["init_digest"] or config["init"]) in (None, own["init_digest"] or own["init"])
        same &= config["max_steps"] in (None, own["max_steps"])
        if same and config["distill"] == method and not one.unusual_flags:
            found[config["teacher_digest"]][len(differences([row, one]))].append(one)
    return [one for of_teacher in found.values() for one in of_teacher[min(of_teacher)]]


def differing_flags(rows: Sequence[Row]) -> list[str]:
    """The settings that are not the same in all of the rows, as flags; of every row its own."""
    texts: list[list[str]] = [[] for _ in rows]
    for name, values in differences(rows).items():
        for row, text, value in zip(rows, texts, values, strict=True):
            if value is not None:
                text.append(_written(settings_of(row.config["distill"])[name], value))
    return [" ".join(text) for text in texts]


def _written(setting: Setting, value: Any) -> str:
    if setting.group == FOUND:
        return f"{setting.argument.removesuffix('_digest')} {shortened(value)}"
    return setting.written(value) or f"--no-{setting.argument}"


def shortened(value: Any) -> str:
    """A value for people: of a digest the first characters."""
    text = as_text(value)
    return text[:8] if re.fullmatch(r"[0-9a-f]{32,}", text) else text


def _range(numbers: Sequence[int]) -> str:
    """3, or 3 to 5."""
    return " to ".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))


def _natural(text: str) -> list:
    """A key that sorts -s 2 before -s 16."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """Baselines first; then as given, but a method's rows of one pair together, -s 2 before -s 16."""
    places = {}
    for row in rows:
        places.setdefault((row.pair, row.config["distill"]), len(places))

    def place(row: Row) -> tuple:
        return row.config["distill"] != "ce", places[row.pair, row.config["distill"]], _natural(row.label)

    return sorted(rows, key=place)


def welch(first: Sequence[float], second: Sequence[float]) -> float | None:
    """p of Welch's t-test, two-sided, that two samples have one mean; None where one value or no spread allows no
    test."""
    from scipy.stats import ttest_ind

    if min(len(first), len(second)) < 2 or statistics.pstdev(first) == statistics.pstdev(second) == 0:
        return None
    with warnings.catch_warnings(action="ignore"):  # scipy's, of spreads that are next to nothing
        test: Any = ttest_ind(second, first, equal_var=False)  # scipy has no types for it
        return float(test.pvalue)


def describe_lead(first: Sequence[float], second: Sequence[float], p: float | None) -> str:
    """By how many points the second accuracies are above the first, and p of Welch's t-test: +2.00 (p = 0.03)."""
    return f"{statistics.mean(second) - statistics.mean(first):+.2f} ({'no test' if p is None else f'p = {p:.2g}'})"


def note_of_few_epochs(rows: Sequence[Row]) -> str:
    """What the mean of the last five epochs is where a run has fewer; empty where none has."""
    fewest = min(record.result["epochs"] for row in rows for record in row.records)
    return "" if fewest >= 5 else f"{ACCURACIES[MEAN_OF_FIVE].capitalize()}: of all epochs where a run has fewer."


def note_of_shared_order(rows: Sequence[Row]) -> str:
    """Whose seeds show the images in one order and with the same crops; empty where none do."""
    several = [row for row in rows if len(row.records) > 1]
    shared = []
    for row in several:
        orders = {record.config.get("data_seed") for record in row.records}
        if len(orders) == 1 and None not in orders:
            shared.append(row)
    taught = [row for row in several if row.config["model_t"] is not None]
    known = {"all rows": several, "rows with a teacher": taught}
    labels = ", ".join(dict.fromkeys(row.label for row in shared))
    of = next((name for name, those in known.items() if those == shared), labels)
    said = "share the\norder and the crops of the images (`--data_seed`), which their deviations leave out."
    return f"The seeds of {of} {said}" if shared else ""


def note_of_other_teachers(rows: Sequence[Row]) -> str:
    """Which students were compared with another teacher than their own, or than the table's where they have none."""
    taught, others = {row.config["teacher_digest"] for row in rows} - {None}, []
    for row in rows:
        own = {row.config["teacher_digest"]} - {None} or taught
        teachers = [record.fidelity.get("teacher") for record in row.records]
        compared = {str(one["digest"]) for one in teachers if isinstance(one, Mapping) and "digest" in one}
        others += [row.label] if own and not compared <= own else []
    return (
        f"What is compared with the teacher is, of {', '.join(others)}, with another one than theirs." if others else ""
    )


def note_of_references(rows: Sequence[Row], methods: Collection[str]) -> str:
    """With which of several rows of one of these methods the others are compared; empty where there is one of each."""
    several = dict.fromkeys(row.config["distill"] for row in rows if row.apart and not row.unusual_flags)
    names = " or ".join(name for name in methods if name in several)
    return (
        f"Of several rows of {names} a row is\ncompared with the one it has the most settings in common with."
        if names
        else ""
    )


def notes_of(rows: Sequence[Row]) -> str:
    """What is to be said of these rows' accuracies; empty where nothing is."""
    return " ".join(filter(None, (note_of_few_epochs(rows), note_of_shared_order(rows))))


def spread(values: Sequence[float], decimals: int = 2) -> str:
    """mean ± standard deviation (n - 1), or the one value."""
    if len(values) == 1:
        return f"{values[0]:.{decimals}f}"
    return f"{statistics.mean(values):.{decimals}f} ± {statistics.stdev(values):.{decimals}f}"


def flags_of(record: Record) -> list[str]:
    """The flags that tell a run's row from others, each with its value: method and networks, which are one text, then
    its hyper-parameters, length, what is unusual."""
    config = record.config
    known, method = settings_of(config["distill"]), find_distiller(config["distill"])
    always = [known["epochs"], known["batch_size"], known["learning_rate"]]
    of_pass = {"images_per_pass": config["batch_size"] // config["accumulate"]}  # fewer where processes divide a batch
    usual = {**_usual(config, epochs=config["epochs"]), **of_pass}
    groups = (TEACHER, DATA, TRAINING, AUGMENTATION, SPEED, INITIAL, FOUND)
    unusual = [one for one in _unusual(config, usual, groups) if one not in always]
    flags = [flag for flag in method.flags if has_effect(flag, config)]
    networks = f"--model_t {config['model_t']} " if config["model_t"] else ""
    shown = [one.written(config[one.argument]) for one in (*flags, *always) if one.argument in record.stored]
    shown += [_written(one, config[one.argument]) for one in unusual if one.argument in record.stored]
    return [f"--distill {config['distill']} {networks}--model_s {config['model_s']}", *filter(None, shown)]


def _usual(config: Mapping[str, Any], **given: Any) -> Mapping[str, Any]:
    """What a run of this method, these networks and data has where nothing is given but that."""
    named = {name: config[name] for name in ("distill", "model_s", "dataset")} | given
    of_teacher = {"model_t": config["model_t"], "path_t": ""} if config["model_t"] else {}
    return command_line.resolve(named, of_teacher=of_teacher)


def _unusual(config: Mapping[str, Any], usual: Mapping[str, Any], groups: Collection[str]) -> list[Setting]:
    """The settings of these groups that make another row and are not as usual; data and teacher have columns."""
    return [
        one
        for one in settings_of(config["distill"]).values()
        if one.group in groups and one.tells_apart == "row" and has_effect(one, config)
        if one.argument not in ("data", "path_t") and not one.instead_of
        if config.get(one.argument) not in (None, usual.get(one.argument))
    ]
