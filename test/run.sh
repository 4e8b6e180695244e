#!/usr/bin/env bash
# Installs what the tests need and runs every check. Other arguments go to pytest, and then the client's tests are left out:
#   test/run.sh               everything, within 20 minutes on 2 cores
#   test/run.sh --unit        all that needs no server, within a minute
#   test/run.sh -k serve
set -euo pipefail

repo="$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")"

VENV=${VENV:-$repo/.venv}                       # the one serve.sh uses
CLIENT_VENV=${CLIENT_VENV:-$repo/.venv-client}  # the client's: it needs nothing of the server's, and numpy 2

chosen=()
if [[ ${1:-} == --unit ]]; then
  shift
  chosen=(-m "not server and not slow")
fi

source "$repo/tools/prepare_venv.sh"
prepare_venv "$VENV" "$repo/model_repository/nv-embed-v2/requirements.txt" "$repo/tools/requirements.txt" \
  "$repo/model_repository/nv-embed-v2/requirements-sentence-transformers.txt" \
  "$repo/test/requirement.txt" "$repo/test/requirement-dev.txt"
VENV="$(absolute "$VENV")"
export VENV  # the tests start serve.sh, which must find the same one

cd -- "$repo"
if [[ -z ${chosen[*]-} ]]; then PYTHON="$VENV/bin/python" test/kubernetes_tools.sh; fi
if (($# > 0)); then exec "$VENV/bin/python" -m pytest ${chosen[@]+"${chosen[@]}"} "$@"; fi

prepare_venv "$CLIENT_VENV" "$repo/test/client/requirement.txt"
CLIENT_VENV="$(absolute "$CLIENT_VENV")"

check_server() {
  "$VENV/bin/ruff" check .
  "$VENV/bin/ruff" format --check .
  "$VENV/bin/mypy"
  "$VENV/bin/python" -m pytest ${chosen[@]+"${chosen[@]}"}
}

check_client() {
  (cd client && "$CLIENT_VENV/bin/mypy")
  "$CLIENT_VENV/bin/python" -m pytest --config-file test/client/pytest.ini ${chosen[@]+"${chosen[@]}"} test/client
}

# Each of these keeps about one core busy.
said="$(mktemp)"
check_client >"$said" 2>&1 &
client=$!
trap 'kill "$client" 2>/dev/null || true; cat -- "$said"; rm -- "$said"' EXIT
check_server
wait "$client"
