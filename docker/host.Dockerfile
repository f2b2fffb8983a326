# The host side: calibrate, measure, plan, export, judge; with the simulator and an NVIDIA GPU or
# without. Runs as a user of its own on a root that may be read-only, and writes into /runs:
#
#   docker build -f docker/host.Dockerfile -t qvla-host .
#   docker run --rm -it --read-only --tmpfs /tmp -v qvla-runs:/runs qvla-host deploy --run /runs/demo
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --read-only --tmpfs /tmp \
#       -v qvla-runs:/runs -v /path/to/checkpoint:/policy:ro \
#       qvla-host deploy --policy /policy --run /runs/mine
#
# pip takes the torch build that its index serves, which for the default index and x86-64 is CUDA.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
ARG EXTRAS="[host,sim]"
# A compiler for what has no wheel; versions are those of BASE, by its digest.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
RUN python3 -m venv /opt/venv
WORKDIR /src
# Dependencies first: editing a source file does not install torch again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir calibration qvla_export engines jetson \
    && touch calibration/__init__.py engines/__init__.py jetson/__init__.py \
    && echo '__version__ = "0"' > qvla_export/__init__.py \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt ".${EXTRAS}"
COPY . .
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --force-reinstall . \
    && /opt/venv/bin/pip uninstall -y pip

FROM ${BASE}
# Software OpenGL for the simulator.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        python3 libosmesa6 libegl1 libgl1 libgles2 libglx-mesa0 libegl-mesa0 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && groupadd --gid 10001 qvla \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /runs qvla \
    && install -d -o 10001 -g 10001 /runs
COPY --from=build /opt/venv /opt/venv
# The reference policy that `deploy` takes where none is given.
COPY checkpoints /opt/qvla/checkpoints
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/runs PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
VOLUME ["/runs"]
WORKDIR /opt/qvla
USER 10001:10001
# No server by itself: whether the command starts.
HEALTHCHECK --interval=60s --timeout=20s CMD ["qvla", "--version"]
ENTRYPOINT ["qvla"]
CMD ["--help"]
