# The host side: calibrate, measure, plan, export, judge; with the simulator and an NVIDIA GPU or
# without. Not built where this was written, which has no docker engine.
#
#   docker build -f docker/host.Dockerfile -t qvla-host .
#   docker run --rm -it -v "$PWD/runs:/opt/qvla/runs" qvla-host deploy --run runs/demo
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 \
#       -v "$PWD/runs:/opt/qvla/runs" -v /path/to/checkpoint:/policy:ro \
#       qvla-host deploy --policy /policy --run runs/mine
#
# pip takes the torch build that its index serves, which for the default index and x86-64 is CUDA.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# Software OpenGL and a compiler for what has no wheel.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential libosmesa6 libegl1 libgl1 libgles2 libglx-mesa0 libegl-mesa0 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/qvla
# Goes before site-packages, where another distribution may have an `engines` or a `jetson`.
ENV PYTHONPATH=/opt/qvla PYTHONUNBUFFERED=1

# Dependencies first: editing a source file does not install torch again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir calibration qvla_export engines jetson \
    && touch calibration/__init__.py qvla_export/__init__.py engines/__init__.py jetson/__init__.py \
    && pip install --no-cache-dir -c constraints.txt -e '.[host,sim]'
COPY . .

ENTRYPOINT ["qvla"]
CMD ["--help"]
