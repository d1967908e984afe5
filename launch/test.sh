#!/usr/bin/env bash
# Runs the tests: makes or updates .venv with what they need, then starts pytest in the checkout.
#
#   bash launch/test.sh [PYTEST_ARGUMENTS]        e.g. tests/model -k exits, or -m slow
#
# Several cores: one pytest worker a core, as memory allows, each kept to its share of the threads.
# -n or anything that needs one process (--pdb, --collect-only, ...) turns that off.
# JEXIT_EXTRAS=test leaves PyTorch and lm-eval out; launch/env.sh has the other variables.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

extras=$(accelerator_extras)
case ,$extras, in
  *,test,* | *,dev,*) ;;
  *) extras=$extras,dev ;;
esac
ensure_env "$extras"
if [[ ${JEXIT_AOT:-1} != 0 ]]; then
  ensure_aot tpu || say "tests that compile for TPUs will be skipped."
  ensure_aot cuda || say "tests that compile for GPUs will be skipped."
fi

worker_count() {
  local cores memory_gib=8
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
  if [[ -r /proc/meminfo ]]; then
    memory_gib=$(awk '/^MemAvailable:/ {print int($2 / 1048576)}' /proc/meminfo)
  fi
  # Compiling for JAX and loading PyTorch takes up to 4 GiB a worker.
  printf '%s\n%s\n8\n' "$cores" "$((memory_gib / 4))" | sort -n | head -n 1
}

spread=yes
for argument in "$@"; do
  case $argument in
    -n* | --numprocesses* | --dist* | -p | -pno:xdist | --pdb* | --trace | -s | --capture=no) spread=no ;;
    --co | --collect-only | --fixtures* | --markers | -h | --help | -V | --version) spread=no ;;
  esac
done

arguments=()
workers=$(worker_count)
if [[ $spread == yes ]] && ((workers > 1)); then
  arguments=(-n "$workers" --dist loadfile)
  # PyTorch's and XLA's thread pools would each take every core in every worker.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
  export XLA_FLAGS="--xla_cpu_multi_thread_eigen=false ${XLA_FLAGS:-}"
fi

# XLA's compiler, in which the tests spend most of their time, is a fifth faster with jemalloc.
jemalloc=$(ldconfig -p 2>/dev/null | awk '/libjemalloc\.so\.2/ {print $NF; exit}') || true
[[ -z $jemalloc ]] || export LD_PRELOAD=${LD_PRELOAD:-$jemalloc}

cd "$root"
exec "$venv/bin/python" -m pytest ${arguments[@]+"${arguments[@]}"} "$@"
