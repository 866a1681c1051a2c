"""Several runs from one command line: `--trials 3`, `--sweep b=0.5,1 s=4,8`."""

import argparse
import itertools
import re
from collections.abc import Sequence

from errors import UserError

#: What runs of one process have in common, because they share data, teacher and device.
SHARED = (
    ("path_t", "model_t")
    + ("dataset", "data", "image_size", "holdout")
    + ("device", "precision", "channels_last", "fold_teacher", "fused_optimizer", "compile")
)
#: What cannot be swept: that, how it is read, and what tells runs apart already.
COMMON = (
    *SHARED,
    "fast",
    "allow_teacher_gap",
    "num_workers",
    "max_broken",
    "init",
    "save_dir",
    "trial",
    "seed",
    "resume",
)
#: These stand in the run folder's name anyway.
NAMED = ("distill", "model_s")


def expand(given: dict, parser: argparse.ArgumentParser) -> list[dict]:
    """The flags of every run: trials of each combination of the swept values; takes `trials` and `sweep` out."""
    given = dict(given)
    trials, swept = given.pop("trials", 1), [_read(text, parser) for text in given.pop("sweep", ())]
    names = [argument for values in swept for argument in values[0][1]]
    for name in names:
        if name in given or names.count(name) > 1:
            raise UserError(f"--sweep: {name} is given twice; leave one out")
    runs = []
    for combination in itertools.product(*swept):
        varied = {argument: value for _, values in combination for argument, value in values.items()}
        label = "_".join(text for text, values in combination if not set(values) & set(NAMED))
        for number in range(trials):
            runs.append(given | varied | _trial(given, number, trials, label))
    return runs


def _read(text: str, parser: argparse.ArgumentParser) -> list[tuple[str, dict]]:
    """b=0.5,1 -> [(label, the flag's value as the parser reads it), ...]; of values with commas, ; parts them."""
    name, _, values = text.partition("=")
    flag = next((dashes + name for dashes in ("-", "--") if dashes + name in parser._option_string_actions), None)
    if flag is None or not values:
        raise UserError(f"--sweep: {text} must be a flag's name and values, like b=0.5,1 or co_sponge=4,8")
    read = []
    for value in values.split(";" if ";" in values else ","):
        parsed = vars(parser.parse_args([flag, value]))
        argument = parser._option_string_actions[flag].dest
        if argument in COMMON or argument in ("trials", "sweep"):
            raise UserError(f"--sweep: {name} is the same for all runs of one process; start several commands for it")
        read.append((re.sub(r"[^A-Za-z0-9.-]", "", f"{name}{value}".replace(",", "-")), {argument: parsed[argument]}))
    return read


def _trial(given: dict, number: int, trials: int, label: str) -> dict:
    """The trial's name and seed, counted up; the label of a swept combination is added to the name."""
    name = given.get("trial", "1")
    if trials > 1:
        if not name.isdecimal():
            raise UserError(f"--trials counts up from --trial, which must be a number then, not {name}")
        name = str(int(name) + number)
    seed = given["seed"] + number if "seed" in given else int(name) % 2**63 if name.isdecimal() else 0
    if trials == 1 and not label:
        return {}
    return {"trial": f"{name}_{label}" if label else name, "seed": seed}


def share_order(configs: Sequence[argparse.Namespace], given: dict) -> None:
    """Give runs that read the same teacher one order of images and one augmentation, so that they share its passes."""
    if len(configs) == 1 or "data_seed" in given:
        return
    for config in configs:
        if config.path_t is not None and config.resume is None:
            config.data_seed = configs[0].data_seed
            config.origins["data_seed"] = "shared with the other runs"
