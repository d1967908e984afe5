# shellcheck shell=bash
# Sourced by run.sh, test.sh and cluster.sh: finds a Python and keeps the checkout's .venv current.
#
#   JEXIT_PYTHON   the interpreter to build .venv with; one of another version makes it anew
#                  (default: what .venv has, else the first of python3.13, python3.12, python3.11,
#                  python3 that is 3.11 to 3.13 and can make environments)
#   JEXIT_VENV     another name than .venv, such as .venv-3.11, for another environment beside it
#   JEXIT_EXTRAS   extras of pyproject.toml to install, comma-separated, in place of the ones chosen
#                  for the accelerator found here; empty for none
#   JEXIT_AOT      0 has test.sh leave out the compilers for absent accelerators
#
# .venv/.jexit-stamp says what was installed: a hash of pyproject.toml, the checkout's place and the
# extras. It is written last, so an environment without it is unfinished. While it matches, nothing
# is installed and no network is needed.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/${JEXIT_VENV:-.venv}
stamp=$venv/.jexit-stamp
aot=$venv/aot
installing=$venv/.jexit-installing # left behind by an install that was killed

say() { printf 'jexit: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}

# What is no environment of this checkout is never installed into, nor removed.
[[ ${venv#"$root/"} =~ ^\.venv[A-Za-z0-9._-]*$ ]] ||
  die "JEXIT_VENV=$JEXIT_VENV is no name for an environment in $root; give one like .venv-3.11."

supported() { # supported PYTHON: it runs and is a version that jexit supports
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
  local candidate found=""
  for candidate in ${JEXIT_PYTHON:+"$JEXIT_PYTHON"} python3.13 python3.12 python3.11 python3; do
    # The name may be a version manager's stub or too old a Python: only running it tells.
    if supported "$candidate"; then
      # Debian ships Python without ensurepip until python3-venv is installed.
      if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        printf '%s\n' "$candidate"
        return
      fi
      found=$candidate
    fi
    [[ $candidate != "${JEXIT_PYTHON:-}" ]] ||
      die "JEXIT_PYTHON=$candidate is not a Python 3.11 to 3.13 that can make environments (with" \
        "the venv and ensurepip modules); set it to one that is, or unset it."
  done
  [[ -z $found ]] ||
    die "$found cannot make environments because its ensurepip module is missing; install it" \
      "(Debian and Ubuntu: apt-get install python3-venv) and run this again."
  die "jexit needs Python 3.11, 3.12 or 3.13, and none was found as python3.13, python3.12," \
    "python3.11 or python3; install one, or set JEXIT_PYTHON to its path."
}

version() { # version PYTHON: such as 3.13
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

other_python() { # JEXIT_PYTHON asks for another version than .venv has
  [[ -n ${JEXIT_PYTHON:-} && $(version "$JEXIT_PYTHON") != "$(version "$venv/bin/python")" ]]
}

has_tpu() {
  local device
  # Only TPUs are accelN right under /dev; other vendors' devices lie in /dev/accel/.
  compgen -G '/dev/accel[0-9]*' >/dev/null && return 0
  compgen -G '/dev/vfio/[0-9]*' >/dev/null || return 1
  [[ -n ${TPU_NAME:-}${TPU_WORKER_ID:-}${TPU_ACCELERATOR_TYPE:-} ]] && return 0
  for device in /sys/bus/pci/devices/*; do
    [[ -r $device/vendor && $(<"$device/vendor") == 0x1ae0 ]] || continue
    case $(<"$device/device") in # v2/v3, v4, v5p, v5e, v6e, 7x; Google's network cards are others
      0x0027 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) return 0 ;;
    esac
  done
  return 1
}

accelerator_extras() { # what the accelerator of this machine needs: cuda, cuda12, tpu or nothing
  local driver
  if [[ -n ${JEXIT_EXTRAS+set} ]]; then
    printf '%s\n' "$JEXIT_EXTRAS"
  elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
    if [[ ${driver%%.*} =~ ^[0-9]+$ ]] && ((${driver%%.*} < 580)); then
      printf 'cuda12\n' # CUDA 13 needs driver 580
    else
      printf 'cuda\n'
    fi
  elif has_tpu; then
    printf 'tpu\n'
  fi
}

merge_extras() { # merge_extras A,B C: sorted, each once, comma-separated
  printf '%s\n' "$@" | tr -s ', ' '\n' | sed '/^$/d' | LC_ALL=C sort -u | paste -sd, -
}

pyproject_hash() {
  if command -v sha256sum >/dev/null 2>&1; then
    sha256sum <"$root/pyproject.toml"
  else
    cksum <"$root/pyproject.toml"
  fi | tr -d ' -'
}

stamp_value() { # stamp_value KEY: what the stamp says, nothing without a stamp
  [[ -r $stamp ]] && sed -n "s|^$1=||p" "$stamp"
  return 0
}

up_to_date() { # up_to_date EXTRAS: .venv holds at least these for this pyproject.toml, here
  local have
  have=$(stamp_value extras)
  [[ -x $venv/bin/python && -r $stamp && $(stamp_value pyproject) == "$(pyproject_hash)" &&
    $(stamp_value root) == "$root" && $(merge_extras "$have" "$1") == "$have" ]] && ! other_python
}

install_env() { # install_env EXTRAS
  local extras python updating="" spec=$root why=""
  # What an earlier run asked for stays: run.sh after test.sh must not lose the tests' packages.
  extras=$(merge_extras "$(stamp_value extras)" "$1")
  if [[ -e $installing ]]; then
    why="an earlier install was interrupted; starting ${venv##*/} afresh."
  elif [[ -e $venv || -L $venv ]]; then
    if ! { supported "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
      why="the environment in ${venv##*/} does not run; making a new one."
    elif other_python; then
      why="${venv##*/} has Python $(version "$venv/bin/python"); making it anew with $JEXIT_PYTHON."
    fi
  fi
  if [[ -n $why || ! -e $venv ]]; then
    python=$(find_python) || exit 1
    [[ -z $why ]] || say "$why"
    rm -rf "$venv"
    say "making ${venv##*/} with $("$python" -V 2>&1)."
    mkdir -p "$venv" && : >"$installing"
    "$python" -m venv "$venv" ||
      die "$python could not make an environment in $venv; the reason is above."
  elif [[ -e $stamp ]]; then
    updating=yes
  fi
  [[ -z $extras ]] || spec="${root}[$extras]"
  say "installing jexit${extras:+ with $extras} into ${venv##*/}; the first time takes a few minutes."
  : >"$installing"
  rm -f "$stamp"
  if ! "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
    --editable "$spec" >&2; then
    # pip looks everything up before it changes anything, so an environment that worked still does.
    [[ -z $updating ]] || rm -f "$installing"
    die "the install failed for the reason above; put that right and run the same command again."
  fi
  printf 'pyproject=%s\nroot=%s\nextras=%s\n' "$(pyproject_hash)" "$root" "$extras" >"$stamp.new"
  mv -f "$stamp.new" "$stamp"
  rm -f "$installing"
}

ensure_env() { # ensure_env EXTRAS: returns with $venv/bin/python ready
  local extras
  extras=$(merge_extras "$1")
  up_to_date "$extras" && return
  if command -v flock >/dev/null 2>&1; then
    exec 9>"$venv.lock" || die "cannot write to $root; make the checkout writable."
    if ! flock -n 9; then
      say "another install into ${venv##*/} is running; waiting for it."
      flock 9
    fi
  fi
  # Inside the lock: the one that held it before may have done the work.
  if ! up_to_date "$extras"; then install_env "$extras"; fi
  exec 9>&-
}

aot_requirements() { # aot_requirements tpu|cuda: what compiles for it, as the installed JAX needs it
  "$venv/bin/python" - "$1" <<'PY'
import importlib.metadata
import sys

version = importlib.metadata.version("jax")
extras = importlib.metadata.requires("jax")
libtpu = next(line.partition(";")[0] for line in extras if line.startswith("libtpu"))
cuda = f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version}"
print({"tpu": libtpu.strip(), "cuda": cuda}[sys.argv[1]])
PY
}

ensure_aot() { # ensure_aot tpu|cuda: returns with its compiler in $aot/$1, or 1 where that fails
  local wanted folder=$aot/$1
  wanted=$(aot_requirements "$1") || return 1
  [[ ! -r $folder/.stamp || $(<"$folder/.stamp") != "$wanted" ]] || return 0
  say "installing a compiler for absent accelerators into ${folder#"$root/"}."
  rm -rf "$folder"
  # Apart from the other packages, among which JAX would find it and look for its hardware.
  # shellcheck disable=SC2086 # several requirements
  if ! "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check --no-deps \
    --target "$folder" $wanted >&2; then
    rm -rf "$folder"
    return 1
  fi
  printf '%s\n' "$wanted" >"$folder/.stamp"
}

compile_for() { # compile_for TOPOLOGY: sets up its compiler and shows it to the Python that is started
  export JAX_PLATFORMS=cpu
  case $1 in
    v[0-9]*)
      [[ -z ${TPU_LIBRARY_PATH:-} ]] || return 0
      ensure_aot tpu || die "the compiler for $1 could not be installed for the reason above."
      export TPU_LIBRARY_PATH=$aot/tpu/libtpu/libtpu.so
      ;;
    h[0-9]*)
      [[ ,$(stamp_value extras) != *,cuda* ]] || return 0 # it is among the packages
      ensure_aot cuda || die "the compiler for $1 could not be installed for the reason above."
      export PYTHONPATH=$aot/cuda${PYTHONPATH:+:$PYTHONPATH}
      ;;
  esac
}
