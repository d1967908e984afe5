#!/usr/bin/env bash
# Study F: Qwen2.5-Coder-0.5B as it is, calibrated and reinforced (configs/experiments/qwen.py).
#
#   bash studies/qwen.sh
#
# Takes models/qwen and GSM8K in data/gsm8k, writes runs/qwen-*, and goes on where it was stopped.
set -euo pipefail
checkout="$(dirname "${BASH_SOURCE[0]}")/.."
config="$checkout/configs/experiments/qwen.py"
# --config=FILE [FLAGS]: --config must be the first flag.
run() { bash "$checkout/launch/run.sh" "$1" --config.task.path=data/gsm8k "${@:2}"; }
# DIR NAME CONFIG [FLAGS]: evaluates the model of a run.
measured() {
  [[ -e $1/$2/eval.json ]] ||
    run --config="$3" --config.model.path="$1" --workdir="$1/$2" "${@:4}"
}
# DIR [FLAGS]: calibrates; the teacher's trajectories are those of the first.
calibrated() {
  if [[ ! -e $1/teacher && -e runs/qwen-lens/teacher ]]; then
    mkdir -p "$1"
    cp -r runs/qwen-lens/teacher "$1/teacher.copy"
    mv "$1/teacher.copy" "$1/teacher"
  fi
  [[ -e $1/after.json ]] || run --config="$config:calibrate" --workdir="$1" "${@:2}"
}
words=(--config.task.name=word_problems --config.task.path= --config.eval.max_new_tokens=256)
frozen=(--config.exits.continuation=frozen)
at=(--config.eval.policies="('threshold:0.5',)" --config.eval.problems=100)
calibrated runs/qwen-lens --config.steps=0
measured runs/qwen-lens eval "$config:measure"
measured runs/qwen-lens controls "$config:control"
measured runs/qwen-lens words "$config:measure" "${words[@]}"
for pool in 48 96 192; do  # fewer trajectories
  calibrated "runs/qwen-lens-$pool" --config.steps=0 --config.sft.pool="$pool"
  measured "runs/qwen-lens-$pool" eval "$config:measure" "${at[@]}"
done
calibrated runs/qwen-frozen --config.steps=0 "${frozen[@]}"
measured runs/qwen-frozen eval "$config:measure" "${frozen[@]}" "${at[@]}"
measured runs/qwen-frozen words "$config:measure" "${frozen[@]}" "${words[@]}" "${at[@]}"
[[ -e runs/qwen-rl/after.json ]] || run --config="$config:reinforce" --workdir=runs/qwen-rl
measured runs/qwen-rl eval "$config:measure"
measured runs/qwen-rl controls "$config:control"
calibrated runs/qwen-sft
measured runs/qwen-sft eval "$config:measure"
