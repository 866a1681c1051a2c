#!/usr/bin/env bash
# ResNet50 -> MobileNetV1 on ImageNet with NORM, as published; DATA is the folder that holds train/ and val/.
#   DATA=/path/to/imagenet bash scripts/train_imagenet_resnet50_mobilenet.sh [more flags]
# PATH_T is another teacher.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" train_imagenet_student.py --data "${DATA:?name the folder of ImageNet: DATA=PATH}" \
    --distill norm --path_t "${PATH_T:-torchvision:resnet50}" --model_s MobileNet -r 0.125 -a 0 -b 1 -s 8 --lr_decay cos "$@"
