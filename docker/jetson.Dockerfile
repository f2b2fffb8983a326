# The robot side: serves a bundle, profiles it; no torch, transformers or onnx, no compiler. Build it on
# the board, or anywhere for a cpu bundle. Serves as a user of its own on a root that may be read-only:
#
#   docker build -f docker/jetson.Dockerfile -t qvla-jetson .
#   docker run --rm --read-only --tmpfs /tmp -v qvla-state:/state --network host \
#       -v /path/to/bundle:/bundle:ro qvla-jetson serve /bundle
#
# BASE is any arm64 Ubuntu 24.04 (JetPack 7, Python 3.12); with TensorRT of NVIDIA's SBSA repository,
# which BASE must already have set up:
#       --build-arg BASE=<your Ubuntu 24.04 CUDA 13 arm64 image> \
#       --build-arg TENSORRT="libnvinfer-bin python3-libnvinfer"
# and `docker run --runtime nvidia --group-add video --group-add render --ulimit memlock=-1 --ipc=host`.
# JetPack 6 (Ubuntu 22.04, Python 3.10; NVIDIA's image of it as BASE) installs and imports
# everything but cannot run a cpu bundle: ONNX Runtime's last release for 3.10 is too old for it.
#
# A bundle for orin-jp7 or orin-jp6 needs engines, built once on this board, in a folder that user 10001
# may write: `-v /path/to/settings/w4:/w4 qvla-jetson build /w4/bundle`. /state keeps the key by which an
# engine is known to have been built here. The server listens on loopback; --host opens it to those who
# know the token (--token-file).
ARG BASE=ubuntu:24.04

FROM ${BASE} AS build
# Versions are those of BASE, by its digest.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
# JetPack's own tensorrt module lies in the system's site-packages.
RUN python3 -m venv --system-site-packages /opt/venv
WORKDIR /src
# Dependencies first: editing a source file does not fetch them again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir calibration qvla_export engines jetson \
    && touch calibration/__init__.py engines/__init__.py jetson/__init__.py \
    && echo '__version__ = "0"' > qvla_export/__init__.py \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt '.[device]'
COPY . .
# What installs is left out of what serves, and what nothing here reads: tests and stubs, sources of
# Cython, PyPy's half of zstandard, a downloader of models, and the C library of ONNX Runtime, all of
# which its Python module has in itself.
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --force-reinstall . \
    && /opt/venv/bin/pip uninstall -y hf-xet pip setuptools \
    && find /opt/venv \( -name __pycache__ -o -path '*/numpy/*/tests' \) -prune -exec rm -rf {} + \
    && find /opt/venv -type f \( -name '*.pyi' -o -name '*.pyx*' -o -name '*.px[di]*' \
        -o -path '*/zstandard/_cffi.*' -o -name 'libonnxruntime.so.*' \) -delete
# The user below cannot write what Python compiles: what robots run is compiled here.
RUN /opt/venv/bin/python -I -c "import onnxruntime, qvla_export.cli.main, qvla_export.cli.app, \
    qvla_export.pipeline.robot.serve, jetson.server, jetson.doctor.speed, jetson.install.checking, \
    jetson.install.supervision, engines.load, engines.ort, engines.verify"

FROM ${BASE}
ARG TENSORRT=""
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 ${TENSORRT} \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && groupadd --gid 10001 qvla \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /state qvla \
    && install -d -o 10001 -g 10001 /state
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/state XDG_STATE_HOME=/state \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    QVLA_PORT=8000
VOLUME ["/state"]
WORKDIR /state
USER 10001:10001
# Whether the server's process answers; /readyz says whether its policy does.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['QVLA_PORT'] + '/healthz', timeout=2)"]
ENTRYPOINT ["qvla"]
CMD ["--help"]
