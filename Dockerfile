# All that a container needs but the weights: Triton, what model.py imports, the model repository, the small default
# checkpoint and the gateway. serve.sh starts it here as it does anywhere, with the same variables:
#   docker run --shm-size 1g --publish 8001:8001 IMAGE
#   docker run --shm-size 1g --publish 8001:8001 --gpus all --mount type=bind,source=/models/NV-Embed-v2,target=/models/NV-Embed-v2,readonly --env MODEL_PATH=/models/NV-Embed-v2 IMAGE
#   docker run --publish 9000:9000 IMAGE nv-embed-gateway --host 0.0.0.0 --triton-url HOST:8001
#
# Run when this file was written: the pip install, with these pins for Python 3.12 (the image's Python) in a virtual
# environment; what it copies, in a folder laid out like the image. Not run, because no Docker engine was at hand:
# the build itself, the user, the health check.
FROM nvcr.io/nvidia/tritonserver:26.07-py3

# A compiler and Python's headers: what torch compiles for a GPU is launched through a module built where it runs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini curl g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
# Ubuntu marks its Python as externally managed; in an image that has one purpose there is nothing to protect.
# Folders of sentence-transformers need more:
#   docker build --build-arg EXTRA_REQUIREMENTS=requirements-sentence-transformers.txt .
ARG EXTRA_REQUIREMENTS=
COPY model_repository/nv-embed-v2/requirements*.txt /opt/nv-embed/requirements/
RUN cd /opt/nv-embed/requirements && python3 -m pip install --no-cache-dir --break-system-packages \
    --requirement requirements.txt ${EXTRA_REQUIREMENTS:+--requirement "$EXTRA_REQUIREMENTS"}

# The gateway has an environment of its own, as everywhere: serve.sh finds it ready. What it runs is /opt/nv-embed/client.
COPY tools/prepare_venv.sh tools/requirements-gateway.txt /opt/nv-embed/tools/
RUN python3 -m venv /opt/nv-embed/.venv-gateway && bash -c 'source /opt/nv-embed/tools/prepare_venv.sh \
    && prepare_venv /opt/nv-embed/.venv-gateway /opt/nv-embed/tools/requirements-gateway.txt' && rm -rf /root/.cache/pip
COPY client /opt/nv-embed/client
RUN /opt/nv-embed/.venv-gateway/bin/python -m pip install --no-cache-dir --no-deps --editable /opt/nv-embed/client \
    && ln --symbolic /opt/nv-embed/.venv-gateway/bin/nv-embed-gateway /usr/local/bin/nv-embed-gateway \
    && ln --symbolic /opt/nv-embed/.venv-gateway/bin/nv-embed /usr/local/bin/nv-embed

COPY serve.sh /opt/nv-embed/
COPY tools /opt/nv-embed/tools
COPY checkpoints/nv-embed-mini /opt/nv-embed/checkpoints/nv-embed-mini
# A mount at the same path overrides it. The link is for the tools, which import the model's package.
COPY model_repository /model_repository
RUN ln --symbolic /model_repository /opt/nv-embed/model_repository
ENV RUNTIME=native

# The root may be read-only: all that is written goes to /tmp, /dev/shm and, for models other than NV-Embed-v2, .served.
# The base image's user has no home. Compiled layers are made again at each start.
RUN install --directory --owner=1000 /opt/nv-embed/.served
ENV HOME=/tmp TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor

# glibc's default, eight arenas per core, doubles the server's memory.
ENV MALLOC_ARENA_MAX=2

# The unprivileged user triton-server that the base image brings, as a number, so that Kubernetes sees that it is not root.
USER 1000

EXPOSE 8000 8001 8002

# Ready means loaded and warmed up; reading 16 GB of weights from a slow disk may take most of the start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
  CMD curl --fail --silent --output /dev/null http://127.0.0.1:8000/v2/health/ready

# As process 1 the server would ignore SIGTERM while it loads, and nothing inside could kill it. tini is process 1, and
# NVIDIA's entry point, which prints what it finds of driver and GPU, becomes the command. -s: fine below another init.
ENTRYPOINT ["tini", "-s", "--", "/opt/nvidia/nvidia_entrypoint.sh"]
CMD ["/opt/nv-embed/serve.sh"]
