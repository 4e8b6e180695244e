#!/usr/bin/env bash
# Installs the tools of docs/recipes.md into environments of their own, runs every recipe against a server and a
# gateway, and tests the adapters of the heavy ones. Writes test/recipes.txt. Needs node, npm and chromium.
# Arguments go to test/recipes/run.py, and then the adapters' tests are left out:
#   test/recipes.sh --only Chroma
set -euo pipefail

repo="$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")"

VENV=${VENV:-$repo/.venv}                          # the one serve.sh uses
RECIPES_VENV=${RECIPES_VENV:-$repo/.venv-recipes}  # 4 GB

for command in node npm chromium; do
  if ! command -v -- "$command" >/dev/null; then
    echo "Expected the command $command, found none: install it, on Debian with apt-get install nodejs npm chromium." >&2
    exit 2
  fi
done

cd -- "$repo"
source tools/prepare_venv.sh
prepare_venv "$VENV" model_repository/nv-embed-v2/requirements.txt tools/requirements.txt
prepare_venv "$RECIPES_VENV" test/recipes/requirement.txt
prepare_venv "$RECIPES_VENV-aiperf" test/recipes/requirement-aiperf.txt
VENV="$(absolute "$VENV")"
RECIPES_VENV="$(absolute "$RECIPES_VENV")"
export VENV  # serve.sh must find the same one
mkdir -p -- "$RECIPES_VENV/node"
cp -- test/recipes/package.json "$RECIPES_VENV/node/"
npm install --prefix "$RECIPES_VENV/node" --no-audit --no-fund --silent

run() {
  "$RECIPES_VENV/bin/python" test/recipes/run.py --node "$RECIPES_VENV/node" --aiperf "$RECIPES_VENV-aiperf/bin" "$@"
}
if (($#)); then
  run "$@"
  exit
fi
{
  status=0
  run || status=$?
  echo "The adapters that need these packages:"
  # Without the filter of warnings: those packages have warnings of their own.
  "$RECIPES_VENV/bin/python" -m pytest --config-file test/client/pytest.ini -o filterwarnings= -o addopts= -vv \
    -p no:cacheprovider --no-header --disable-warnings test/client/test_chroma.py test/client/test_bertopic.py || status=$?
  exit "$status"
} | tee test/recipes.txt
