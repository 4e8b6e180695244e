#!/usr/bin/env bash
# Installs what the tests need and runs every check. Arguments go to pytest, and then the client's tests are left out:
#   test/run.sh -k serve
set -euo pipefail

repo="$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")"

VENV=${VENV:-$repo/.venv}                       # the one serve.sh uses
CLIENT_VENV=${CLIENT_VENV:-$repo/.venv-client}  # the client's: it needs nothing of the server's, and numpy 2

source "$repo/tools/prepare_venv.sh"
prepare_venv "$VENV" "$repo/model_repository/nv-embed-v2/requirements.txt" "$repo/tools/requirements.txt" \
  "$repo/test/requirement.txt" "$repo/test/requirement-dev.txt"
VENV="$(absolute "$VENV")"
export VENV  # the tests start serve.sh, which must find the same one

cd -- "$repo"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"

if (($# == 0)); then
  prepare_venv "$CLIENT_VENV" "$repo/test/client/requirement.txt"
  CLIENT_VENV="$(absolute "$CLIENT_VENV")"
  (cd client && "$CLIENT_VENV/bin/mypy")
  "$CLIENT_VENV/bin/python" -m pytest --config-file test/client/pytest.ini test/client
fi
exec "$VENV/bin/python" -m pytest "$@"
