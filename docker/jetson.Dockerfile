# The robot side: serve a bundle and profile it; no torch, transformers or onnx. Build it on the
# board. Not built where this was written, which has neither a docker engine nor a board.
#
# Any arm64 board with Ubuntu 24.04 (JetPack 7, Python 3.12), the cpu target:
#   docker build -f docker/jetson.Dockerfile -t qvla-jetson .
# With the TensorRT packages of NVIDIA's SBSA repository, which BASE must already have set up:
#   docker build -f docker/jetson.Dockerfile -t qvla-jetson \
#       --build-arg BASE=<your Ubuntu 24.04 CUDA 13 arm64 image> \
#       --build-arg TENSORRT="libnvinfer-bin python3-libnvinfer" .
# JetPack 6 (Ubuntu 22.04, Python 3.10; BASE=nvcr.io/nvidia/l4t-jetpack:r36.4.0) installs and imports
# everything but cannot run a cpu bundle: ONNX Runtime's last release for 3.10 is too old for it.
#
#   docker run --rm --runtime nvidia --ipc=host --ulimit memlock=-1 --network host \
#       -v /path/to/bundle:/bundle:ro qvla-jetson serve /bundle
#
# A bundle for orin-jp7 or orin-jp6 needs engines, built once on this board: mount the setting's
# folder, and keep the key by which an engine is known to have been built here:
#
#   RUN="docker run --rm --runtime nvidia --ipc=host --ulimit memlock=-1 --network host \
#       -v /path/to/settings/w4:/w4 -v qvla-state:/state -e XDG_STATE_HOME=/state qvla-jetson"
#   $RUN build /w4/bundle && $RUN serve /w4/bundle
#
# The server listens on loopback; --host opens it to those who know the token (--token-file).
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG TENSORRT=""

# The compiler is for pycuda, which has no arm64 wheel.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential python3-dev python3-pip python3-venv ${TENSORRT} \
    && rm -rf /var/lib/apt/lists/*

# JetPack's own tensorrt module lies in the system's site-packages.
RUN python3 -m venv --system-site-packages /opt/venv
# PYTHONPATH goes before site-packages: JetPack images may bring another `jetson` package.
ENV PATH=/opt/venv/bin:/usr/local/cuda/bin:${PATH} \
    PYTHONPATH=/opt/qvla \
    PYTHONUNBUFFERED=1

WORKDIR /opt/qvla
# Dependencies first: editing a source file does not install them again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir calibration qvla_export engines jetson \
    && touch calibration/__init__.py qvla_export/__init__.py engines/__init__.py jetson/__init__.py \
    && pip install --no-cache-dir --upgrade pip==26.1 \
    && pip install --no-cache-dir -c constraints.txt -e . \
    && if command -v nvcc >/dev/null; then pip install --no-cache-dir 'pycuda>=2024.1'; fi
COPY . .

ENTRYPOINT ["qvla"]
CMD ["--help"]
