# shellcheck shell=bash disable=SC2154,SC2034
# Sourced by serve.sh: which models it serves, and what they need.

# name_of FOLDER
# Prints how its model would be called: as the folder, or as the repository of a snapshot in Hugging Face's cache.
name_of() {
  local folder
  folder="$(CDPATH='' cd -- "$1" && pwd)"
  if [[ $folder == */models--*/snapshots/* ]]; then folder=${folder%/snapshots/*} folder=${folder##*--}; fi
  printf '%s\n' "${folder##*/}"
}

# look_at_models NAME
# Looks at MODEL_PATH, MODEL_REPOSITORY and DEVICE, and sets
#   NV_EMBED_MODEL_NAME  the model at MODEL_PATH, which the variables NV_EMBED_<PARAMETER> concern
#   MODEL_REPOSITORY     a folder to be served as it is ...
#   models               ... or, if this is not empty, what it has under this path; links there lead ...
#   shared               ... to what MODEL_REPOSITORY was before
#   added                names of the models that were added
#   checkpoints          ... their folders
#   added_devices        ... and devices
#   devices              of all models
#   kinds                of all checkpoints; none if this project's own networks suffice without a look
# NAME: of the model at MODEL_PATH if it is not NV-Embed-v2.
look_at_models() {
  local python found folder is_alone=yes lock
  NV_EMBED_MODEL_NAME=nv-embed-v2 shared=$MODEL_REPOSITORY models='' added=() checkpoints=() added_devices=() devices=$DEVICE kinds=()
  for folder in "$MODEL_REPOSITORY"/*/; do
    if [[ $folder != */nv-embed-v2/ && -d $folder ]]; then is_alone=no; fi
  done
  # Nothing to look at, so this needs no Python.
  if [[ $is_alone == yes ]] && grep -qs '"model_type": *"nvembed"' "$MODEL_PATH/config.json"; then return; fi

  python="$(choose_python -c 'import sys
if sys.version_info < (3, 10): sys.exit("Expected Python 3.10 or later, found " + sys.version.split()[0])')" || exit 2
  mapfile -d '' -t found < <("$python" "$repo/tools/served_models.py" "$MODEL_REPOSITORY" "$MODEL_PATH" "$1")
  wait $! || exit 2
  NV_EMBED_MODEL_NAME=${found[0]} MODEL_REPOSITORY=${found[1]} models=${found[2]} kinds=("${found[3]}")
  found=("${found[@]:4}")
  # Held as long as this process, which becomes the server or its supervisor, so that no other start removes it.
  if [[ -n $models ]] && command -v flock >/dev/null; then
    exec {lock}<"$MODEL_REPOSITORY"
    flock --shared "$lock"
  fi
  while ((${#found[@]})); do
    added+=("${found[0]}") kinds+=("${found[1]}") devices+=,${found[2]} checkpoints+=("${found[3]}")
    added_devices+=("${found[2]}")
    found=("${found[@]:4}")
  done
}

# The packages that some kinds need beside requirements.txt, as a list of requirement files.
requirements_of_kinds() {
  local kind file
  requirements=()
  for kind in $(printf '%s\n' ${kinds[@]+"${kinds[@]}"} | sort -u); do
    file="$repo/model_repository/nv-embed-v2/requirements-${kind//_/-}.txt"
    if [[ -e $file ]]; then requirements+=("$file"); fi
  done
}

# mount_checkpoint FOLDER [TARGET]
# Adds to `mounts` what makes Docker mount it there, or where it is here. Sets `mounted`, its path in the container.
mount_checkpoint() {
  local folder=$1
  # A snapshot in Hugging Face's cache is links to ../../blobs: mount both.
  if [[ $1 == */snapshots/* ]] && is_plain "${1##*/snapshots/}"; then folder=${1%/snapshots/*}; fi
  bind_mount "$folder" "${2:-$folder}"
  mounted=${2:-$folder}${1#"$folder"}
}
