"""Distil a student on ImageNet, or on a folder like it, with NORM or another method.

python train_imagenet_student.py --data PATH --path_t torchvision:resnet34 --model_s resnet18
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where Python is told not to

from errors import run_script, starting

with starting():
    from helper.command_line import imagenet_parser, parse
    from helper.distributed import joined
    from helper.run import load_inputs, open_runs, prepare_teacher, prepared, train


def main(argv=None):
    with joined():
        given = parse(imagenet_parser(), argv)
        opened = open_runs(given)  # teacher, initial weights, runs to resume: each file once
        inputs = load_inputs(opened.configs[0])
        teacher = prepare_teacher(opened.teacher, inputs, opened.configs[0])
        with prepared(opened, inputs, teacher) as runs:  # students and methods, in their run folders
            return train(runs, teacher)


if __name__ == "__main__":
    run_script(main)
