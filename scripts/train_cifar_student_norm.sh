#!/usr/bin/env bash
# resnet32x4 -> resnet8x4 on CIFAR-100 with NORM: the command of the official repository. Fetches the teacher first.
#   bash scripts/train_cifar_student_norm.sh [more flags]
# TEACHER and STUDENT are another pair; PATH_T is the teacher's file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python}" teacher="${TEACHER:-resnet32x4}"
if [ -z "${PATH_T:-}" ]; then
    "$python" scripts/fetch.py cifar "$teacher"
    PATH_T="save/models/${teacher}_vanilla/ckpt_epoch_240.pth"
fi
weights=()
if [ "$teacher->${STUDENT:-resnet8x4}" = "resnet32x4->resnet8x4" ]; then weights=(-r 0.1 -a 0 -b 1.0 -s 8); fi
exec "$python" train_cifar_student.py --path_t "$PATH_T" --distill norm --model_s "${STUDENT:-resnet8x4}" "${weights[@]}" "$@"
