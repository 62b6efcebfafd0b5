# docker build -f docker/cuda.Dockerfile -t ldmseg:cuda .
# PyPI's torch brings CUDA's libraries; the driver is the host's, through the NVIDIA Container Toolkit.
FROM python:3.12-slim-bookworm AS build
# Debian keeps one version of a package
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
ARG EXTRAS=app,onnx-gpu,hub
RUN python -m venv /opt/ldmseg \
    && /opt/ldmseg/bin/pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"

FROM python:3.12-slim-bookworm
# Triton compiles a C file for each kernel that it starts
# Debian keeps one version of a package
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 ldmseg
COPY --from=build /opt/ldmseg /opt/ldmseg
ENV PATH=/opt/ldmseg/bin:$PATH PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /home/ldmseg
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health', timeout=4)"]
ENTRYPOINT ["ldmseg"]
CMD ["app", "--host", "0.0.0.0", "--port", "7860"]
