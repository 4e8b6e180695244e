"""The Docker image: what is copied is there and arrives, and it starts through serve.sh like everything else."""

from __future__ import annotations

import subprocess

import pytest
from image import Image, sent_by
from serving import ROOT

TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def image() -> Image:
    return Image.read()


def test_everything_that_is_copied_exists_and_is_sent_to_the_docker_daemon(image):
    files = image.files()
    for sources, target in image.copies:
        for source in sources:
            assert list(ROOT.glob(source)), source
        assert any(inside.startswith(target.strip("/")) for inside in files), target


def test_all_of_the_model_the_default_checkpoint_and_the_gateway_reaches_the_image(image):
    arrived = {file.relative_to(ROOT).as_posix() for file in image.files().values()}
    rooms = ("model_repository/", "checkpoints/", "client/src/")
    assert [name for name in TRACKED if name.startswith(rooms) and name not in arrived] == []


def test_what_serve_sh_reads_is_in_the_image_where_it_looks_for_it(image):
    inside = image.files()
    for name in TRACKED:
        if name == "serve.sh" or (name.startswith("tools/") and "held_out" not in name):
            assert f"opt/nv-embed/{name}" in inside, name
    assert image.command == ["/opt/nv-embed/serve.sh"]
    assert "opt/nv-embed/checkpoints/nv-embed-mini/model.safetensors" in inside
    assert image.links["/opt/nv-embed/model_repository"] == "/model_repository"
    assert "model_repository/nv-embed-v2/config.pbtxt" in inside


@pytest.mark.parametrize(
    "path",
    [
        ".venv/bin/python", ".venv-gateway/bin/python", ".git/HEAD", ".cache/kubernetes/bin/helm4",
        "client/src/nv_embed_client/__pycache__/x.pyc", "client/src/nv_embed_client.egg-info/PKG-INFO",
        "model_repository/nv-embed-v2/1/nv_embed/__pycache__/x.pyc", "model_repository/added/config.pbtxt",
        "checkpoints/other/model.safetensors", "test/data/toy/config.json",
    ],
)  # fmt: skip
def test_environments_caches_and_other_weights_do_not_travel_to_the_docker_daemon(path):
    assert not sent_by(ROOT / ".dockerignore")(path)


def test_the_user_is_a_number_because_kubernetes_cannot_tell_whether_a_name_is_root(image):
    assert image.user == 1000


def test_the_server_has_an_init_above_it(image):
    assert image.entrypoint[:3] == ["tini", "-s", "--"]
