#!/usr/bin/env bash
# Runs a job on a Cloud TPU slice and sees it through preemptions, with gcloud.
#
#   bash launch/tpu_vm.sh --name=NAME --zone=ZONE --type=TYPE --shared=SHARED [OPTIONS] -- JEXIT...
#   bash launch/tpu_vm.sh stop|fetch|delete ...the same options... [-- JEXIT...]
#
# Creates the slice, or uses the one of that name; copies the checkout to every worker, mounts SHARED
# there, installs, and runs `python -m jexit.main JEXIT...` on all of them. When the slice is
# preempted it is deleted and made again, and the run continues from its newest checkpoint. At the
# end the results are fetched, without checkpoints. The run does not depend on this terminal: after
# Ctrl-C or a broken connection the same command follows it again. `stop` has it save and end.
#
#   --name=NAME        the slice, and with --queued its request
#   --zone=ZONE        where, such as us-central2-b
#   --type=TYPE        v5litepod-N, v6e-N, v5p-N or v4-N
#   --shared=SHARED    gs://BUCKET[/PATH] (by gcsfuse; let the bucket have a hierarchical namespace)
#                      or HOST:/EXPORT (NFS); jexit's relative paths, such as runs/… and models/…,
#                      lie in it
#   --mount=DIR        where every worker mounts it (default /mnt/jexit)
#   --project=PROJECT  (default: gcloud's own)
#   --queued           ask for the slice as a queued resource and wait for it
#   --spot             ask for spot capacity, which may be preempted
#   --runtime=VERSION  the image (default: what Cloud TPU recommends for the type)
#   --timeout=SECONDS  longest wait for a slice (default 86400)
#   --restarts=N       how often the run is started again at most (default 100)
#   --results=DIR      where the results go on this machine (default: here)
#   --delete           delete the slice when the run has ended, however it has
#   --env=NAME=VALUE   a variable for the workers; may come several times
#   --option=OPTION    a further option for gcloud's create; may come several times
#   --dry-run          print every command, in order, and run none
#
# JEXIT_POLL_SECONDS is the time between two looks at the slice (default 20). Exit codes: jexit's; 2
# for a command line that cannot be right; 3 for a run that was stopped; 42 when the restarts are
# used up.

# shellcheck disable=SC2154 # parse_options sets opt_NAME
set -euo pipefail
# shellcheck source=launch/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

EXPORT='^[^/: ]+:/([^/ ][^ ]*)?$' # of NFS
poll=${JEXIT_POLL_SECONDS:-20}
remote_state=.jexit # in every worker's home directory

read_options() {
  parse_options "run stop fetch delete" \
    "name zone type shared mount project runtime timeout restarts results" \
    "queued spot delete dry-run" "$@"
  dry_run=$opt_dry_run
  require name zone
  check_name "$opt_name"
  opt_mount=${opt_mount:-/mnt/jexit}
  opt_timeout=${opt_timeout:-86400}
  opt_restarts=${opt_restarts:-100}
  opt_results=${opt_results:-.}
  check_directory mount "$opt_mount"
  check_count timeout "$opt_timeout"
  check_count restarts "$opt_restarts"
  if [[ $action == run || $action == fetch ]]; then
    require shared
    [[ $opt_shared =~ $BUCKET || $opt_shared =~ $EXPORT ]] ||
      misuse "--shared is '$opt_shared'; it is gs://BUCKET[/PATH] or, for NFS, HOST:/EXPORT."
    check_job "$opt_mount"
  fi
  if [[ $action == run ]]; then
    require type
    read_accelerator "$opt_type"
    check_mesh "$chips" "$opt_type"
  fi
  check_tools gcloud
  place=(--zone="$opt_zone" ${opt_project:+--project="$opt_project"})
}

ask() { # ask ANSWER GCLOUD_ARG ...: what gcloud prints; ABSENT when there is no such thing
  local error
  if [[ -n $dry_run ]]; then
    quoted gcloud "$@"
  elif ! gcloud "$@" 2>"$scratch/error"; then
    error=$(<"$scratch/error")
    [[ $error == *NOT_FOUND* || $error == *"was not found"* ]] ||
      die "gcloud could not tell the state of $opt_name: ${error//$'\n'/ }"
    echo ABSENT
  fi
}

node_state() {
  ask compute tpus tpu-vm describe "$opt_name" "${place[@]}" \
    '--format=value[separator=" "](state,acceleratorType)'
}

request_state() {
  ask compute tpus queued-resources describe "$opt_name" "${place[@]}" \
    '--format=value(state.state)'
}

tpu_state() { # READY TYPE, ABSENT, GONE (to be deleted), STOPPED, or the state that will pass
  local state
  state=$(node_state) || exit 1
  if [[ -n $opt_queued && ${state%% *} != READY ]]; then
    state=$(request_state) || exit 1
    # The request has its slice, and the slice is gone or on its way: the slice knows.
    if [[ $state == ACTIVE ]]; then
      state=$(node_state) || exit 1
      [[ $state != ABSENT ]] || state=GONE
    fi
  fi
  case $state in
    PREEMPTED* | TERMINATED* | FAILED* | SUSPENDED* | HIDDEN* | HIDING* | GONE) echo GONE ;;
    STOPPED*) echo STOPPED ;;
    *) printf '%s\n' "${state:-UNKNOWN}" ;;
  esac
}

create_tpu() {
  local errors=/dev/null command=(gcloud compute tpus)
  if [[ -n $opt_queued ]]; then
    command+=(queued-resources create "$opt_name" --node-id="$opt_name" "${place[@]}"
      --accelerator-type="$accelerator" --runtime-version="${opt_runtime:-$runtime}")
  else
    command+=(tpu-vm create "$opt_name" "${place[@]}"
      --accelerator-type="$accelerator" --version="${opt_runtime:-$runtime}")
  fi
  command+=(${opt_spot:+--spot} ${extra_options[@]+"${extra_options[@]}"})
  [[ -n $dry_run ]] || errors=$scratch/error
  if run_cmd "${command[@]}" 2>"$errors"; then
    cat "$errors" >&2
    return
  fi
  cat "$errors" >&2
  # Capacity comes back; any other reason stays.
  grep -qi capacity "$errors" ||
    die "gcloud could not create $opt_name for the reason above; put that right and try again."
}

delete_tpu() {
  if [[ -n $opt_queued ]]; then
    run_cmd gcloud compute tpus queued-resources delete "$opt_name" "${place[@]}" --force --quiet
  else
    run_cmd gcloud compute tpus tpu-vm delete "$opt_name" "${place[@]}" --quiet
  fi
}

ensure_tpu() { # returns when the slice is there and of the right type
  local state said="" end=$((SECONDS + opt_timeout))
  while :; do
    state=$(tpu_state) || exit 1
    case $state in
      READY\ "$accelerator" | READY) return ;;
      READY*)
        misuse "$opt_name is a ${state#* } and --type is $opt_type; delete it first, or choose" \
          "another --name."
        ;;
      ABSENT) create_tpu ;;
      GONE) delete_tpu ;;
      STOPPED) run_cmd gcloud compute tpus tpu-vm start "$opt_name" "${place[@]}" ;;
      *)
        [[ $state == "$said" ]] || say "$opt_name is ${state%% *}; waiting for it."
        said=$state
        ;;
    esac
    ((SECONDS < end)) ||
      die "$opt_name was not ready within $opt_timeout s (it is ${state%% *}); try again, another" \
        "--zone, or a longer --timeout."
    sleep "$poll"
  done
}

on_all() { # on_all COMMAND: on every worker
  run_cmd gcloud compute tpus tpu-vm ssh "$opt_name" "${place[@]}" --worker=all --command="$1"
}

worker() { # worker ACTION ARG ...: the command line of worker.sh on a worker
  printf 'JEXIT_EXTRAS=tpu bash jexit/launch/worker.sh %s\n' "$(quoted "$@")"
}

copy_and_install() {
  local archive=$scratch/jexit.tar.gz unpack
  # Not under a run that is going: the code that it started with stays. What is left of earlier
  # runs must not be taken for the end of this one.
  unpack="mkdir -p jexit $remote_state && if flock -n $remote_state/lock true; then"
  unpack+=" rm -f $remote_state/code $remote_state/command && cd jexit &&"
  unpack+=" rm -rf jexit convert configs launch && tar -xzf ../jexit.tar.gz; fi"
  run_cmd bash "$root/launch/pack.sh" "$archive" &&
    run_cmd gcloud compute tpus tpu-vm scp "$archive" "$opt_name:jexit.tar.gz" "${place[@]}" \
      --worker=all &&
    on_all "$unpack" &&
    on_all "$(worker install --source="$opt_shared" --mount="$opt_mount")"
}

prepare() { # a slice that has just come up may not take connections yet
  local try
  for try in 1 2 3 4 5; do
    ! copy_and_install || return 0
    [[ $(tpu_state) == READY* ]] || return 1
    say "copying and installing failed (try $try of 5); trying again."
    sleep "$poll"
  done
  die "nothing could be installed on $opt_name in 5 tries; the reason is above."
}

ended() { # how the run ended: a code, `gone` (the slice), `other` (it runs another job) or `running`
  # (only the connection broke)
  local state codes
  state=$(tpu_state) || exit 1
  if [[ $state != READY* ]]; then
    echo gone
  elif ! codes=$(gcloud compute tpus tpu-vm ssh "$opt_name" "${place[@]}" --worker=all \
    --command="$(worker_status)" 2>/dev/null); then
    echo running # a worker that does not answer: look again
  else
    codes=$(sed -n 's/.*jexit-status: *\([a-z0-9]*\).*/\1/p' <<<"$codes")
    # shellcheck disable=SC2086 # a list of words
    case $codes in
      *other*) echo other ;;
      *running* | "") echo running ;;
      *) verdict ${codes//none/$RESTART} ;;
    esac
  fi
}

worker_status() {
  worker status --state="$remote_state" -- "${arguments[@]}"
}

follow() { # follow [--attach]
  worker_options "$opt_mount"
  on_all "$(worker follow "$@" "${options[@]}" --state="$remote_state" -- "${arguments[@]}")"
}

see_through() { # runs to the end; sets $code
  local tries=0 how attach=""
  while :; do
    ensure_tpu
    how=gone
    # What is going already must not be started a second time on a host where it has ended.
    if [[ -n $attach ]] || prepare; then
      # Some workers may fail and others not; only the codes that they left behind tell.
      follow $attach || true
      how=$(ended) || exit 1
    fi
    attach=""
    case $how in
      other) die "$opt_name runs another job; stop it first, or choose another --name." ;;
      gone) say "$opt_name is gone; making it again, and the run continues." ;;
      running)
        say "the connection to $opt_name broke; following the run again."
        attach=--attach
        ;;
      "$RESTART") say "the run was interrupted; starting it again." ;;
      *)
        code=$how
        return
        ;;
    esac
    code=$RESTART
    ((tries++ < opt_restarts)) || {
      say "the run has been interrupted $tries times; raise --restarts to go on."
      return
    }
    sleep "$poll"
  done
}

fetch() { # everything of the run but its checkpoints
  local target=$opt_results/$run_directory
  if [[ $opt_shared == gs://* ]]; then
    fetch_bucket
    return
  fi
  run_cmd mkdir -p "$target"
  run_cmd gcloud compute tpus tpu-vm ssh "$opt_name" "${place[@]}" --worker=0 \
    --command="$(quoted tar -C "$opt_mount/$run_directory" --exclude=./checkpoints \
      -czf jexit-results.tar.gz .)"
  run_cmd gcloud compute tpus tpu-vm scp "$opt_name:jexit-results.tar.gz" \
    "$target/jexit-results.tar.gz" "${place[@]}" --worker=0
  run_cmd tar -C "$target" -xzf "$target/jexit-results.tar.gz"
  run_cmd rm "$target/jexit-results.tar.gz"
}

plan() { # --dry-run: what run does, as far as it can be known beforehand
  note "the state of the slice; when it is READY, nothing is created"
  [[ -z $opt_queued ]] || request_state
  node_state
  create_tpu
  note "the state again, until it is READY"
  node_state
  note "copy, mount and install"
  copy_and_install
  note "run; the same command finds a run that is going"
  follow
  note "how it ended on every worker"
  on_all "$(worker_status)"
  note "after a preemption these, then everything again from the second look at the state on:"
  { delete_tpu && create_tpu; } | sed 's/^/# /'
  note "the results"
  fetch
  [[ -z $opt_delete ]] || delete_tpu
}

main() {
  local code=0
  read_options "$@"
  scratch=$(scratch_directory)
  if [[ -n $dry_run && $action == run ]]; then
    run_cmd mkdir -p "$scratch"
    plan
    return
  fi
  [[ -n $dry_run ]] || mkdir -p "$scratch"
  case $action in
    stop) on_all "$(worker stop --state="$remote_state")" ;;
    fetch) fetch ;;
    delete) delete_tpu ;;
    run)
      trap 'say "the run goes on; the same command follows it again, and stop ends it."; exit 130' INT
      see_through
      fetch || say "the results could not be fetched; the action fetch tries again."
      [[ -z $opt_delete ]] || delete_tpu
      exit "$code"
      ;;
  esac
}

main "$@"
