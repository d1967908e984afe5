#!/usr/bin/env bash
# Study F: Qwen2.5-Coder-0.5B as it is, calibrated and reinforced (configs/experiments/qwen.py).
#
#   bash studies/qwen.sh
#
# Takes models/qwen, writes runs/qwen-*, and goes on where it was stopped.
set -euo pipefail
checkout="$(dirname "${BASH_SOURCE[0]}")/.."
config="$checkout/configs/experiments/qwen.py"
run() { bash "$checkout/launch/run.sh" "$@"; }
measured() {
  [[ -e $1/eval/eval.json ]] ||
    run --config="$config:measure" --config.model.path="$1" --workdir="$1/eval"
}
# The first phase alone, then both: the second run goes on from a copy of the first.
[[ -e runs/qwen-lens/after.json ]] ||
  run --config="$config:calibrate" --config.steps=0 --workdir=runs/qwen-lens
measured runs/qwen-lens
if [[ ! -e runs/qwen-sft/after.json ]]; then
  [[ -e runs/qwen-sft ]] || {
    rm -rf runs/qwen-sft.copy
    cp -r runs/qwen-lens runs/qwen-sft.copy
    rm -rf runs/qwen-sft.copy/{after.json,model,eval}
    mv runs/qwen-sft.copy runs/qwen-sft
  }
  run --config="$config:calibrate" --workdir=runs/qwen-sft
fi
measured runs/qwen-sft
[[ -e runs/qwen-rl/after.json ]] || run --config="$config:reinforce" --workdir=runs/qwen-rl
measured runs/qwen-rl
