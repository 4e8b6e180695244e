# shellcheck shell=bash
# Sourced by serve.sh and test/run.sh: both use one environment, and neither undoes the other's.

tools="${BASH_SOURCE[0]%/*}"
TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

# Without links: what Docker mounts, and one spelling of an environment for all.
absolute() { (CDPATH='' cd -- "$1" && pwd -P); }

has_gpu() { [[ -e /dev/nvidia0 ]] || nvidia-smi -L >/dev/null 2>&1; }

# choose_python COMMAND...
# Prints $PYTHON if set, else the first Python on PATH, that can run the given command of its own.
choose_python() {
  local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11 python3.10)
  if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    if "$candidate" "$@" >/dev/null 2>&1; then
      command -v -- "$candidate"
      return
    fi
  done
  if ! command -v -- "${candidates[0]}" >/dev/null; then
    echo "Expected Python 3.10, 3.11 or 3.12, found no '${candidates[0]}': install one, or set PYTHON to its path." >&2
    return 2
  fi
  "${candidates[0]}" "$@" # fails again, and says why
}

# prepare_venv VENV REQUIREMENTS...
# Creates VENV where there is none and installs the requirement files that are not installed as they are now.
# Every user can then use VENV. The body is a subshell, so that its lock ends with it.
prepare_venv() (
  set -euo pipefail
  umask 022 # who makes an environment is not always who serves from it
  venv=$1
  if [[ $venv != /* ]]; then venv="$PWD/$venv"; fi
  shift
  # An activated venv is first on PATH, and could not make itself anew.
  PATH=":$PATH:" PATH=${PATH//":$venv/bin:"/:}
  PATH=${PATH#:} PATH=${PATH%:}

  elsewhere='set VENV (of the gateway: GATEWAY_VENV) to another folder'
  if [[ $venv == *:* ]]; then
    echo "$venv: expected a path without a colon, which PATH cannot hold: $elsewhere." >&2
    exit 2
  fi
  # What is installed needs the Python that Triton's wheel needs, or any that is recent enough.
  requires_python=(-c 'import sys
if sys.version_info < (3, 10): sys.exit("Expected Python 3.10 or later, found " + sys.version.split()[0])
import ensurepip')
  has_triton=no
  if grep -q '^nvidia-pytriton' -- "$@"; then
    has_triton=yes
    requires_python=("$tools/pip_triton.py" --check-only)
  fi

  needs_write() {
    if [[ -w $venv ]]; then return; fi
    local found='one that is out of date'
    if [[ -L $venv/bin/python && -z $version ]]; then
      found="one whose Python, $(readlink -f -- "$venv/bin/python"), this user cannot run"
    fi
    echo "$venv: expected an environment ready for use or a folder that this user can write to, found $found:" \
      "let its owner start this once, with a PYTHON that everybody can run, or $elsewhere." >&2
    exit 2
  }

  # The lock is on the folder itself, which is never replaced: no lock file to leave behind.
  if ! mkdir -p -- "$venv"; then
    echo "$venv: expected a folder that this user can make: $elsewhere." >&2
    exit 2
  fi
  exec 9<"$venv"
  if command -v flock >/dev/null && ! flock --nonblock 9; then
    echo "Waiting for another start that is preparing $venv" >&2
    flock 9
  fi

  # made-for names the Python and the torch build of a venv that was created here. One that somebody else made
  # has none: it is installed into, but never cleared.
  python_version() { "$venv/bin/python" -c 'import platform; print(platform.python_version())'; }
  made_for="$venv/made-for"
  build=cpu
  if has_gpu; then build=cuda; fi
  version="$(python_version 2>/dev/null || true)"
  if [[ -e $made_for || -z $(ls -A -- "$venv") ]]; then
    # The CUDA build also runs without a GPU, so losing sight of one does not cost a download.
    if [[ -z $version || ! $(cat -- "$made_for") =~ ^"$version "(cuda|"$build")$ ]]; then
      needs_write
      python="$(choose_python "${requires_python[@]}")"
      echo unfinished >"$made_for"
      (cd -- "$venv" && find . -mindepth 1 ! -path ./made-for -delete)
      "$python" -m venv -- "$venv"
      echo "$(python_version) $build" >"$made_for"
    fi
  elif [[ -z $version ]]; then
    echo "VENV=$venv is neither empty nor a virtual environment that works: $elsewhere." >&2
    exit 2
  fi

  # A stamp holds the text of a file that was installed. Stamps go before pip starts and come back after it
  # succeeded, so that an interrupted install is repeated.
  stamp_of() { local folder=${1%/*}; echo "$venv/installed-${folder##*/}-${1##*/}"; }
  options=()
  changed=no
  for file in "$@"; do
    options+=(--requirement "$file")
    if ! cmp -s -- "$file" "$(stamp_of "$file")"; then changed=yes; fi
  done
  if [[ $changed == no ]]; then exit; fi
  needs_write
  for file in "$@"; do rm -f -- "$(stamp_of "$file")"; done

  # PyPI's torch for Linux brings gigabytes of CUDA. Where the CPU index answers, pip prefers its 2.x.y+cpu.
  if [[ $build == cpu ]] && grep -q '^torch' -- "$@" && timeout 10 "$venv/bin/python" -c \
    'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5)' "$TORCH_CPU_INDEX/torch/" 2>/dev/null
  then
    options+=(--extra-index-url "$TORCH_CPU_INDEX")
  fi
  if [[ ! -t 2 ]]; then options+=(--quiet); fi  # progress bars are for people
  echo "Installing into $venv, once: $(sed -n 's/^\([a-z][^ #;]*\).*/\1/p' "$@" | paste -sd ' ' -)" >&2
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "${options[@]}" >&2
  if [[ $has_triton == yes ]]; then "$venv/bin/python" "$tools/pip_triton.py" --lay-out; fi
  for file in "$@"; do cat -- "$file" >"$(stamp_of "$file")"; done # cp would keep a mode that shuts others out
)
