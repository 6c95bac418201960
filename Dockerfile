# An image that has the wheel and what it runs on:
#   docker build -t performer .
# The wheel is taken from dist, where tools/wheels.sh puts it; where there is none, it is built here.
# BASE may be any Debian-based image; Python 3.10 to 3.13 is taken from it, or from its packages.
# CUDA=OFF leaves the GPU kernels out of a wheel that is built here. TENSORFLOW is the extra: cpu, or
# gpu for an image with CUDA's libraries, which needs no more than the driver of the GPU.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS build
ARG CUDA=ON
COPY . /src
RUN mkdir /wheels \
 && if ls /src/dist/*.whl >/dev/null 2>&1; then cp /src/dist/*.whl /wheels; else \
      apt-get update \
   && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ \
   && if ! python3 -c "import ensurepip" 2>/dev/null; then \
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv; \
      fi \
   && PERFORMER_CUDA=${CUDA} bash /src/tools/wheels.sh /wheels; \
    fi

FROM ${BASE}
ARG TENSORFLOW=cpu
RUN if ! python3 -c "import ensurepip" 2>/dev/null; then \
      apt-get update \
   && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-venv \
   && rm -rf /var/lib/apt/lists/*; \
    fi \
 && python3 -m venv /opt/performer
ENV PATH=/opt/performer/bin:$PATH
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[${TENSORFLOW}]"

# The op, on random data, against the plain TensorFlow composition; no GPU or driver is needed.
COPY tools/smoke.py /opt/performer/smoke.py
RUN python /opt/performer/smoke.py
CMD ["python"]
