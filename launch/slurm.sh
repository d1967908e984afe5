#!/usr/bin/env bash
# Runs a job on the GPU nodes of a Slurm cluster.
#
#   bash launch/slurm.sh --name=NAME --nodes=N --gpus=G --shared=DIR [OPTIONS] -- JEXIT...
#
# Submits a batch job that runs `python -m jexit.main JEXIT...` as one process a node, which uses all
# of the node's GPUs. Before the time limit the job has jexit save, and queues itself again; so it
# does when a node is lost. The run then continues from its newest checkpoint. DIR and the checkout
# must lie on a file system that every node sees, and the checkout stay as it is until the job has
# ended; jexit's relative paths lie in DIR. The first node installs, so nodes need the network, or
# the environment must be there: JEXIT_EXTRAS=cuda bash launch/run.sh --help on any machine.
#
#   --name=NAME            the job
#   --nodes=N              how many nodes (default 1)
#   --gpus=G               GPUs of each node
#   --shared=DIR           what the nodes share
#   --time=TIME            the limit of one turn in the queue, such as 24:00:00
#   --partition=PARTITION
#   --account=ACCOUNT
#   --notice=SECONDS       how long before the limit jexit is told to save (default 180)
#   --restarts=N           how often the job queues itself again at most (default 100)
#   --wait                 return when the job has ended, with its exit code
#   --env=NAME=VALUE       a variable for the nodes; may come several times
#   --option=OPTION        a further option for sbatch; may come several times
#   --dry-run              print every command, in order, and run none
#
# Exit codes: those of sbatch; 2 for a command line that cannot be right.

# shellcheck disable=SC2154 # parse_options sets opt_NAME
set -euo pipefail
# shellcheck source=launch/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

read_options() {
  parse_options "run" "name nodes gpus shared time partition account notice restarts" \
    "wait dry-run" "$@"
  dry_run=$opt_dry_run
  opt_nodes=${opt_nodes:-1}
  opt_notice=${opt_notice:-180}
  opt_restarts=${opt_restarts:-100}
  require name gpus shared
  check_name "$opt_name"
  check_count nodes "$opt_nodes"
  check_count gpus "$opt_gpus"
  check_count notice "$opt_notice"
  check_count restarts "$opt_restarts"
  ((opt_nodes > 0 && opt_gpus > 0)) ||
    misuse "--nodes is $opt_nodes and --gpus is $opt_gpus; both are at least 1."
  check_directory shared "$opt_shared"
  check_job "$opt_shared"
  check_mesh $((opt_nodes * opt_gpus)) "$opt_nodes × $opt_gpus GPUs"
  check_tools sbatch
  # Printing needs no directory: it may be meant for another machine.
  [[ -n $dry_run || -d $opt_shared ]] ||
    misuse "there is no directory $opt_shared; make it, on a file system that every node sees."
}

submit() {
  local command=(sbatch --parsable --job-name="$opt_name" --nodes="$opt_nodes" --ntasks-per-node=1
    --gpus-per-node="$opt_gpus" ${opt_time:+--time="$opt_time"}
    ${opt_partition:+--partition="$opt_partition"} ${opt_account:+--account="$opt_account"}
    # To the batch script alone, which passes it on to every node's process.
    --signal="B:USR1@$opt_notice"
    --requeue --open-mode=append --output="${opt_shared%/}/$opt_name-%j.log"
    ${opt_wait:+--wait} ${extra_options[@]+"${extra_options[@]}"})
  worker_options "$opt_shared"
  run_cmd "${command[@]}" "$root/launch/slurm_job.sh" "$root" "$opt_restarts" \
    "${options[@]}" -- "${arguments[@]}"
}

plan() { # --dry-run: what the job then does on its first node
  note "then, in the job:"
  {
    quoted bash "$root/launch/worker.sh" install
    quoted scontrol show hostnames NODES
    slurm_step "$opt_nodes" "FIRST_NODE:PORT" --state="${opt_shared%/}/.jexit/JOB" \
      "${options[@]}" -- "${arguments[@]}"
    quoted "${step_command[@]}"
    quoted scontrol requeue JOB
  } | sed 's/^/# /'
}

read_options "$@"
submit
[[ -z $dry_run ]] || plan
note "its output is in ${opt_shared%/}/$opt_name-JOB.log"
