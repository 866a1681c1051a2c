"""Train a network with labels alone: a teacher, or a baseline student.

python train_teacher.py --model resnet20 --dataset digits
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where Python is told not to

from errors import run_script, starting

with starting():
    from helper.command_line import parse, teacher_parser
    from helper.distributed import joined
    from helper.inputs import decide_compiler, load_inputs, open_runs
    from helper.run import prepared, train
    from helper.tables.pages import show_table


def main(argv=None):
    parser = teacher_parser()
    with joined(), parser.own_flags():
        given = parse(parser, argv)
        opened = open_runs(given)  # initial weights, runs to resume: each file once
        inputs = load_inputs(opened.configs[0])
        opened = decide_compiler(opened, inputs)
        with prepared(opened, inputs, teacher=None) as runs:  # networks, in their run folders
            results = train(runs, teacher=None)
    if len(runs) > 1:
        show_table(run.folder.path for run in runs)
    return results


if __name__ == "__main__":
    run_script(main)
