"""Train a network with labels alone: a teacher, or a baseline student.

python train_teacher.py --model resnet20 --dataset digits
"""

from errors import run_script
from helper import configuration, distributed, engine, options


def main(argv=None):
    with distributed.joined():
        configs, _ = configuration.parse(options.teacher_parser(), argv)
        return engine.run(configs, None)


if __name__ == "__main__":
    run_script(main)
