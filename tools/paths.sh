# shellcheck shell=bash disable=SC2154
# Sourced by serve.sh: folders of any name reach Triton and Docker unharmed.

# Succeeds for a path that shells without quotes and programs that know ASCII alone leave as it is.
is_plain() { local LC_ALL=C; [[ $1 =~ ^[A-Za-z0-9_./@%+=,-]+$ ]]; }

# plain SETTING
# Triton's Python backend passes paths to a shell unquoted and takes them for ASCII. A path that would not survive that
# is replaced by one that does: an open file descriptor of this process, which becomes the server or its supervisor.
plain() {
  if is_plain "${!1}"; then return; fi
  local folder
  exec {folder}<"${!1}"
  [[ /proc/$$/fd/$folder -ef ${!1} ]] ||
    refuse "$1: expected a path of ASCII letters, digits and ._-+=@%,/ because there is no /proc here; got '${!1}'." \
      "Move the folder, or set $1 to a link to it that has such a path."
  printf '%s\n' "$1=/proc/$$/fd/$folder stands for '${!1}', which Triton cannot take as it is." >&2
  printf -v "$1" %s "/proc/$$/fd/$folder"
}

# bind_mount SOURCE TARGET
# Adds to `mounts` what makes Docker mount a file or folder read-only, once. The option's value is a line of CSV.
bind_mount() {
  local option=type=bind field
  for field in "source=$1" "target=$2"; do
    if [[ $field == *[\",$'\n']* ]]; then field="\"${field//\"/\"\"}\""; fi
    option+=,$field
  done
  if [[ " ${mounts[*]} " != *" $option,readonly "* ]]; then mounts+=(--mount "$option,readonly"); fi
}
