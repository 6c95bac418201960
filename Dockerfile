# Builds a wheel and an image that has only the wheel and what it runs on:
#   docker build -t performer .
# BASE may be any Debian-based image; Python 3.10 to 3.13 is taken from it, or from its packages.
# CUDA=OFF leaves out the GPU kernels. They are compiled by the nvcc of BASE or, where it has none, by
# that of PyPI's wheels, which stays in the build stage; the image needs no CUDA, and a GPU no more
# than its driver.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG CUDA=ON
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ \
 && if ! python3 -c "import ensurepip, os, sysconfig as s; os.stat(s.get_path('include') + '/Python.h')" \
      2>/dev/null; then \
      DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv python3-dev; \
    fi \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/build
COPY . /src
RUN PERFORMER_CUDA=${CUDA} /opt/build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${BASE}
RUN if ! python3 -c "import ensurepip" 2>/dev/null; then \
      apt-get update \
   && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
   && rm -rf /var/lib/apt/lists/*; \
    fi \
 && python3 -m venv /opt/performer
ENV PATH=/opt/performer/bin:$PATH
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir /wheels/*.whl

# The op, on random data, against the plain TensorFlow composition; no GPU or driver is needed.
COPY tools/smoke.py /opt/performer/smoke.py
RUN python /opt/performer/smoke.py
CMD ["python"]
