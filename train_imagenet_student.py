"""Distil a student on ImageNet, or on a folder like it, with NORM or another method.

python train_imagenet_student.py --data PATH --path_t torchvision:resnet34 --model_s resnet18
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where Python is told not to

from errors import run_script, starting

with starting():
    import train_cifar_student
    from helper.command_line import imagenet_parser


def main(argv=None):
    # The same steps: data, teacher, students in their run folders, training. Only the data set's default is another.
    return train_cifar_student.main(argv, imagenet_parser)


if __name__ == "__main__":
    run_script(main)
