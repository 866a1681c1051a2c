#!/usr/bin/env bash
# torchvision's ResNet34 and ResNet50 to where torchvision keeps its files; other names may be given.
# NORM_MIRROR is another place to get them from: a URL or a folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" scripts/fetch.py imagenet "$@"
