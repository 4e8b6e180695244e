#!/usr/bin/env bash
# Serves embedding models through NVIDIA Triton in the foreground; Ctrl-C or SIGTERM ends it, with exit code 0 once it
# serves. tools/add_model adds models beside the one at MODEL_PATH, each with settings of its own.
# Arguments go to tritonserver after the ones given here, so they win:  ./serve.sh --log-verbose=1
# For the model at MODEL_PATH every parameter of config.pbtxt can be set as NV_EMBED_<PARAMETER>:  NV_EMBED_MAX_BATCH_TOKENS=8192 ./serve.sh
set -euo pipefail

repo="$(readlink -f -- "${BASH_SOURCE[0]}")"
repo=${repo%/*}  # dirname in $(...) would lose a line's end in a folder's name

if [[ ${1:-} == -h || ${1:-} == --help ]]; then  # what stands above and right below, each variable with its default
  sed -n -e '2,/^set -e/s/^# //p' -e '/^MODEL_PATH=\${/,/^SHM_BYTES=/{s/\${[A-Z_]*:-//g;s/}}*/ /;p;}' "${BASH_SOURCE[0]}"
  printf 'repo=%s\n' "$repo"
  exit
fi

MODEL_PATH=${MODEL_PATH:-${NV_EMBED_MODEL_PATH:-}}  # folder of the checkpoint; none: the small one of this repository
DEVICE=${DEVICE:-${NV_EMBED_DEVICE:-}}              # none: cuda:0, but cpu for the small checkpoint
HTTP_PORT=${HTTP_PORT:-8000}
GRPC_PORT=${GRPC_PORT:-8001}
METRICS_PORT=${METRICS_PORT:-8002}
ADDRESS=${ADDRESS:-}                                # IPv4 to listen on; none: 127.0.0.1 with RUNTIME=pip, else 0.0.0.0
METRICS_ADDRESS=${METRICS_ADDRESS:-}                # none: the same
RUNTIME=${RUNTIME:-auto}                            # auto, native, docker or pip
RESTART=${RESTART:-no}                              # always: start server or gateway again when it ends unasked
GATEWAY_PORT=${GATEWAY_PORT:-}                      # port of OpenAI's embeddings API; none: only Triton's
GATEWAY_HOST=${GATEWAY_HOST:-127.0.0.1}             # IPv4 that the gateway listens on
GATEWAY_API_KEY=${GATEWAY_API_KEY:-}                # what its clients must send; none: anybody may ask
GATEWAY_ARGUMENTS=${GATEWAY_ARGUMENTS:-}            # more of nv-embed-gateway's arguments, quoted as in a shell
GATEWAY_VENV=${GATEWAY_VENV:-$repo/.venv-gateway}   # its environment, made on the first start
ADMIN_KEY=${ADMIN_KEY:-}                            # opens Triton's administrative protocols; none: they stay shut
MAX_CONNECTION_SECONDS=${MAX_CONNECTION_SECONDS:-60} # age at which gRPC clients connect anew, to find other servers
TRACE_URL=${TRACE_URL:-}                            # OpenTelemetry collector, http://HOST:4318/v1/traces; none: no traces
TRACE_RATE=${TRACE_RATE:-1000}                      # of so many requests one is traced, and each with a traceparent
TLS_CERT=${TLS_CERT:-}                              # gRPC over TLS: the server's certificate, ...
TLS_KEY=${TLS_KEY:-}                                # ... its key, and ...
TLS_CLIENT_CA=${TLS_CLIENT_CA:-}                    # ... who signs clients' certificates: then each must show one
VENV=${VENV:-$repo/.venv}                           # of RUNTIME=pip; made on the first start ...
PYTHON=${PYTHON:-}                                  # ... with this Python; none: python3, else 3.12, 3.11 or 3.10
IMAGE=${IMAGE:-}                                    # of RUNTIME=docker; none: built from the Dockerfile here
MODEL_REPOSITORY=${MODEL_REPOSITORY:-$repo/model_repository}
# Shared memory between Triton and the model grows as needed, up to what /dev/shm holds. A request of the largest
# size takes 64 MiB of text and 16,384 x 4096 x 4 bytes = 256 MiB of vectors: Docker's default of 64 MB is too small.
SHM_SIZE=${SHM_SIZE:-1g}                            # size of /dev/shm with RUNTIME=docker
SHM_BYTES=${SHM_BYTES:-33554432}                    # taken at the start; small enough for a /dev/shm of 64 MB

refuse() { printf 'serve.sh: %s\n' "$@" >&2; exit 2; }
# shellcheck source=tools/prepare_venv.sh
source "$repo/tools/prepare_venv.sh"
# shellcheck source=tools/gateway.sh
source "$repo/tools/gateway.sh"
# shellcheck source=tools/paths.sh
source "$repo/tools/paths.sh"
# shellcheck source=tools/models.sh
source "$repo/tools/models.sh"

real_model=yes
if [[ -z $MODEL_PATH ]]; then
  real_model=no
  MODEL_PATH="$repo/checkpoints/nv-embed-mini"
  DEVICE=${DEVICE:-cpu}
  printf '%s\n' "No MODEL_PATH: serving this repository's small checkpoint on $DEVICE, not NV-Embed-v2." \
    "The real model:  MODEL_PATH=/path/to/NV-Embed-v2 $0" >&2
fi
DEVICE=${DEVICE:-cuda:0}
[[ -d $MODEL_PATH ]] ||
  refuse "MODEL_PATH: expected the folder of a checkpoint, found no folder '$MODEL_PATH'. Correct the path."
[[ -d $MODEL_REPOSITORY ]] || refuse "MODEL_REPOSITORY: expected a folder, found no folder '$MODEL_REPOSITORY'."
name="$(name_of "$MODEL_PATH")"
for setting in MODEL_PATH MODEL_REPOSITORY; do
  path="$(absolute "${!setting}" && echo .)"  # else $(...) would lose a line's end in a folder's name
  printf -v "$setting" %s "${path%??}"
done
asked_name=${NV_EMBED_MODEL_NAME:-}
look_at_models "$name"
[[ -z $asked_name || $asked_name == "$NV_EMBED_MODEL_NAME" ]] ||
  refuse "NV_EMBED_MODEL_NAME: expected none, because serve.sh names the model, here '$NV_EMBED_MODEL_NAME'; found" \
    "'$asked_name'. Unset it. docs/operations.md says how a model gets its name."

for setting in MAX_CONNECTION_SECONDS TRACE_RATE; do
  [[ ${!setting} =~ ^[1-9][0-9]{0,5}$ ]] || refuse "$setting: expected a whole number from 1 to 999999, got '${!setting}'."
done
[[ -z $TRACE_URL || $TRACE_URL =~ ^https?://[!-~]+$ ]] ||
  refuse "TRACE_URL: expected http://HOST:PORT/v1/traces of an OpenTelemetry collector, got '$TRACE_URL'."
[[ $RESTART == no || $RESTART == always ]] || refuse "RESTART: expected no or always, got '$RESTART'."
if [[ $RUNTIME == auto ]]; then
  if command -v tritonserver >/dev/null; then
    RUNTIME=native
  elif [[ $real_model == no && -z ${added[*]} || $devices != *cuda* ]] || ! has_gpu; then
    RUNTIME=pip
  elif docker info >/dev/null 2>&1; then
    RUNTIME=docker
  else
    RUNTIME=pip
    echo "RUNTIME=pip, an older Triton: expected Docker for $devices, but 'docker info' fails." >&2
  fi
fi
case $RUNTIME in
  native) command -v tritonserver >/dev/null || refuse "RUNTIME=native: expected tritonserver on PATH, found none." ;;
  docker) command -v docker >/dev/null || refuse "RUNTIME=docker: expected docker on PATH, found none." ;;
  pip)
    ADDRESS=${ADDRESS:-127.0.0.1}
    for setting in ADDRESS METRICS_ADDRESS; do
      if [[ -n ${!setting} && ${!setting} != 127.* && ${!setting} != localhost ]]; then
        echo "$setting=${!setting}: the pip-installed Triton 24.10 has known holes (CVE-2025-23319); use" \
          "RUNTIME=docker for anything but a trusted network." >&2
      fi
    done
    if [[ $DEVICE == *cuda* ]] && ! has_gpu; then
      refuse "DEVICE=$DEVICE: expected an NVIDIA GPU, found none. DEVICE=cpu computes without one."
    fi
    for i in ${added[@]+"${!added[@]}"}; do
      if [[ ${added_devices[i]} == *cuda* ]] && ! has_gpu; then
        refuse "Model ${added[i]}, device ${added_devices[i]}: expected an NVIDIA GPU, found none." \
          "Set device to cpu in $shared/${added[i]}/config.pbtxt, or remove that folder."
      fi
    done
    ;;
  *) refuse "RUNTIME: expected auto, native, docker or pip, got '$RUNTIME'." ;;
esac
ADDRESS=${ADDRESS:-0.0.0.0}
METRICS_ADDRESS=${METRICS_ADDRESS:-$ADDRESS}
# In numbers: Docker publishes on no names, and Triton's HTTP understands none.
for setting in ADDRESS METRICS_ADDRESS GATEWAY_HOST; do
  if [[ ${!setting} == localhost ]]; then printf -v "$setting" 127.0.0.1; fi
  [[ ${!setting} =~ ^[0-9]{1,3}(\.[0-9]{1,3}){3}$ || ($RUNTIME$setting == docker*ADDRESS && ${!setting} == \[*:*\]) ]] ||
    refuse "$setting: expected an IPv4 address of this machine in numbers, or localhost; got '${!setting}'."
done
HTTP_ADDRESS=$ADDRESS
tls=() mounts=()
if [[ -n $TLS_CERT$TLS_KEY$TLS_CLIENT_CA ]]; then
  [[ -n $TLS_CERT && -n $TLS_KEY ]] || refuse "TLS: expected both TLS_CERT and TLS_KEY, did not get both."
  for setting in TLS_CERT TLS_KEY TLS_CLIENT_CA; do
    if [[ -z ${!setting} ]]; then continue; fi
    [[ -r ${!setting} ]] || refuse "$setting: expected a readable file, found none at '${!setting}'."
    if [[ ${!setting} != /* ]]; then printf -v "$setting" %s "$PWD/${!setting}"; fi
    file=${!setting}
    if [[ $RUNTIME == docker ]]; then
      bind_mount "$file" "/tls/$setting"
      file=/tls/$setting
    fi
    case $setting in
      TLS_CERT) tls+=(--grpc-use-ssl=true "--grpc-server-cert=$file") ;;
      TLS_KEY) tls+=("--grpc-server-key=$file") ;;
      TLS_CLIENT_CA) tls+=(--grpc-use-ssl-mutual=true "--grpc-root-cert=$file") ;;
    esac
  done
  HTTP_ADDRESS=127.0.0.1  # Triton has no TLS for HTTP, so it is for this machine only
fi

# Triton opens its ports only after the model is loaded, which is late to learn that one is taken.
is_taken() { (exec 3<>"/dev/tcp/${1/#0.0.0.0/127.0.0.1}/$2") 2>/dev/null; }
seen=' ' taken=()
for pair in "HTTP_PORT $HTTP_ADDRESS" "GRPC_PORT $ADDRESS" "METRICS_PORT $METRICS_ADDRESS" \
  ${GATEWAY_PORT:+"GATEWAY_PORT $GATEWAY_HOST"}; do
  read -r setting address <<<"$pair"
  port=${!setting}
  if [[ ! $port =~ ^[1-9][0-9]{0,4}$ ]] || ((port > 65535)); then
    refuse "$setting: expected a port number, got '$port'."
  fi
  [[ $seen != *" $port "* ]] || refuse "$setting: port $port is given twice. Set it to another one."
  seen+="$port "
  if is_taken "$address" "$port"; then taken+=("$pair"); fi
done
if ((${#taken[@]})); then
  lines=() others=''
  for pair in "${taken[@]}"; do
    read -r setting address <<<"$pair"
    lines+=("$setting: port ${!setting} is already in use.")
    other=${!setting}
    while ((other = other > 65525 ? 1024 : other + 10)); [[ $seen == *" $other "* ]] || is_taken "$address" "$other"; do
      :
    done
    seen+="$other "
    others+="$setting=$other "
  done
  refuse "${lines[@]}" "Stop what listens there, or choose free ports: $others$0"
fi

if [[ -n $GATEWAY_PORT ]]; then check_gateway; fi

export NV_EMBED_MODEL_NAME NV_EMBED_MODEL_PATH NV_EMBED_DEVICE=$DEVICE
export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-2}  # glibc's default doubles the server's memory

# shellcheck source=tools/triton_arguments.sh
source "$repo/tools/triton_arguments.sh"
settings=("${triton_arguments[@]}" ${tls[@]+"${tls[@]}"})
# Without these the log warns of a missing GPU that nobody asked for.
if [[ $devices != *cuda* ]]; then settings+=(--allow-gpu-metrics=false --pinned-memory-pool-byte-size=0); fi
addresses=("--http-address=$HTTP_ADDRESS" "--grpc-address=$ADDRESS" "--metrics-address=$METRICS_ADDRESS"
  "--http-port=$HTTP_PORT" "--grpc-port=$GRPC_PORT" "--metrics-port=$METRICS_PORT")

case $RUNTIME in
  native)
    plain MODEL_REPOSITORY
    plain MODEL_PATH
    NV_EMBED_MODEL_PATH=$MODEL_PATH
    command=(tritonserver "--model-repository=$MODEL_REPOSITORY$models" "${addresses[@]}" "${settings[@]}")
    ;;
  pip)
    requirements_of_kinds
    prepare_venv "$VENV" "$repo/model_repository/nv-embed-v2/requirements.txt" "$repo/tools/requirements.txt" \
      ${requirements[@]+"${requirements[@]}"}
    if [[ $VENV != /* ]]; then VENV="$PWD/$VENV"; fi
    plain VENV
    plain MODEL_REPOSITORY
    plain MODEL_PATH
    NV_EMBED_MODEL_PATH=$MODEL_PATH
    command=("$VENV/bin/python" "$repo/tools/pip_triton.py" "--model-repository=$MODEL_REPOSITORY$models"
      "${addresses[@]}" "${settings[@]}")
    ;;
  docker)
    init=--init  # as process 1 the server could not be killed from inside; the image built here has an init of its own
    if [[ -z $IMAGE ]]; then
      IMAGE=nv-embed-triton init=
      requirements_of_kinds
      docker build ${requirements[@]+--build-arg "EXTRA_REQUIREMENTS=${requirements[*]##*/}"} \
        --tag "$IMAGE" "$repo" >&2  # seconds when nothing changed
    fi
    inside=/model_repository
    if [[ -n $models ]]; then
      inside=/served$models
      bind_mount "$shared" /served/shared  # where links in it lead
    fi
    bind_mount "$MODEL_REPOSITORY$models" "$inside"
    mount_checkpoint "$MODEL_PATH" /models/NV-Embed-v2
    NV_EMBED_MODEL_PATH=$mounted
    for folder in ${checkpoints[@]+"${checkpoints[@]}"}; do mount_checkpoint "$folder"; done
    # Time to stop: 20 s for what is in work, Triton's 30 s at the most.
    command=(docker run --rm ${init:+"$init"} --stop-timeout 40 "--shm-size=$SHM_SIZE" --ulimit memlock=-1
      --publish "$HTTP_ADDRESS:$HTTP_PORT:8000" --publish "$ADDRESS:$GRPC_PORT:8001"
      --publish "$METRICS_ADDRESS:$METRICS_PORT:8002" "${mounts[@]}")
    if [[ $devices == *cuda* ]]; then command+=(--gpus all); fi
    for name in MALLOC_ARENA_MAX ${OMP_NUM_THREADS:+OMP_NUM_THREADS} ${CUDA_VISIBLE_DEVICES+CUDA_VISIBLE_DEVICES} \
      $(compgen -A export NV_EMBED_); do
      command+=(--env "$name")
    done
    command+=("$IMAGE" tritonserver "--model-repository=$inside" "${settings[@]}")
    ;;
esac

if [[ $RESTART == always ]]; then command=("$repo/tools/supervise.sh" "${command[@]}"); fi
command+=("$@")
if [[ -n $GATEWAY_PORT ]]; then add_gateway; fi
exec "${command[@]}"
