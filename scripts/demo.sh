#!/usr/bin/env bash
# The whole path on the embedded digits, in some minutes on a CPU: teacher, baseline student, the same student with NORM,
# folding, one table and one figure.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
root=save/demo

# Runs a training script, shows its output, and keeps the run folder that its first line names.
train() { "$@" --save_dir "$root" | tee /dev/stderr | sed -n 's/^run folder: //p'; }

echo; echo "== 1/4 the teacher: resnet20"
teacher=$(train python train_teacher.py --model resnet20)
echo; echo "== 2/4 the baseline: resnet8, labels only"
baseline=$(train python train_teacher.py --model resnet8)
echo; echo "== 3/4 the same resnet8 with NORM, N = 8"
norm=$(train python train_cifar_student.py --distill NORM --path_t "$teacher/last.pth" --model_s resnet8 -s 8)
echo; echo "== 4/4 folding the transform away"
python scripts/export_student.py "$norm/last.pth" --out "$norm/student.pth"
echo
python scripts/demo_report.py "$teacher" "$baseline" "$norm" "$norm/student.pth"
