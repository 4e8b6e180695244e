# Triton with what model.py imports. Neither weights nor model code: both are mounted, so one image serves every
# checkpoint and a changed model.py needs no build. serve.sh builds it and holds the line that runs it.
#
# Run when this file was written: the pip install, with these pins for Python 3.12 (the image's Python) in a virtual
# environment. Not run, for want of a Docker engine: the build itself, the user, the health check.
FROM nvcr.io/nvidia/tritonserver:26.07-py3

# A compiler and Python's headers: what torch compiles for a GPU is launched through a module built where it runs.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*
# Ubuntu marks its Python as externally managed; in an image that has one purpose there is nothing to protect.
# Folders of sentence-transformers need more:
#   docker build --build-arg EXTRA_REQUIREMENTS=requirements-sentence-transformers.txt .
ARG EXTRA_REQUIREMENTS=
COPY model_repository/nv-embed-v2/requirements*.txt /opt/nv-embed-v2/
RUN cd /opt/nv-embed-v2 && python3 -m pip install --no-cache-dir --break-system-packages \
    --requirement requirements.txt ${EXTRA_REQUIREMENTS:+--requirement "$EXTRA_REQUIREMENTS"}

# The base image's user has no home, where this would be otherwise; compiled layers are made again at each start.
ENV TRITON_CACHE_DIR=/tmp/triton

# glibc's default, eight arenas per core, doubles the server's memory.
ENV MALLOC_ARENA_MAX=2

# The unprivileged user (uid 1000) that the base image brings.
USER triton-server

EXPOSE 8000 8001 8002

# Ready means loaded and warmed up; reading 16 GB of weights from a slow disk may take most of the start period.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
  CMD curl --fail --silent --output /dev/null http://127.0.0.1:8000/v2/health/ready

# As process 1 the server would ignore SIGTERM while it loads, and nothing inside could kill it. tini is process 1, and
# NVIDIA's entry point, which prints what it finds of driver and GPU, becomes the command. -s: fine below another init.
ENTRYPOINT ["tini", "-s", "--", "/opt/nvidia/nvidia_entrypoint.sh"]

# As serve.sh starts it, too. ADMIN_KEY, SHM_BYTES, MAX_CONNECTION_SECONDS, TRACE_URL and TRACE_RATE may be given.
COPY tools/triton_arguments.sh /opt/nv-embed-v2/triton_arguments.sh
CMD ["bash", "-c", "source /opt/nv-embed-v2/triton_arguments.sh && exec tritonserver --model-repository=/model_repository \"${triton_arguments[@]}\""]
