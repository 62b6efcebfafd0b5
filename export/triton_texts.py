"""Writes the README.md and the Dockerfile of a Triton repository: how to start the server, and how to ask it."""

from __future__ import annotations

from ldmseg_fast import __version__
from ldmseg_fast.backends.trt.passport import Passport
from ldmseg_fast.export.triton_configs import Serving

README, DOCKERFILE = "README.md", "Dockerfile"
MATRIX = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/index.html"

DOCKERFILE_TEXT = """\
# The server with the package that the repository's Python models import.
FROM {image}
# a requirement, the address of a wheel, or /wheels/NAME of one that lies beside this file
ARG LDMSEG=ldmseg_fast=={version}
COPY Dockerfile *.whl /wheels/
RUN pip install --no-cache-dir --break-system-packages "$LDMSEG"
"""

README_TEXT = """\
# Panoptic segmentation in Triton Inference Server

`ldmseg` takes encoded pictures and answers with panoptic maps. {what}

## Start it

Here, where this file lies:

```bash
docker build -t ldmseg-triton .
docker run --rm {gpus}--shm-size 1g --ulimit memlock=-1 \\
    -p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001 -p 127.0.0.1:8002:8002 \\
    -v "$PWD:/models:ro" ldmseg-triton \\
    tritonserver --model-repository=/models{options}
```

The server is ready when `curl -f 127.0.0.1:8000/v2/health/ready` succeeds. Ports: HTTP 8000, gRPC 8001, metrics 8002.
`docker build --build-arg LDMSEG=...` installs another version of the package, or with `/wheels/NAME` a wheel that lies
here. {version_note}
## Ask it

```bash
pip install 'tritonclient[all]' pillow
python client.py photo.jpg                          # HTTP, one picture
python client.py *.jpg --out maps                   # many pictures, several requests at a time
python client.py *.jpg --grpc --out maps            # gRPC
```

| Tensor | Type | Shape | Meaning |
|---|---|---|---|
| `image` | BYTES | [B, 1] | a picture's file, JPEG or PNG or another that Pillow reads |
| `seed` | INT64 | [B, 1] | of the noise; optional, default 0 |
| `segmentation` | INT32 | [B, H, W] | the id of each pixel's segment; 0: none |
| `segments_info` | BYTES | [B, 1] | JSON: the segments of the map |

A request holds up to {batch} pictures of one size. Send pictures of several sizes in a request each: the server makes
batches of them by itself. {limits}
"""


def readme_text(serving: Serving, image: str, engine: Passport | None) -> str:
    """Writes how to start the server, with the exact commands.

    Args:
        serving: of the repository.
        image: of the server, as Docker names it.
        engine: the passport of the denoiser's engine; None for ONNX graphs.
    """
    precision = serving.manifest.precision
    what = f"It runs {serving.steps} steps of ONNX graphs in {precision} by ONNX Runtime."
    options = note = ""
    if engine is not None:
        what = f"It runs {serving.steps} steps of TensorRT engines in {precision}, built for {_machines(engine)}."
        note = _version_note(serving, image)
        if engine.version_compatible:
            options = " \\\n    --backend-config=tensorrt,version-compatible=true"
    return README_TEXT.format(
        what=what,
        gpus="--gpus all " if serving.on_gpu else "",
        options=options,
        version_note=note,
        batch=serving.batch,
        limits=_limits(serving),
    )


def dockerfile_text(image: str) -> str:
    """Writes the Dockerfile of the server, from NVIDIA's `image`."""
    return DOCKERFILE_TEXT.format(image=image, version=__version__)


def _machines(engine: Passport) -> str:
    if engine.targets == ("portable",):
        return "GPUs of Ampere and later"
    if engine.targets == ("same",):
        return f"GPUs of compute capability {engine.compute_capability}"
    return engine.gpu if engine.targets == ("current",) else ", ".join(engine.targets)


def _version_note(serving: Serving, image: str) -> str:
    version = serving.tensorrt
    major = version.split(".")[0]
    needed = f"{version}, or a later {major}" if serving.version_compatible else f"{version} exactly"
    return f"""

The engines need TensorRT {needed}. NVIDIA's table ({MATRIX}) names the one
of each container. This prints the one of `{image}`:

```bash
docker run --rm {image} sh -c 'dpkg-query -W libnvinfer{major} || dpkg-query -W "libnvinfer*"'
```

A server with another one says so in its log when it starts: the sampler is not loaded. Then take the container that has
it (`to_triton.py --image`), or build the engines inside the container that you want to run.
"""


def _limits(serving: Serving) -> str:
    slots = "mask_logits" in serving.manifest.graphs["mask_decoder"].spec.tensors
    text = f"Pictures of more than {serving.max_pixels} pixels are refused before they are decoded (`--max-pixels`)."
    if serving.head_side and not slots:
        return text + f" So are those with a side over {serving.head_side} pixels, the engines' `--max-side`."
    return text
