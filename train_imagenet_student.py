"""Distil a student on ImageNet, or on a folder like it, with NORM or another method.

python train_imagenet_student.py --data PATH --path_t torchvision:resnet34 --model_s resnet18
"""

from errors import run_script
from helper import configuration, distributed, engine, options


def main(argv=None):
    with distributed.joined():
        configs, teacher_file = configuration.parse(options.imagenet_parser(), argv)
        return engine.run(configs, teacher_file)


if __name__ == "__main__":
    run_script(main)
