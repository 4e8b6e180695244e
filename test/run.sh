#!/usr/bin/env bash
# Installs what the tests need and runs every check. Other arguments go to pytest, and then the client's tests are left out:
#   test/run.sh               everything, within 20 minutes on 2 cores
#   test/run.sh --unit        all that needs no server, within a minute
#   test/run.sh -k serve
set -euo pipefail

repo="$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")"

VENV=${VENV:-$repo/.venv}                       # the one serve.sh uses
CLIENT_VENV=${CLIENT_VENV:-$repo/.venv-client}  # the client's: it needs nothing of the server's, and numpy 2

quick=(-m "not server")
if [[ ${1:-} == --unit ]]; then
  shift
  quick=(-m "not server and not slow")
  unit=yes
fi

source "$repo/tools/prepare_venv.sh"
if (($# == 0)); then # at the same time, because each takes minutes of one core
  prepare_venv "$CLIENT_VENV" "$repo/test/client/requirement.txt" &
  client_venv_ready=$!
  trap wait EXIT
fi
prepare_venv "$VENV" "$repo/model_repository/nv-embed-v2/requirements.txt" "$repo/tools/requirements.txt" \
  "$repo/model_repository/nv-embed-v2/requirements-sentence-transformers.txt" \
  "$repo/test/requirement.txt" "$repo/test/requirement-dev.txt"
VENV="$(absolute "$VENV")"
export VENV  # the tests start serve.sh, which must find the same one

cd -- "$repo"
if [[ -z ${unit:-} ]]; then PYTHON="$VENV/bin/python" test/kubernetes_tools.sh; fi
if (($# > 0)); then exec "$VENV/bin/python" -m pytest ${unit:+"${quick[@]}"} "$@"; fi

wait "$client_venv_ready"
CLIENT_VENV="$(absolute "$CLIENT_VENV")"

check_quickly() {
  "$VENV/bin/ruff" check .
  "$VENV/bin/ruff" format --check .
  "$VENV/bin/mypy"
  "$VENV/bin/python" -m pytest "${quick[@]}"
}

check_client() {
  (cd client && "$CLIENT_VENV/bin/mypy")
  "$CLIENT_VENV/bin/python" -m pytest --config-file test/client/pytest.ini ${unit:+"${quick[@]}"} test/client
}

check_quickly_and_client() {
  check_quickly
  check_client
}

check_with_servers() { "$VENV/bin/python" -m pytest -m server; }

# Two lanes, because each keeps about one core busy.
if [[ -n ${unit:-} ]]; then
  lanes=(check_quickly check_client)
else
  lanes=(check_with_servers check_quickly_and_client)
fi
said="$(mktemp)"
"${lanes[1]}" >"$said" 2>&1 &
second=$!
trap 'kill "$second" 2>/dev/null || true; cat -- "$said"; rm -- "$said"' EXIT
"${lanes[0]}"
wait "$second"
