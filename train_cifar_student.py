"""Distil a student on small images, with NORM or another method.

python train_cifar_student.py --distill NORM --path_t save/digits_ce_resnet20_trial1/last.pth --model_s resnet8 -s 8
"""

from errors import run_script
from helper import configuration, distributed, engine, options


def main(argv=None):
    with distributed.joined():
        configs, teacher_file = configuration.parse(options.student_parser(), argv)
        return engine.run(configs, teacher_file)


if __name__ == "__main__":
    run_script(main)
