#!/usr/bin/env bash
# Runs a job on the TPUs of a GKE cluster, with xpk.
#
#   bash launch/gke.sh --name=NAME --cluster=CLUSTER --zone=ZONE --type=TYPE \
#       --storage=STORAGE --mount=DIR [OPTIONS] -- JEXIT...
#   bash launch/gke.sh fetch|delete ...the same options... [-- JEXIT...]
#
# Submits a workload that installs jexit in its containers and runs `python -m jexit.main JEXIT...`
# on every host of the slice. A host that is preempted or lost ends the others with an exit code on
# which the workload is started again, and the run continues from its newest checkpoint; a fault
# ends the workload. STORAGE is one that `xpk storage attach` has made known to the cluster, with
# DIR as its mount point, writable (--readonly=false); jexit's relative paths lie in it.
#
#   --name=NAME          the workload
#   --cluster=CLUSTER    the cluster, which xpk has set up
#   --zone=ZONE          its zone
#   --type=TYPE          v5litepod-N, v6e-N, v5p-N or v4-N
#   --storage=STORAGE    what the hosts share
#   --mount=DIR          where it is mounted
#   --shared=gs://BUCKET[/PATH]   the same seen from here, from which results are fetched
#   --project=PROJECT    (default: gcloud's own)
#   --image=IMAGE        the container's base, with Python 3.11 to 3.13 (default python:3.12)
#   --restarts=N         how often the workload is started again at most (default 100)
#   --wait               wait until it has ended, then fetch the results if --shared is given
#   --results=DIR        where the results go on this machine (default: here)
#   --env=NAME=VALUE     a variable for the hosts; may come several times
#   --option=OPTION      a further option for `xpk workload create`; may come several times
#   --dry-run            print every command, in order, and run none
#
# Exit codes: those of xpk; 2 for a command line that cannot be right.

# shellcheck disable=SC2154 # parse_options sets opt_NAME
set -euo pipefail
# shellcheck source=launch/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

GRACE_SECONDS=180 # between the notice and the end of a container, for the last checkpoint

read_options() {
  parse_options "run fetch delete" \
    "name cluster zone type storage mount shared project image restarts results" \
    "wait dry-run" "$@"
  dry_run=$opt_dry_run
  opt_image=${opt_image:-python:3.12}
  opt_restarts=${opt_restarts:-100}
  opt_results=${opt_results:-.}
  require name cluster zone
  check_name "$opt_name"
  check_count restarts "$opt_restarts"
  if [[ $action != delete ]]; then
    require mount
    check_directory mount "$opt_mount"
    check_job "$opt_mount"
    check_bucket
  fi
  case $action in
    run)
      require type storage
      read_accelerator "$opt_type"
      check_mesh "$chips" "$opt_type"
      ;;
    fetch) require shared ;;
  esac
  [[ $action == fetch ]] || check_tools xpk
  [[ -z $opt_shared || $action == delete ]] || check_tools gcloud
  place=(--cluster="$opt_cluster" --zone="$opt_zone" ${opt_project:+--project="$opt_project"})
}

check_bucket() {
  [[ -z $opt_shared || $opt_shared =~ $BUCKET ]] ||
    misuse "--shared is '$opt_shared'; it is gs://BUCKET[/PATH], or left out."
}

submit() {
  local sources=$scratch/checkout command
  worker_options "$opt_mount"
  # `exec`, so that the signals of the container reach the worker.
  command="exec env JEXIT_EXTRAS=tpu bash launch/worker.sh $(quoted run "${options[@]}" \
    -- "${arguments[@]}")"
  run_cmd rm -rf "$sources"
  run_cmd bash "$root/launch/pack.sh" "$sources/"
  run_cmd xpk workload create --workload="$opt_name" "${place[@]}" --tpu-type="$accelerator" \
    --storage="$opt_storage" --base-docker-image="$opt_image" --script-dir="$sources" \
    --max-restarts="$opt_restarts" --restart-on-exit-codes="$RESTART" \
    --termination-grace-period-seconds="$GRACE_SECONDS" \
    ${extra_options[@]+"${extra_options[@]}"} --command="$command"
}

await() {
  run_cmd xpk workload list "${place[@]}" --wait-for-job-completion="$opt_name"
}

main() {
  local code=0
  read_options "$@"
  scratch=$(scratch_directory)
  case $action in
    run)
      run_cmd mkdir -p "$scratch"
      submit
      if [[ -n $opt_wait ]]; then
        await || code=$?
        [[ -z $opt_shared ]] || fetch_bucket
      fi
      ;;
    fetch) fetch_bucket ;;
    delete) run_cmd xpk workload delete --workload="$opt_name" "${place[@]}" --force ;;
  esac
  exit "$code"
}

main "$@"
