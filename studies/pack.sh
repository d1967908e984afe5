#!/usr/bin/env bash
# Packs the records of finished sweeps, without weights, for publication.
#
#   bash studies/pack.sh NAME...      runs/NAME → docs/results/records/NAME.tar.xz
#
# Records are the settings, metrics, completions and the outcome of each problem. Unpacked into the
# current directory, the study's script treats their runs as finished.
set -euo pipefail
target="$(dirname "${BASH_SOURCE[0]}")/../docs/results/records"
mkdir -p "$target"
for name in "$@"; do
  [[ -d runs/$name ]] || { echo "jexit: runs/$name does not exist; run its study first" >&2; exit 2; }
  find "runs/$name" -type f \( -name '*.json' -o -name metrics.jsonl -o -name problems.csv \) \
    -not -path '*/checkpoints/*' -not -path '*/model/*' -not -path '*/teacher/*' \
    -not -path '*/.compiled/*' -print0 | sort -z |
    tar --null --files-from=- --owner=0 --group=0 --mtime=@0 -cJf "$target/$name.tar.xz.part"
  mv "$target/$name.tar.xz.part" "$target/$name.tar.xz"
done
