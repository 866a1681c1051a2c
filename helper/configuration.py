"""The configuration of a run, its resolved settings: how it is stored, and how two are compared.

Two runs are compared to know whether they belong in one row of a table, and whether they can share a process; a resumed
run is compared with what it has on record.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dataset import data_changes
from distiller_zoo import find_distiller, unmet
from errors import UserError
from helper import settings
from helper.settings import all_settings, settings_of
from setting import FILLED_IN, Setting


class Configuration(Mapping):
    """The resolved settings of one run, each of its setting's type; read as attributes or as a mapping.

    `origins` says where each value comes from; `folder` is the run folder of a run that is resumed, None for a new one.
    """

    def __init__(self, values: Mapping[str, Any], origins: Mapping[str, str], folder: str | None = None):
        self._values, self.origins, self.folder = dict(values), dict(origins), folder

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(f"a run has no setting {name}") from None

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def replace(self, origin: str, **values: Any) -> "Configuration":
        """The same run with other values, which come from `origin`."""
        origins = self.origins | dict.fromkeys(values, origin)
        return Configuration(self._values | values, origins, self.folder)

    @property
    def name(self) -> str:
        """The name of the run's folder: data set, method, networks, trial, and that it is a try of some steps."""
        networks = [name.replace(":", "-").replace(",", "+") for name in (self.model_t, self.model_s) if name]
        tried = ["try"] if self.max_steps else []
        return "_".join([self.dataset, self.distill, *networks, f"trial{self.trial}", *tried])

    @property
    def accepts_changes(self) -> bool:
        """Whether changed files are accepted now: what an earlier resume accepted says nothing of changes since."""
        return self.accept_changes and self.origins["accept_changes"] == "command line"

    def as_json(self) -> dict:
        """What config.json holds."""
        return self._values | {"origins": self.origins}


def read_stored(stored: object, source: str) -> dict:
    """The content of a config.json, or of a checkpoint's copy -> its values; raises `UserError` that begins with
    `source`. Settings that are newer than the file are absent."""
    if not isinstance(stored, Mapping):
        raise UserError(f"{source} does not hold settings; name a run folder")
    known, values = all_settings(), {}
    for name, value in stored.items():
        if name == "resume":  # written by earlier versions
            continue
        if name == "origins":
            if not isinstance(value, Mapping) or not all(isinstance(origin, str) for origin in value.values()):
                raise UserError(f"{source}: its origins must be a text for each setting")
            continue
        if name not in known:
            raise UserError(f"{source} holds the unknown setting {str(name)[:100]!r}; was it written by this version?")
        try:
            values[name] = known[name].read(value)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from None
    return values


# Runs of one row, and runs of one process.


def has_effect(setting: Setting, config: Mapping[str, Any]) -> bool:
    """Whether a setting changes anything in a run with these values of all settings: of the milestones with a cosine
    it does not."""
    return setting.works(config) and unmet(find_distiller(config["distill"]), setting, config) is None


def row_key(config: Mapping[str, Any]) -> dict[str, Any]:
    """Equal for two runs exactly if they belong in the same row of a table, as two seeds do.

    Files count by the digests of their weights, and what has no effect does not. Runs from before a setting existed had
    its default.
    """
    return _telling_apart(config, ("row",))


def run_key(config: Mapping[str, Any]) -> dict[str, Any]:
    """Equal for two runs exactly if they are the same training."""
    return _telling_apart(config, ("row", "run"))


def _telling_apart(config: Mapping[str, Any], whats: tuple[str, ...]) -> dict[str, Any]:
    known = settings_of(config["distill"])
    whole_batch = {"images_per_pass": config["batch_size"]}
    defaults = {name: setting.default for name, setting in known.items()} | whole_batch
    values = defaults | {name: value for name, value in config.items() if value is not None}
    kept = {
        name: value
        for name, value in values.items()
        if name in known and known[name].tells_apart in whats and value not in (None, FILLED_IN)
        if has_effect(known[name], values)
    }
    for replaced in {known[name].instead_of for name in kept}:  # a run from before digests were kept has its path
        kept.pop(replaced, None)
    return kept


def check_shared(configs: Iterable[Configuration]) -> None:
    """Raise `UserError` where runs that are to share one process differ in what its runs have in common."""
    first, *others = configs
    if others and any(config.folder and config.accept_changes for config in (first, *others)):
        # The images of a process are normalised in one way, and each run keeps that with which it began.
        raise UserError("--accept_changes: resume each run alone, with --resume RUN: it keeps its own normalisation")
    for other in others:
        for setting in settings.SETTINGS:
            ours, theirs = first.get(setting.argument), other.get(setting.argument)
            if setting.shared and None not in (ours, theirs) and ours != theirs:
                names = [config.folder or "a new run" for config in (first, other)]
                raise UserError(
                    f"--resume: {names[0]} has {setting.argument} {ours}, {names[1]} {theirs}; they cannot train in "
                    "one process; resume them separately"
                )


# A resumed run: what is on record against what is given now. The first function needs the teacher's file alone and is
# called before the data are read, the others when they are.


def check_given(
    path: Path | str, stored: Mapping[str, Any], given: Mapping[str, Any], teacher_digest: str | None
) -> None:
    """Raise `UserError` where a flag or the teacher is another than the run at `path` has `stored`."""
    known = all_settings()
    for name, value in given.items():
        was = stored.get(name, known[name].default)
        if known[name].resume != "free" and was != value:
            raise UserError(
                f"--resume: {path} was run with {name} {was}, not {value}; leave the flag out, or start a new run"
            )
    was = stored.get("teacher_digest")
    if None not in (was, teacher_digest) and was != teacher_digest and not given.get("accept_changes"):
        raise UserError(
            f"--resume: {path}: the digest of the teacher's weights was {was} and is {teacher_digest} now; restore the "
            "files that the run began with, or accept the new ones with --accept_changes"
        )


def check_class_weights(config: Configuration, digest: str) -> None:
    """Raise `UserError` where the class weights of a resumed run are not those that it began with."""
    if config.get("weights_digest") not in (None, digest) and not config.accepts_changes:
        raise UserError(
            f"--class_weights: {config.class_weights} is not what {config.folder} began with; restore the file, or "
            "accept the new weights with --accept_changes"
        )


def check_found(
    config: Configuration, record: Mapping[str, Any], identity: Mapping[str, Any], trained: int, epochs: int
) -> None:
    """Raise `UserError` where the data of a resumed run are not those that it began with, or where its main stage is to
    be shorter than what is trained of it.

    `record` is its checkpoint's, `identity` that of the data now; `trained` of the `epochs` are at least begun.
    """
    changes = data_changes(record.get("identity") or {"classes": record["classes"]}, identity)
    if changes and not config.accepts_changes:
        raise UserError(
            f"--resume: {config.folder}: the data have changed: {', '.join(changes)}; restore them, or accept that "
            "with --accept_changes"
        )
    if trained > epochs:
        raise UserError(f"--epochs: {trained} are trained already; give at least as many, or start a new run")
