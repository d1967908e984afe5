#!/usr/bin/env bash
# Study F: Qwen2.5-Coder-0.5B as it is, calibrated and reinforced (configs/experiments/qwen.py).
#
#   bash studies/qwen.sh
#
# Takes models/qwen and GSM8K in data/gsm8k, writes runs/qwen-*, and goes on where it was stopped.
set -euo pipefail
checkout="$(dirname "${BASH_SOURCE[0]}")/.."
config="$checkout/configs/experiments/qwen.py"
gsm8k=(--config.task.path=data/gsm8k)
words=(--config.task.name=word_problems --config.eval.max_new_tokens=256)
frozen=(--config.exits.continuation=frozen)
at=(--config.eval.policies="('threshold:0.5',)" --config.eval.problems=100)
# DIR CONFIG [FLAGS]: trains.
trained() { # a run that collapsed leaves its last good model
  [[ -e $1/after.json ]] ||
    bash "$checkout/launch/run.sh" --config="$2" --workdir="$1" "${gsm8k[@]}" "${@:3}" ||
    [[ -e $1/after.json ]]
}
# DIR [FLAGS]: calibrates; the teacher's trajectories are those of the first.
calibrated() {
  if [[ ! -e $1/teacher && -e runs/qwen-lens/teacher ]]; then
    mkdir -p "$1"
    rm -rf "$1/teacher.copy"
    cp -r runs/qwen-lens/teacher "$1/teacher.copy"
    mv "$1/teacher.copy" "$1/teacher"
  fi
  trained "$1" "$config:calibrate" "${@:2}"
}
# NAME MODELS CONFIG [FLAGS]: evaluates models, separated by |.
measured() {
  bash "$checkout/launch/sweep.sh" --config="$3" --into="runs/$1" "model.path=$2" "${@:4}"
}
calibrated runs/qwen-lens --config.steps=0
measured qwen-gsm8k runs/qwen-lens "$config:measure" "${gsm8k[@]}"
measured qwen-words runs/qwen-lens "$config:measure" "${words[@]}"
calibrated runs/qwen-frozen --config.steps=0 "${frozen[@]}"
measured qwen-frozen-gsm8k runs/qwen-frozen "$config:measure" "${gsm8k[@]}" "${at[@]}"
measured qwen-frozen-words runs/qwen-frozen "$config:measure" "${words[@]}" "${at[@]}"
measured qwen-controls runs/qwen-lens "$config:control" "${gsm8k[@]}"
for pool in 96 192; do # fewer trajectories
  calibrated "runs/qwen-lens-$pool" --config.steps=0 --config.sft.pool="$pool"
done
measured qwen-pools "runs/qwen-lens-96|runs/qwen-lens-192" "$config:measure" \
  "${gsm8k[@]}" "${at[@]}"
calibrated runs/qwen-sft
measured qwen-gsm8k runs/qwen-sft "$config:measure" "${gsm8k[@]}"
trained runs/qwen-rl "$config:reinforce"
measured qwen-gsm8k runs/qwen-rl "$config:measure" "${gsm8k[@]}"
measured qwen-controls runs/qwen-rl "$config:control" "${gsm8k[@]}"
