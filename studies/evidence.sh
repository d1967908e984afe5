#!/usr/bin/env bash
# The studies on the shipped model (configs/experiments/evidence.py).
#
#   bash studies/evidence.sh [--jobs=2]
#
# Writes runs/evidence-* and goes on where it was stopped.
set -euo pipefail
checkout="$(dirname "${BASH_SOURCE[0]}")/.."
config="$checkout/configs/experiments/evidence.py"
calibrated=jexit/assets/tiny-calibrated
seeds=seed=0,1,2

sweep() { bash "$checkout/launch/sweep.sh" "$@"; }
jexit() { bash "$checkout/launch/run.sh" "$@"; }

# 1. What is saved: both penalties, and none.
words=(--config.task.name=word_problems --config.rl.length_ref=18.0)
for task in sums word_problems; do
  [[ $task == sums ]] && of=() || of=("${words[@]}")
  sweep --config="$config:reinforce" --eval="$config:measure" --into="runs/evidence-$task" \
    ${of[@]+"${of[@]}"} rl.depth_norm=total rl.depth_coef=0,0.2,0.8,2 $seeds "$@"
done
sweep --config="$config:reinforce" --eval="$config:measure" --into=runs/evidence-sums \
  rl.depth_norm=mean rl.depth_coef=0.2,0.8,2 $seeds "$@"

# 2. The rival: fewer layers, tuned and reinforced alike.
for layers in 2 3 4; do
  small="runs/evidence-small-$layers"
  [[ -e $small-cut ]] || "$checkout/.venv/bin/python" -m convert.from_hf \
    --source=jexit/assets/tiny --target="$small-cut" --layers="$layers"
  [[ -e $small/after.json ]] || jexit --config="$config:small" --workdir="$small" \
    --config.model.path="$small-cut"
  sweep --config="$config:no_exits" --eval="$config:compare" --into=runs/evidence-small \
    "model.path=$small" $seeds "$@"
done

# 3. Baselines: confidence thresholds, one exit trained alike, reinforcement without exits.
sweep --config="$config:compare" --into=runs/evidence-confidence \
  --config.eval.policies="('full','sample','threshold:0.3','threshold:0.5','threshold:0.7','confidence:0.5','confidence:0.9','confidence:0.99')" \
  "model.path=$calibrated" task.name=sums,word_problems "$@"
sweep --config="$config:fixed_exit" --eval="$config:compare" --into=runs/evidence-fixed \
  "exits.layers=(2,)|(3,)|(4,)" $seeds "$@"
sweep --config="$config:no_exits" --eval="$config:compare" --into=runs/evidence-no_exits $seeds "$@"

# 4. Cannot, or forgot: large steps taught again, at full depth and under the exits.
for seed in 0 1 2; do
  for coef in 0 2; do
    sweep --config="$config:relearn" --eval="$config:measure" --into=runs/evidence-relearn \
      "model.path=runs/evidence-sums/rl.depth_norm=total,rl.depth_coef=$coef,seed=$seed" \
      finetune.policy=full,sample seed="$seed" "$@"
  done
done

# 6. Transfer to the task that was not priced.
for seed in 0 1 2; do
  for coef in 0 2; do
    sweep --config="$config:measure" --into=runs/evidence-transfer \
      "model.path=runs/evidence-sums/rl.depth_norm=total,rl.depth_coef=$coef,seed=$seed" \
      task.name=word_problems "$@"
    sweep --config="$config:measure" --into=runs/evidence-transfer \
      "model.path=runs/evidence-word_problems/rl.depth_norm=total,rl.depth_coef=$coef,seed=$seed" \
      task.name=sums "$@"
  done
done

# 7. Robustness: two other values of each knob, one at a time.
for knob in rl.kl_coef=0,0.1 optim.lora_lr=3e-4,3e-3 optim.exit_lr=1e-3,2e-2 rl.rollouts=4,16 \
  rl.temperature=0.7,1.3; do
  sweep --config="$config:reinforce" --eval="$config:compare" --into="runs/evidence-${knob%%=*}" \
    --config.rl.depth_coef=0.8 "$knob" $seeds "$@"
done
