#!/usr/bin/env bash
# Installs what the tests need and runs every check; arguments go to pytest:  test/run.sh -k serve
set -euo pipefail

repo="$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")"

VENV=${VENV:-$repo/.venv}  # the one serve.sh uses

source "$repo/tools/prepare_venv.sh"
prepare_venv "$VENV" "$repo/model_repository/nv-embed-v2/requirements.txt" "$repo/tools/requirements.txt" \
  "$repo/test/requirement.txt" "$repo/test/requirement-dev.txt"
VENV="$(CDPATH='' cd -- "$VENV" && pwd)"
export VENV  # the tests start serve.sh, which must find the same one

cd -- "$repo"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
exec "$VENV/bin/python" -m pytest "$@"
