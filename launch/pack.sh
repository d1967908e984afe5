#!/usr/bin/env bash
# Packs the program for machines elsewhere: what git knows of it, as the files are now.
#
#   bash launch/pack.sh FILE.tar.gz      or      bash launch/pack.sh DIRECTORY/
#
# The package, the converters, the configs and the launch scripts go in, new files among them that
# git does not ignore; runs, models, environments and whatever else lies in the checkout do not.
# A name that ends in a slash is a directory to put the same files into, which must not exist.
set -euo pipefail
# shellcheck source=launch/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

PARTS="jexit convert configs launch pyproject.toml README.md LICENSE"

files() { # their paths, each ended by a null byte
  local path
  cd "$root"
  # shellcheck disable=SC2086 # a list of words
  if git -C "$root" rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard -- $PARTS
  else # unpacked from an archive
    find $PARTS -type f -not -name '*.pyc' -print0
  fi | while IFS= read -r -d '' path; do
    # Git also lists what has been deleted and not yet committed.
    if [[ -e $path ]]; then printf '%s\0' "$path"; fi
  done
}

archive() { # writes it to standard output
  # macOS would add a file of attributes beside every file.
  files | COPYFILE_DISABLE=1 tar -C "$root" --null -T - -czf -
}

(($# == 1)) && [[ $1 != -* ]] ||
  misuse "pack.sh takes one argument, the archive to write or a new directory/."
case $1 in
  */)
    [[ ! -e $1 ]] || misuse "$1 exists; name a directory that does not, or remove it."
    mkdir -p "$1"
    archive | tar -C "$1" -xzf -
    ;;
  *)
    [[ -d $(dirname "$1") ]] || misuse "there is no directory $(dirname "$1"); make it first."
    archive >"$1.part"
    mv -f "$1.part" "$1"
    ;;
esac
