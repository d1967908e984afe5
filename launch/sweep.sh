#!/usr/bin/env bash
# Runs a config for every combination of some settings, and collects a table of how the runs ended.
#
#   bash launch/sweep.sh --config=configs/rl.py --into=runs/pressure --eval=configs/eval.py \
#       rl.depth_coef=0,0.4,0.8 seed=0,1 [--config.KEY=VALUE ...] [--jobs=N]
#
# The same command goes on where it was stopped. Makes or updates .venv where needed, like run.sh;
# bash launch/sweep.sh --help says the rest.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

extras=$(accelerator_extras)
ensure_env "$extras"

exec "$venv/bin/python" -m jexit.sweep "$@"
