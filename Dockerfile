# The image of mim-torchrec: `make image`, or
#
#     docker build --build-arg KIND=cuda --tag mim-torchrec:cuda .
#
# BASE  a Debian bookworm, whose Python 3.11 the environment uses
# KIND  cpu or cuda: the lock file of requirements/ that is installed.
#       none: no environment; one is mounted when a container starts, as the tests do
#
# TorchX starts containers with commands of its own, so there is no entry point. There is no health check:
# a job ends, and a server is asked by its orchestrator (deploy/kubernetes/serve).
ARG BASE=debian:bookworm-slim
FROM ${BASE}
ARG KIND=cpu

RUN command -v python3.11 >/dev/null && python3.11 -c 'import venv, ensurepip' 2>/dev/null \
    || { apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*; }

# the number is that of run_as_user in docs/cluster.md; the home is the one folder that has to be writable
RUN useradd --uid 1000 --user-group --home-dir /tmp --no-create-home --shell /bin/bash mim

ENV VIRTUAL_ENV=/usr/local/mim PATH=/usr/local/mim/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

COPY requirements/ /src/requirements/
RUN case "$KIND" in \
      none) ;; \
      cpu|cuda) python3.11 -m venv "$VIRTUAL_ENV" \
        && "$VIRTUAL_ENV/bin/python" -m pip install --quiet --no-cache-dir --no-deps -r "/src/requirements/$KIND.txt" ;; \
      *) echo "KIND is cpu, cuda or none, not $KIND" >&2; exit 2 ;; \
    esac

COPY . /src/
RUN if [ "$KIND" != none ]; then \
      "$VIRTUAL_ENV/bin/python" -m pip install --quiet --no-cache-dir --no-deps --no-build-isolation /src; \
    fi && rm -rf /src

USER 1000
WORKDIR /tmp
CMD ["mim", "--help"]
