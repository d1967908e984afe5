#!/usr/bin/env bash
# Runs a job: makes or updates .venv where needed, then starts jexit with the arguments given here.
#
#   bash launch/run.sh --config=configs/rl.py [--workdir=DIR] [--config.KEY=VALUE ...]
#
# Needs nothing but Python 3.11 to 3.13; launch/env.sh says which variables change what it does.
# Paths are relative to the current directory; a config that is not there is taken from the checkout.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

extras=$(accelerator_extras)
ensure_env "$extras"

topology="" previous=""
for argument in "$@"; do
  case $previous:$argument in
    *:--aot=* | *:-aot=*) topology=${argument#*=} ;;
    --aot:* | -aot:*) topology=$argument ;;
  esac
  previous=$argument
done
[[ -z $topology ]] || compile_for "$topology"
exec "$venv/bin/python" -m jexit.main "$@"
