"""Distil a student on small images, with NORM or another method.

python train_cifar_student.py --distill NORM --path_t save/digits_ce_resnet20_trial1/last.pth --model_s resnet8 -s 8
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where Python is told not to

from errors import run_script, starting

with starting():
    from helper.command_line import parse, student_parser
    from helper.distributed import joined
    from helper.inputs import decide_compiler, load_inputs, open_runs, prepare_teacher
    from helper.run import prepared, train
    from helper.tables.pages import show_table


def main(argv=None, make_parser=student_parser):
    with joined():
        given = parse(make_parser(), argv)
        opened = open_runs(given)  # teacher, initial weights, runs to resume: each file once
        inputs = load_inputs(opened.configs[0])
        opened = decide_compiler(opened, inputs)
        teacher = prepare_teacher(opened.teacher, inputs, opened.configs[0])
        with prepared(opened, inputs, teacher) as runs:  # students and methods, in their run folders
            results = train(runs, teacher)
    if len(runs) > 1 and inputs.data.labelled:
        show_table(run.folder.path for run in runs)
    return results


if __name__ == "__main__":
    run_script(main)
