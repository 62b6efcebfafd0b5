# docker build -f docker/cpu.Dockerfile -t ldmseg:cpu .
FROM python:3.12-slim-bookworm AS build
# Debian keeps one version of a package
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
ARG EXTRAS=app,onnx,hub
# of equal versions pip takes the one with a local label: 2.13.0+cpu before the CUDA build
RUN python -m venv /opt/ldmseg \
    && /opt/ldmseg/bin/pip install --no-cache-dir -c constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu ".[$EXTRAS]"

FROM python:3.12-slim-bookworm
RUN useradd --create-home --uid 10001 ldmseg
COPY --from=build /opt/ldmseg /opt/ldmseg
ENV PATH=/opt/ldmseg/bin:$PATH PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /home/ldmseg
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health', timeout=4)"]
ENTRYPOINT ["ldmseg"]
CMD ["app", "--host", "0.0.0.0", "--port", "7860"]
