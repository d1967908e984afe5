#!/usr/bin/env bash
# Makes the tables and charts of docs/ anew from the records of the published runs.
#
#   bash studies/tables.sh
#
# The records are docs/results/records/*.tar.xz, which studies/pack.sh wrote. Without changes to them or
# to the code, no file changes.
set -euo pipefail
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=../launch/env.sh
source "$checkout/launch/env.sh"
ensure_env studies
python() { PYTHONPATH=$checkout "$venv/bin/python" "$@"; }
results="$checkout/docs/results"
records=$(mktemp -d)
trap 'rm -rf "$records"' EXIT
for archive in "$results"/records/*.tar.xz; do tar -xJf "$archive" -C "$records"; done
cd "$records"
for sweep in runs/*; do
  case $sweep in # the evaluation of the initial checkpoint, with all layers
    *-base | *-initial-*) initial= ;;
    runs/qwen-gsm8k) initial=runs/qwen-gsm8k/model.path=runs_qwen-lens@full ;;
    runs/smollm2-*) initial=runs/smollm2-base/model.path=runs_smollm2-trunk@full ;;
    runs/evidence-word_problems | *-transfer-word_problems)
      initial=runs/evidence-initial-word_problems/task.name=word_problems@full ;;
    runs/evidence-*) initial=runs/evidence-initial-sums/task.name=sums@full ;;
    *) initial= ;;
  esac
  python -m studies.collect "$sweep" "$results/${sweep#runs/}" ${initial:+"--initial=$initial"}
done
python -m studies "$results"
