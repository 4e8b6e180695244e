"""A container of a rendered pod, run on this machine as a kubelet would: its command, variables, volumes and probes.

What is missing is the container's own network, so the ports are others, and what an image brings with it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from image import Image
from serving import ROOT, Ports, Server, free_ports

UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
# What the image brings from elsewhere, by stand-ins.
PROGRAMS = {
    "opt/bin/tini": '#!/bin/sh\nshift 2  # -s --\nexec "$@"\n',
    "opt/nvidia/nvidia_entrypoint.sh": '#!/bin/sh\nexec "$@"\n',
    "opt/bin/tritonserver": f'#!/bin/sh\nexec {sys.executable} /opt/nv-embed/tools/pip_triton.py "$@"\n',
    "opt/bin/nv-embed-gateway": '#!/bin/sh\nexec python -m nv_embed_client.gateway "$@"\n',
}


def needs_mounts() -> None:
    """Skips the test where a user may not mount, such as in a container without the right to."""
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs `unshare --mount`: run the tests as root, or allow user namespaces")


def lay_out(folder: Path) -> Path:
    """The image's files, and stand-ins for what comes from the base image and from packages; returns `folder`."""
    Image.read().lay_out(folder)
    for name, text in PROGRAMS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    for empty in (".served", ".venv-gateway"):
        (folder / "opt/nv-embed" / empty).mkdir()
    # The layout of the pip-installed Triton must be there, because nothing can be written later.
    subprocess.run([sys.executable, ROOT / "tools" / "pip_triton.py", "--lay-out"], check=True)
    return folder


class Pod:
    """A pod of one container: how it is started and probed."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        image: Path,
        folder: Path,
        volumes: Mapping[str, Path] | None = None,
        ports: Mapping[int, int] | None = None,
    ) -> None:
        """`folder`: for what it writes. `volumes`: folders of those that are not empty, by name. `ports`: those on this
        machine, by those in the pod."""
        needs_mounts()
        self.spec, self._image, self._folder = spec, image, folder
        self._volumes, self._ports = volumes or {}, ports or {}
        (self.container,) = spec["containers"]

    def command(self, variables: Mapping[str, str], mounts: Mapping[str, Path] | None = None) -> list[str | Path]:
        """What starts it. `variables` win over the pod's; a Secret's value is its key. `mounts`: more, by target."""
        image = Image.read()
        environ = {"PATH": f"/opt/bin:/opt/nv-embed/.venv-gateway/bin:{os.environ['PATH']}"} | image.environment
        for variable in self.container.get("env", []):
            environ[variable["name"]] = variable.get("value") or variable["valueFrom"]["secretKeyRef"]["key"]
        settings = [f"{name}={value}" for name, value in (environ | dict(variables)).items()]
        root = self._folder / "root"
        root.mkdir()
        user = str(self.spec["securityContext"]["runAsUser"]) if os.geteuid() == 0 else ""
        words = [*image.entrypoint, *map(self._here, self.container.get("args", image.command))]
        if sys.prefix.startswith("/tmp/"):  # which the pod's own hides
            mounts = {sys.prefix: Path(sys.prefix), **(mounts or {})}
        volumes = [*self._mounts(), *(f"{target}={source}" for target, source in (mounts or {}).items())]
        return [*UNSHARE, ROOT / "test" / "pod.sh", self._image, root, user, *volumes, "--", *settings, *words]

    def _mounts(self) -> list[str]:
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        mounts = []
        for mount in self.container["volumeMounts"]:
            name, empty = mount["name"], volumes[mount["name"]].get("emptyDir")
            if empty is None:
                source = str(self._volumes[name] / mount.get("subPath", ""))
            elif empty.get("medium") == "Memory":
                source = f"memory:{empty['sizeLimit'].removesuffix('i')}"
            else:
                written = self._folder / name
                written.mkdir()
                written.chmod(0o777)
                source = f"rw:{written}"
            mounts.append(f"{mount['mountPath']}={source}")
        return mounts

    def _here(self, word: str) -> str:
        """A word of a command, with the ports of this machine."""
        for inside, here in self._ports.items():
            word = re.sub(rf"(?<=[:=]){inside}\b", str(here), word)
        return word

    def probe(self, kind: str) -> bool:
        """Whether a probe succeeds once, as the kubelet judges it."""
        probe = self.container[f"{kind}Probe"]
        if "exec" in probe:
            return self.run(probe["exec"]["command"], probe["timeoutSeconds"])
        asked = probe["httpGet"]
        (port,) = (each["containerPort"] for each in self.container["ports"] if each["name"] == asked["port"])
        try:
            url = f"http://127.0.0.1:{self._ports[port]}{asked['path']}"
            with urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]) as response:
                return 200 <= response.status < 400
        except OSError:
            return False

    def run(self, words: Sequence[str], seconds: float) -> bool:
        """Whether a command of the pod's succeeds in time."""
        try:
            return subprocess.run([*map(self._here, words)], check=False, timeout=seconds).returncode == 0
        except subprocess.TimeoutExpired:
            return False


class ServerPod(Server):
    """The server's pod, from its start until it is deleted."""

    def __init__(
        self, spec: Mapping[str, Any], image: Path, folder: Path, volumes: Mapping[str, Path] | None = None
    ) -> None:
        """Start, without waiting."""
        ports = Ports(*free_ports(3))
        self.inside = {8000: ports.http, 8001: ports.grpc, 8002: ports.metrics}
        self.pod = Pod(spec, image, folder, volumes, self.inside)
        variables = {f"{name.upper()}_PORT": str(getattr(ports, name)) for name in ("http", "grpc", "metrics")}
        super().__init__(folder / "log.txt", None, ports=ports, command=self.pod.command(variables))

    def delete(self) -> tuple[int, float]:
        """What the kubelet does: preStop, SIGTERM, and SIGKILL when the grace period is over.

        Returns the exit code and the seconds that it all took.
        """
        start = time.monotonic()
        grace = self.pod.spec["terminationGracePeriodSeconds"]
        assert self.pod.run(self.pod.container["lifecycle"]["preStop"]["exec"]["command"], grace)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(grace - (time.monotonic() - start))
        except subprocess.TimeoutExpired:
            self._kill()
        return self.process.wait(), time.monotonic() - start
