#!/usr/bin/env bash
# The studies on the shipped model (configs/experiments/evidence.py).
#
#   bash studies/evidence.sh [--jobs=2]
#
# Writes runs/evidence-* and goes on where it was stopped. The measures of every model are part of
# each study (`--eval`).
set -euo pipefail
checkout="$(dirname "${BASH_SOURCE[0]}")/.."
config="$checkout/configs/experiments/evidence.py"
calibrated=jexit/assets/tiny-calibrated
trunk=jexit/assets/tiny
seeds=seed=0,1,2
thresholds="('full','sample','threshold:0.3','threshold:0.5','threshold:0.7',"
thresholds+="'confidence:0.5','confidence:0.9','confidence:0.99')"

sweep() { bash "$checkout/launch/sweep.sh" "$@"; }
jexit() { bash "$checkout/launch/run.sh" "$@"; }
# The models of a study with the total penalty, at the coefficients 0 and 2, separated by |.
trained() {
  local paths=("runs/evidence-$1/rl.depth_norm=total,rl.depth_coef="{0,2},seed={0,1,2})
  (IFS='|' && printf '%s' "${paths[*]}")
}

# The initial checkpoint.
sweep --config="$config:measure" --into=runs/evidence-initial-sums task.name=sums "$@"
sweep --config="$config:measure_word_problems" --into=runs/evidence-initial-word_problems \
  task.name=word_problems "$@"

# What both penalties save, and none.
sweep --config="$config:reinforce" --eval="$config:measure" --into=runs/evidence-sums \
  rl.depth_norm=total rl.depth_coef=0,0.8,2 $seeds "$@"
sweep --config="$config:reinforce" --eval="$config:measure" --into=runs/evidence-sums \
  rl.depth_norm=mean rl.depth_coef=0.8,2 $seeds "$@"
sweep --config="$config:reinforce" --eval="$config:measure_word_problems" \
  --into=runs/evidence-word_problems --config.task.name=word_problems \
  --config.rl.length_ref=18.0 rl.depth_norm=total rl.depth_coef=0,0.8,2 $seeds "$@"

# A length penalty that pulls the other way: depth and text compete.
sweep --config="$config:reinforce" --eval="$config:measure" --into=runs/evidence-length \
  --config.rl.depth_norm=mean --config.rl.length_coef=0.2 rl.depth_coef=0,1,4 $seeds "$@"

# Smaller models, trained alike: one exit for all tokens, in effect; and all layers.
for layers in 2 3 4; do
  small="runs/evidence-small-$layers"
  [[ -e $small-cut ]] || "$checkout/.venv/bin/python" -m convert.from_hf \
    --source="$trunk" --target="$small-cut" --layers="$layers"
  [[ -e $small/after.json ]] ||
    jexit --config="$config:small" --workdir="$small" --config.model.path="$small-cut"
done
small=runs/evidence-small
sweep --config="$config:full_depth" --eval="$config:measure_chain" --into=runs/evidence-full_depth \
  "model.path=$trunk|$small-2|$small-3|$small-4" $seeds "$@"

# Confidence thresholds on the calibrated exits.
for task in sums word_problems; do
  sweep --config="$config:compare" --into="runs/evidence-confidence-$task" \
    --config.model.path="$calibrated" --config.eval.policies="$thresholds" task.name="$task" "$@"
done

# Does brief fine-tuning restore large steps, at full depth and under the exits?
sweep --config="$config:relearn" --eval="$config:measure_full" --into=runs/evidence-relearn-full \
  "model.path=$(trained sums)" "$@"
sweep --config="$config:relearn" --eval="$config:measure" --into=runs/evidence-relearn-sample \
  --config.finetune.policy=sample "model.path=$(trained sums)" "$@"

# Tasks that RL did not train on.
sweep --config="$config:measure_word_problems" --into=runs/evidence-transfer-word_problems \
  --config.task.name=word_problems "model.path=$(trained sums)" "$@"
sweep --config="$config:measure" --into=runs/evidence-transfer-sums \
  "model.path=$(trained word_problems)" "$@"

# RL from other calibrations, of which 0.5 and 60 are the shipped model's settings.
calibration="$checkout/configs/experiments/calibration.py"
sweep --config="$calibration" --into=runs/evidence-explore sft.explore=0,0.25,0.5 "$@"
sweep --config="$calibration" --into=runs/evidence-sharpness sft.sharpness=10,200 "$@"
others="runs/evidence-explore/sft.explore=0|runs/evidence-explore/sft.explore=0.25"
others+="|runs/evidence-explore/sft.explore=0.5"
others+="|runs/evidence-sharpness/sft.sharpness=10|runs/evidence-sharpness/sft.sharpness=200"
sweep --config="$config:reinforce" --eval="$config:compare" --into=runs/evidence-calibrations \
  --config.rl.depth_coef=0.8 "model.path=$others" $seeds "$@"

# Two other values of each setting of RL, one at a time.
for setting in rl.kl_coef=0,0.1 optim.lora_lr=3e-4,3e-3 optim.exit_lr=1e-3,2e-2 rl.rollouts=4,16; do
  sweep --config="$config:reinforce" --eval="$config:compare" \
    --into="runs/evidence-${setting%%=*}" --config.rl.depth_coef=0.8 "$setting" $seeds "$@"
done
