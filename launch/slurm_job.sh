#!/usr/bin/env bash
# The batch script that slurm.sh submits; runs on the first node of the job.
#
#   sbatch ... launch/slurm_job.sh CHECKOUT RESTARTS WORKER_OPTIONS -- JEXIT_ARGUMENTS
#
# Installs once, starts one worker.sh on every node, passes Slurm's notice on to them, and queues
# the job again when the run is to go on, up to RESTARTS times.

# shellcheck disable=SC2329 # traps call functions
set -euo pipefail
# Slurm runs a copy of this script from elsewhere, so the checkout comes as an argument.
# shellcheck source=launch/cluster.sh
source "$1/launch/cluster.sh"
restarts=$2
shift 2
directory=${1#--directory=}

step=""
noticed=0     # signals that the time is nearly over
terminated="" # cancelled or preempted: Slurm itself decides what comes next

notice() { # srun passes this signal on to its tasks
  noticed=$((noticed + 1))
  if [[ -n $step ]]; then kill -USR1 "$step" 2>/dev/null || true; fi
}

terminate() {
  noticed=$((noticed + 1))
  terminated=yes # the tasks have had the signal from Slurm
}

await_step() { # returns when srun has ended
  local before
  while :; do
    before=$noticed
    wait "$step" || true # the tasks say for themselves how they ended
    ((noticed != before)) || return 0
  done
}

coordinator() { # the first node, and a port that two jobs on it will hardly share
  local nodes
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  printf '%s:%s\n' "${nodes%%$'\n'*}" $((20000 + SLURM_JOB_ID % 20000))
}

trap notice USR1
trap terminate TERM

state=$directory/.jexit/$SLURM_JOB_ID
rm -rf "$state"
bash "$root/launch/worker.sh" install &
step=$! # in the background, so that a signal is heard; it ends the installation
installed=0
wait "$step" || installed=$?
step=""
if ((noticed)); then
  result=$RESTART
elif ((installed)); then
  exit "$installed"
else
  slurm_step "$SLURM_JOB_NUM_NODES" "$(coordinator)" --state="$state" "$@"
  "${step_command[@]}" &
  step=$!
  ((noticed == 0)) || kill -USR1 "$step" 2>/dev/null || true
  await_step
  codes=$(cat "$state"/code "$state"/*/code 2>/dev/null || true)
  # A node that was lost or killed has left nothing behind.
  while (($(wc -w <<<"$codes") < SLURM_JOB_NUM_NODES)); do codes+=" $RESTART"; done
  # shellcheck disable=SC2086 # a list of words
  result=$(verdict $codes)
fi

if [[ $result == "$RESTART" && -z $terminated ]]; then
  if ((${SLURM_RESTART_COUNT:-0} < restarts)); then
    say "the run was interrupted; the job queues again and continues it."
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  say "the job has been queued again $restarts times; submit it again to go on."
fi
exit "$result"
