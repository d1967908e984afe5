#!/usr/bin/env bash
# Runs on every host of a cluster: mounts, installs, runs jexit there and says how it ended.
#
#   bash launch/worker.sh install [--source=gs://BUCKET[/PATH] or HOST:/EXPORT --mount=DIR]
#   bash launch/worker.sh run    --directory=DIR [--state=DIR] [--env=NAME=VALUE] -- JEXIT_ARGUMENTS
#   bash launch/worker.sh follow --directory=DIR --state=DIR [...] -- JEXIT_ARGUMENTS
#   bash launch/worker.sh status --state=DIR -- JEXIT_ARGUMENTS
#   bash launch/worker.sh stop   --state=DIR
#
# install  mounts the directory that all hosts share (Ubuntu and Debian) and makes .venv
# run      runs jexit in DIR, which all hosts share; TERM, INT and USR1 reach it as one SIGTERM
# follow   the same apart from this terminal: the run goes on when the connection breaks, and the
#          same command finds it again
# status   prints `jexit-status: ` and `running`, `other` (another job is), `none`, or the exit code
#          of the last run
# stop     has a followed run save and end, and waits for that
#
#   --attach                  follow: start nothing, only follow what is going
#   --coordinator=HOST:PORT   run: of several hosts started by srun, where process 0 listens
#
# Exit codes are jexit's, but 42 stands for every end that the same command continues: 3 (a signal),
# 4 (a host was lost) and 128 and more (killed). A run that `stop` ended keeps its 3.

# shellcheck disable=SC2154 # parse_options sets opt_NAME
set -euo pipefail
# shellcheck source=launch/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

# Where there is no supported Python, as on the images of TPU VMs.
UV="uv>=0.9,<1"
UV_PYTHON=3.12

child=""
signals=0 # that asked for a stop

as_root() {
  if [[ $(id -u) == 0 ]]; then "$@"; else sudo "$@"; fi
}

apt_install() { # waits for the machine's own updates, which run after its first start
  as_root apt-get -o DPkg::Lock::Timeout=600 -qq update
  as_root apt-get -o DPkg::Lock::Timeout=600 -qq -y install "$@"
}

install_gcsfuse() {
  local keys=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
  command -v gcsfuse >/dev/null 2>&1 && return
  say "installing gcsfuse."
  # shellcheck source=/dev/null
  printf 'deb [signed-by=%s] %s gcsfuse-%s main\n' \
    "$keys" "$packages" "$(source /etc/os-release && echo "$VERSION_CODENAME")" |
    as_root tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  curl -fsS "$packages/doc/apt-key.gpg" | as_root tee "$keys" >/dev/null
  apt_install gcsfuse
}

mount_shared() { # mount_shared SOURCE DIR
  local bucket=${1#gs://} path=""
  mountpoint -q "$2" && return
  as_root mkdir -p "$2"
  as_root chown "$(id -u):$(id -g)" "$2"
  case $1 in
    gs://*)
      install_gcsfuse
      [[ $bucket != */?* ]] || path=${bucket#*/}
      # Hosts must see each other's files at once, so nothing is cached. Checkpoints become whole
      # by renaming their directory, which a bucket without a hierarchical namespace does file by
      # file, up to the limit here.
      gcsfuse --implicit-dirs --rename-dir-limit=1000000 --metadata-cache-ttl-secs=0 \
        --metadata-cache-negative-ttl-secs=0 ${path:+--only-dir="${path%/}"} "${bucket%%/*}" "$2"
      ;;
    *)
      command -v mount.nfs >/dev/null 2>&1 || apt_install nfs-common
      as_root mount -t nfs -o hard,lookupcache=none "$1" "$2"
      ;;
  esac
  [[ -w $2 ]] || die "$2 is mounted from $1 and cannot be written to; let this machine write there."
}

provide_python() { # sets JEXIT_PYTHON where env.sh would find none
  [[ ! -x $venv/bin/python && -z ${JEXIT_PYTHON:-} ]] || return 0
  ! (find_python) >/dev/null 2>&1 || return 0
  say "there is no Python 3.11 to 3.13 on $(hostname); getting $UV_PYTHON with uv."
  python3 -m pip install --quiet --user "$UV" >&2
  python3 -m uv python install --quiet "$UV_PYTHON" >&2
  JEXIT_PYTHON=$(python3 -m uv python find --managed-python "$UV_PYTHON")
  export JEXIT_PYTHON
}

install_all() {
  [[ -z $opt_source ]] || mount_shared "$opt_source" "$opt_mount"
  provide_python
  ensure_env "$(accelerator_extras)"
  say "$(hostname) is ready."
}

request_stop() { # once: jexit takes a second signal as an order to end without saving
  signals=$((signals + 1))
  ((signals == 1)) || return 0
  if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}

await_child() { # sets $code to how it ended
  local before latest
  code=127
  while :; do
    before=$signals latest=0
    wait "$child" || latest=$?
    if ((latest < 0)); then
      # A child that ends just as a signal comes can be lost to bash, and its code with it.
      if kill -0 "$child" 2>/dev/null; then
        sleep 1
        continue
      fi
      ((code != 127)) || code=$((128 + 15))
      return 0
    fi
    # 127: it had ended already when the signal came, so its code is known.
    ((latest == 127)) || code=$latest
    # A signal interrupts `wait` without the child having ended.
    ((signals != before)) || return 0
  done
}

meaning() { # meaning CODE: the worker's exit code
  local asked=""
  [[ -z $opt_state || ! -e $opt_state/stopped ]] || asked=yes
  if (($1 == 3 || $1 >= 128)) && [[ -n $asked ]]; then
    echo 3
  elif (($1 == 3 || $1 == 4 || $1 >= 128)); then
    echo "$RESTART"
  else
    echo "$1"
  fi
}

leave_code() { # leave_code CODE: for whoever asks later how the run ended
  echo "$1" >"$opt_state/code.new"
  mv -f "$opt_state/code.new" "$opt_state/code"
}

run_job() {
  local code result pair
  trap request_stop TERM INT USR1
  if [[ -n $opt_coordinator ]]; then
    arguments+=(--coordinator="$opt_coordinator" --processes="$SLURM_NTASKS"
      --process="$SLURM_PROCID")
    # Each host of a step says for itself how it ended.
    [[ -z $opt_state ]] || opt_state=$opt_state/$SLURM_PROCID
  fi
  if [[ -n $opt_state ]]; then
    mkdir -p "$opt_state"
    rm -f "$opt_state/code"
    echo $$ >"$opt_state/pid"
    trap 'leave_code $?' EXIT
  fi
  [[ -d $opt_directory ]] ||
    die "there is no directory $opt_directory on $(hostname); mount what all hosts share there."
  for pair in ${environment[@]+"${environment[@]}"}; do export "${pair?}"; done
  provide_python
  cd "$opt_directory"
  code=$((128 + 15)) # of a run that was stopped before it began
  if ((signals == 0)); then
    bash "$root/launch/run.sh" "${arguments[@]}" &
    child=$!
    # The signal may have come before there was a number to send it on to.
    ((signals == 0)) || kill -TERM "$child" 2>/dev/null || true
    await_child
  fi
  result=$(meaning "$code")
  ((code == 0)) || say "$(hostname): jexit ended with $code, this host with $result."
  exit "$result"
}

last_code() { # what a run that is over left behind; nothing means that it was killed
  if [[ -r $opt_state/code ]]; then cat "$opt_state/code"; else echo "$RESTART"; fi
}

follow_job() {
  local pair
  local options=(--directory="$opt_directory" --state="$opt_state")
  for pair in ${environment[@]+"${environment[@]}"}; do options+=(--env="$pair"); done
  if [[ -n $opt_attach ]] && ! going; then exit "$(last_code)"; fi
  mkdir -p "$opt_state"
  exec 8>>"$opt_state/lock"
  if flock -n 8; then
    rm -f "$opt_state/code" "$opt_state/stopped"
    quoted "${arguments[@]}" >"$opt_state/command"
    : >"$opt_state/log" # there before anybody reads it
    # The run inherits the lock and holds it as long as one of its processes lives.
    setsid bash "$root/launch/worker.sh" run "${options[@]}" -- "${arguments[@]}" \
      </dev/null >>"$opt_state/log" 2>&1 &
  elif same_job; then
    say "$(hostname): this run is going already; following it."
  else
    misuse "$(hostname) is running another job ($(<"$opt_state/command")); stop it first."
  fi
  exec 8>&-
  flock "$opt_state/lock" true & # until the run is over
  tail --pid=$! -n +1 -f "$opt_state/log" || true
  exit "$(last_code)"
}

going() { # a followed run is going here
  [[ -e $opt_state/lock ]] && ! flock -n "$opt_state/lock" true
}

same_job() { # the arguments here are those of the last run that was started
  [[ $(<"$opt_state/command") == "$(quoted "${arguments[@]}")" ]]
}

show_status() {
  if going; then
    if same_job; then echo "jexit-status: running"; else echo "jexit-status: other"; fi
  elif [[ -e $opt_state/command ]]; then
    echo "jexit-status: $(last_code)"
  else
    echo "jexit-status: none"
  fi
}

stop_job() {
  going || { say "$(hostname): no run is going." && return; }
  : >"$opt_state/stopped"
  kill -TERM "$(<"$opt_state/pid")"
  flock -w 900 "$opt_state/lock" true ||
    die "$(hostname): the run has not ended within 900 s of being asked to."
}

parse_options "install run follow status stop" "directory state source mount coordinator" "attach" "$@"
[[ -z $opt_state || $opt_state == /* ]] || opt_state=$PWD/$opt_state
case $action in
  install)
    [[ -z $opt_source$opt_mount ]] || require source mount
    install_all
    ;;
  run)
    require directory
    run_job
    ;;
  follow)
    require directory state
    follow_job
    ;;
  status)
    require state
    show_status
    ;;
  stop)
    require state
    stop_job
    ;;
esac
