#!/usr/bin/env bash
# Study E: SmolLM2-135M, fine-tuned, calibrated and reinforced (configs/experiments/smollm2.py).
#
#   bash studies/smollm2.sh [--jobs=N]
#
# Takes models/smollm2, writes runs/smollm2-*, and goes on where it was stopped.
set -euo pipefail
checkout="$(dirname "${BASH_SOURCE[0]}")/.."
config="$checkout/configs/experiments/smollm2.py"
calibrated=(runs/smollm2-sft/seed={1,2,3})
reinforced=(runs/smollm2-rl/rl.depth_coef={0,10},seed={1,2,3})
# NAME MODELS [FLAGS]: measures what answers owe to the chains of thought.
chain() {
  bash "$checkout/launch/sweep.sh" --config="$config:chain" --into="runs/$1" "model.path=$2" "${@:3}"
}
[[ -e runs/smollm2-trunk/after.json ]] ||
  bash "$checkout/launch/run.sh" --config="$config:finetune" --workdir=runs/smollm2-trunk
bash "$checkout/launch/sweep.sh" --config="$config:measure" --into=runs/smollm2-base \
  --config.eval.policies="('full',)" --config.eval.measures="()" \
  "model.path=models/smollm2|runs/smollm2-trunk" "$@"
bash "$checkout/launch/sweep.sh" --config="$config:calibrate" --eval="$config:measure" \
  --into=runs/smollm2-sft seed=1,2,3 "$@"
bash "$checkout/launch/sweep.sh" --config="$config:reinforce" --eval="$config:measure" \
  --into=runs/smollm2-rl --config.model.path=runs/smollm2-sft/seed={seed} \
  rl.depth_coef=0,4,10 seed=1,2,3 "$@"
(IFS='|' && chain smollm2-sft-chain "${calibrated[*]}" "$@")
(IFS='|' && chain smollm2-rl-chain "${reinforced[*]}" "$@")
bash "$checkout/launch/sweep.sh" --config="$config:published_calibrate" --eval="$config:measure" \
  --into=runs/smollm2-published-sft seed=1,2,3 "$@"
bash "$checkout/launch/sweep.sh" --config="$config:published_reinforce" --eval="$config:measure" \
  --into=runs/smollm2-published-rl --config.model.path=runs/smollm2-published-sft/seed={seed} \
  seed=1,2,3 "$@"
