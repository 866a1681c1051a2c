#!/usr/bin/env bash
# RepDistiller's CIFAR-100 teachers into save/models/<name>_vanilla/ckpt_epoch_240.pth; names may be given.
# NORM_MIRROR is another place to get them from: a URL or a folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" scripts/fetch.py cifar "$@"
