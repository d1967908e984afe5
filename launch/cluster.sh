# shellcheck shell=bash
# Sourced by tpu_vm.sh, gke.sh, slurm.sh and the scripts that these start elsewhere.
#
# Reads their options, says in a sentence what is wrong with them before anything is created, and
# runs commands, or with --dry-run only prints them in a form that a shell takes back.
#
# shellcheck disable=SC2034,SC2154 # it and the scripts that source it set each other's variables

# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

RESTART=42 # exit code of a worker whose run goes on when the same command is started again
MISUSE=2   # exit code of a command line that cannot be right
COUNT='^(0|[1-9][0-9]{0,5})$'
BUCKET='^gs://[a-z0-9][a-z0-9._-]+(/[^/ ]+)*/?$'

dry_run=""
action=""
arguments=()      # jexit's, from after --
environment=()    # every --env
extra_options=()  # every --option, for the cluster's own command

misuse() {
  say "$*"
  exit "$MISUSE"
}

quoted() { # quoted ARG ...: one line that a shell reads as these arguments
  local argument line="" quote="'\\''"
  for argument in "$@"; do
    if [[ ! $argument =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      argument="'${argument//\'/$quote}'"
    fi
    line+="${line:+ }$argument"
  done
  printf '%s\n' "$line"
}

run_cmd() { # run_cmd COMMAND ARG ...: says what it runs, and with --dry-run leaves it at that
  if [[ -n $dry_run ]]; then
    quoted "$@"
  else
    printf '+ %s\n' "$(quoted "$@")" >&2
    "$@"
  fi
}

note() { # note TEXT: a comment among the printed commands, a message otherwise
  if [[ -n $dry_run ]]; then printf '# %s\n' "$*"; else say "$*"; fi
}

among() { # among WORD WORDS: it is one of them, which are separated by spaces
  [[ -n $1 && $1 != *" "* && " $2 " == *" $1 "* ]]
}

usage() { # prints the comment at the head of the running script
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
}

# parse_options ACTIONS OPTIONS SWITCHES ARG ...: sets opt_NAME for every --NAME=VALUE or --NAME
# VALUE (dashes become underscores) and switch, $action, and the lists above. Names are separated
# by spaces; the first action is the default.
parse_options() {
  local actions=$1 options=$2 switches=$3 name value
  shift 3
  action=${actions%% *}
  for name in $options $switches; do printf -v "opt_${name//-/_}" '%s' ""; done
  if (($#)) && [[ $1 != -* ]]; then
    among "$1" "$actions" ||
      misuse "there is no action '$1'; choose one of ${actions// /, }, or write -- before jexit's" \
        "own arguments."
    action=$1
    shift
  fi
  while (($#)); do
    if [[ $1 == -- ]]; then
      shift
      arguments=("$@")
      return
    fi
    if [[ $1 == --help || $1 == -h ]]; then
      usage
      exit 0
    fi
    name=${1%%=*}
    name=${name#--}
    if [[ $1 == --* && $1 != *=* ]] && among "$name" "$switches"; then
      printf -v "opt_${name//-/_}" yes
    elif [[ $1 == --* ]] && among "$name" "$options env option"; then
      if [[ $1 == *=* ]]; then
        value=${1#*=}
      elif (($# > 1)) && [[ $2 != --* ]]; then
        value=$2
        shift
      else
        value=""
      fi
      [[ -n $value ]] || misuse "--$name has no value; write --$name=VALUE."
      set_option "$name" "$value"
    else
      misuse "unknown option '$1'; the options are $(listed "$options env option $switches"), and" \
        "jexit's own arguments follow after --."
    fi
    shift
  done
}

set_option() { # set_option NAME VALUE
  case $1 in
    env)
      [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
        misuse "--env is '$2'; it sets a variable on every worker and looks like NAME=VALUE."
      environment+=("$2")
      ;;
    option) extra_options+=("$2") ;;
    *) printf -v "opt_${1//-/_}" '%s' "$2" ;;
  esac
}

listed() { # listed NAMES: --a, --b, --c
  local name line=""
  for name in $1; do line+="${line:+, }--$name"; done
  printf '%s\n' "$line"
}

require() { # require NAME ...: these options have values
  local name variable
  for name in "$@"; do
    variable=opt_${name//-/_}
    [[ -n ${!variable} ]] || misuse "--$name is missing; give --$name=VALUE (see --help)."
  done
}

check_name() { # check_name VALUE: what clouds take as the name of a machine or workload
  [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    misuse "--name is '$1'; use up to 40 lower-case letters, digits and dashes, a letter first."
}

check_count() { # check_count OPTION VALUE
  [[ $2 =~ $COUNT ]] || misuse "--$1 is '$2'; it is a whole number."
}

check_directory() { # check_directory OPTION VALUE: an absolute path, nothing that a shell rewrites
  [[ $2 =~ ^(/[A-Za-z0-9_.@%+=:,-]+)+/?$ && $2/ != */../* ]] ||
    misuse "--$1 is '$2'; it is an absolute path of letters, digits and . _ - @ % + = : , only."
}

check_tools() { # check_tools COMMAND ...: they are installed; printing needs none
  local tool
  [[ -z $dry_run ]] || return 0
  for tool in "$@"; do
    command -v "$tool" >/dev/null 2>&1 ||
      misuse "$tool is not on the PATH; install it, or see with --dry-run what would be run."
  done
}

jexit_flag() { # jexit_flag NAME: the last value of --NAME=VALUE or --NAME VALUE among jexit's
  local i value=""
  for ((i = 0; i < ${#arguments[@]}; i++)); do
    case ${arguments[i]} in
      --"$1"=* | -"$1"=*) value=${arguments[i]#*=} ;;
      --"$1" | -"$1") value=${arguments[i + 1]-} ;;
    esac
  done
  printf '%s\n' "$value"
}

# check_job SHARED: jexit's arguments name a config and keep the run's files beneath the directory
# that every host sees. Sets $run_directory, relative to SHARED.
check_job() {
  local shared=${1%/} config
  config=$(jexit_flag config)
  [[ -n $config ]] ||
    misuse "there is no config for jexit; end the command with -- --config=configs/rl.py:PRESET."
  # What lies elsewhere on this machine does not come along.
  [[ ${config%%:*} == /* || -e $root/${config%%:*} ]] ||
    misuse "the config '${config%%:*}' is not in the checkout; give one such as configs/rl.py."
  run_directory=$(jexit_flag workdir)
  if [[ -z $run_directory ]]; then # as jexit itself chooses
    run_directory=$(basename "${config%%:*}" .py)
    [[ $config == *:* ]] && run_directory+=-${config#*:} || run_directory+=-tiny
    run_directory=runs/$run_directory
  fi
  case $run_directory/ in
    ../* | */../*) ;;
    /*)
      case $run_directory in
        "$shared"/?*)
          run_directory=${run_directory#"$shared"/}
          return
          ;;
      esac
      ;;
    *) return ;;
  esac
  misuse "--workdir is '$run_directory', outside of $shared; every host writes into the same" \
    "checkpoints, so give a relative path or one beneath $shared."
}

# read_accelerator TYPE: sets $accelerator (its name at Cloud TPU), $chips and $runtime (the image
# that Cloud TPU recommends for JAX). v4 and v5p count cores, two a chip.
read_accelerator() {
  local size=${1##*-} cores=1 sizes="1 4 8 16 32 64 128 256"
  accelerator=$1
  case $1 in
    v4-*) runtime=tpu-ubuntu2204-base cores=2 sizes="8 16 32 64 128 256 512 1024 2048 4096" ;;
    v5litepod-* | v5e-*) runtime=v2-alpha-tpuv5-lite accelerator=v5litepod-$size ;;
    v5p-*) runtime=v2-alpha-tpuv5 cores=2 sizes="8 16 32 64 128 256 512 1024 2048 4096" ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) sizes="" ;;
  esac
  { among "$size" "$sizes" && [[ $1 == *-"$size" ]]; } ||
    misuse "--type is '$1'; give v5litepod-N or v6e-N (N chips: 1, 4, 8, … 256), or v4-N or" \
      "v5p-N (N cores, two a chip: 8, 16, … 4096)."
  chips=$((size / cores))
}

check_mesh() { # check_mesh CHIPS WHAT: the mesh takes all of them
  local axis size product=1 named=""
  for axis in data fsdp tensor; do
    size=$(jexit_flag "config.mesh.$axis")
    [[ $size =~ $COUNT ]] || size=1 # as jexit has it, or says what is wrong with it
    named+="${named:+ × }$axis $size"
    product=$((product * size))
  done
  [[ $product == "$1" ]] ||
    misuse "the mesh is $named = $product devices and $2 has $1; make the product $1, such as" \
      "--config.mesh.fsdp=$1."
}

worker_options() { # sets $options: what worker.sh run is told, whichever cluster it runs on
  local pair
  options=(--directory="$1")
  for pair in ${environment[@]+"${environment[@]}"}; do options+=(--env="$pair"); done
}

scratch_directory() { # for the archive and the like of the job --name, nobody else's
  # Without HOME the shell takes ~ from the system's list of users.
  local home=${HOME:-$(unset HOME && echo ~)}
  printf '%s/jexit/%s\n' "${XDG_CACHE_HOME:-$home/.cache}" "$opt_name"
}

slurm_step() { # slurm_step NODES COORDINATOR WORKER_ARG ...: sets $step_command, run by slurm_job.sh
  local nodes=$1 joining=()
  ((nodes == 1)) || joining=(--coordinator="$2")
  shift 2
  # A process that ends must not take the others along: they are saving.
  step_command=(srun --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0
    bash "$root/launch/worker.sh" run ${joining[@]+"${joining[@]}"} "$@")
}

fetch_bucket() { # copies everything of the run but its checkpoints from $opt_shared
  local target=$opt_results/$run_directory
  run_cmd mkdir -p "$target"
  run_cmd gcloud storage rsync "${opt_shared%/}/$run_directory" "$target" --recursive \
    '--exclude=(.*/)?checkpoints/.*' ${opt_project:+--project="$opt_project"}
}

verdict() { # verdict CODE ...: one exit code for the codes of all hosts
  # A host that failed of itself explains those that it left alone; those would only try again.
  local code result=0
  for code in "$@"; do
    case $code in
      0) ;;
      "$RESTART") ((result)) || result=$RESTART ;;
      *) { ((result)) && [[ $result != "$RESTART" ]]; } || result=$code ;;
    esac
  done
  printf '%s\n' "$result"
}
