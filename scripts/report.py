"""A Markdown table of finished runs: python scripts/report.py save/*

Runs that differ in nothing but trial and seed share a row; mean and standard deviation (n - 1) are over them. Below the
table stands the command of each row.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distiller_zoo import find_distiller
from errors import UserError, run_script
from helper.options import Parser
from helper.run_folder import CONFIG, RESULT

ACCURACIES = ("accuracy_last", "accuracy_best", "accuracy_mean_last_five")
HEADER = ("data set", "teacher", "student", "method", "epochs", "last", "best on test", "mean of last five", "seeds")
#: What does not tell one row from another.
IGNORED = (
    "trial",
    "seed",
    "origins",
    "save_dir",
    "num_workers",
    "device",
    "print_freq",
    "save_freq",
    "save_every_steps",
    "resume",
    "path_t",
)


def read_runs(folders: list[Path]) -> dict[str, list[tuple[dict, dict]]]:
    """Finished runs, as (configuration, result), grouped by what makes a row; unfinished ones are named on stderr."""
    rows = defaultdict(list)
    for folder in folders:
        if not (folder / RESULT).exists():
            print(f"{folder}: not finished, left out", file=sys.stderr)
            continue
        try:
            config, result = (json.loads((folder / name).read_text()) for name in (CONFIG, RESULT))
            key = json.dumps({name: value for name, value in config.items() if name not in IGNORED}, sort_keys=True)
            rows[key].append((config, result))
        except (OSError, ValueError) as error:
            raise UserError(f"RUN: {folder} cannot be read: {error}") from None
    if not rows:
        raise UserError("RUN: none of the folders holds a finished run")
    return rows


def spread(values: list[float]) -> str:
    """mean ± standard deviation, or the one value."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def row_of(runs: list[tuple[dict, dict]]) -> list[str]:
    """The cells of a row."""
    config, results = runs[0][0], [result for _, result in runs]
    accuracies = [spread([result[name] for result in results]) for name in ACCURACIES]
    epochs = str(results[0]["epochs"])
    names = [config["dataset"], config["model_t"] or "-", config["model_s"], config["distill"]]
    return [*names, epochs, *accuracies, str(len({run_config["seed"] for run_config, _ in runs}))]


def command_of(config: dict) -> str:
    """The flags that tell the row from the others: networks, method, its hyper-parameters, length."""
    flags = find_distiller(config["distill"]).flags
    values = " ".join(f"{flag.names[0]} {config[flag.argument]}" for flag in flags if flag.argument in config)
    networks = f"--model_t {config['model_t']} --model_s {config['model_s']}" if config["model_t"] else ""
    training = (
        f"--epochs {config['epochs']} --batch_size {config['batch_size']} --learning_rate {config['learning_rate']}"
    )
    return f"--distill {config['distill']} {networks or '--model_s ' + config['model_s']} {values} {training}"


def make_report(folders: list[Path]) -> str:
    """The table and the rows' commands as Markdown."""
    rows = list(read_runs(folders).values())
    lines = [HEADER, ["--"] * len(HEADER), *(row_of(runs) for runs in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    commands = "\n".join(f"    {command_of(runs[0][0])}" for runs in rows)
    return f"{table}\n\nTest accuracy in percent. Row by row, the settings were:\n\n{commands}\n"


def main(argv=None) -> None:
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN")
    print(make_report(parser.parse_args(argv).folders), end="")


if __name__ == "__main__":
    run_script(main)
