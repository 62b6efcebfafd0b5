"""Install `ldmseg_fast`, with two top-level folders inside it and one C++ extension.

    kernels/ -> ldmseg_fast.kernels    export/ -> ldmseg_fast.export    csrc/ -> ldmseg_fast._C

Mapped this way, nothing called `kernels` or `export` becomes a top-level import.
"""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_namespace_packages, find_packages, setup

ROOT = Path(__file__).parent
PACKAGE_DIR = {
    "ldmseg_fast": "ldmseg_fast",
    "ldmseg_fast.kernels": "kernels",
    "ldmseg_fast.export": "export",
}

EXTRAS = {
    "train": [
        "deepspeed>=0.19; platform_system=='Linux'",  # several ranks
        "diffusers>=0.36",
        "transformers>=5.0",
        "tensorboard>=2.18",
        "matplotlib>=3.8",
        "scipy>=1.11",
    ],
    # onnxruntime and onnxruntime-gpu overwrite each other: never both
    "onnx": ["onnx>=1.20", "onnxscript>=0.6", "onnxruntime>=1.25"],
    "onnx-gpu": ["onnx>=1.20", "onnxscript>=0.6", "onnxruntime-gpu>=1.25"],
    "trt": ["tensorrt-cu13>=11.4"],  # CUDA 13, for drivers from 580 on; CUDA 12 from 535 on
    "trt-cu12": ["tensorrt-cu12>=11.4"],
    "rtx": ["tensorrt-rtx-cu13>=1.7"],
    "rtx-cu12": ["tensorrt-rtx-cu12>=1.7"],
    "xformers": ["xformers>=0.0.35"],
    "fp8": ["torchao>=0.15"],
    "app": ["gradio>=6.31,<7", "prometheus-client>=0.22"],  # a major of Gradio renames arguments and events
    "hub": ["huggingface_hub>=2.0"],
    "data": ["scipy>=1.11", "datasets>=4.0"],
    # for `to_supervision` and `to_fiftyone` of results alone
    "supervision": ["supervision>=0.25"],
    "fiftyone": ["fiftyone>=1.0"],
    # what installs everywhere; the others want a GPU, a vendor's index or a database
    "all": ["ldmseg_fast[train,onnx,app,hub,data]"],
    # MkDocs 2 has no plugins
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
    "dev": [
        "ldmseg_fast[train,app,hub,data]",  # with [onnx] or [onnx-gpu], which exclude each other
        "build>=1.2",
        "twine>=6.1",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "mypy>=1.13",
        "pybind11>=3.0",
        "pycocotools>=2.0.8",
        "torchao>=0.15",
        "scikit-image>=0.24",
        "playwright>=1.50",
        "hotcoco>=1.3; platform_system=='Linux'",
        "tensorrt-rtx-cu13>=1.7; platform_system=='Linux' and platform_machine=='x86_64'",
        # the Python layer without its libraries: names to compare with
        "tensorrt-cu13-bindings>=11.4,<12; platform_system=='Linux' and platform_machine=='x86_64'",
        "types-PyYAML",
    ],
}


def find_mapped_packages():
    """`kernels` itself has no __init__.py (transformers would take it for the PyPI package), so it is a namespace."""
    return [
        package
        for root, folder in PACKAGE_DIR.items()
        for package in (
            root,
            *(f"{root}.{name}" for name in (find_namespace_packages if folder == "kernels" else find_packages)(folder)),
        )
        if "__pycache__" not in package
    ]


def sources(pattern):
    """Files of csrc/, relative to setup.py as build_ext wants them."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(pattern))


setup(
    name="ldmseg_fast",
    version="0.1.0",
    description="Latent diffusion for panoptic segmentation, optimised for speed",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],  # that were tried
    package_dir=PACKAGE_DIR,
    packages=find_mapped_packages(),
    package_data={"ldmseg_fast": ["weights/*/*", "weights/*/*/*", "app/*.css", "app/*.js", "app/*.html"]},
    install_requires=[  # what predicts and scores
        "torch>=2.11",
        "triton>=3.6; platform_system=='Linux'",  # CPU builds of torch come without
        "numpy>=2.0",
        "pillow>=11",
        "safetensors>=0.5",
        "tqdm>=4.66",
        "PyYAML>=6",
        "deflate>=0.8",
        "shtab>=1.13",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ldmseg = ldmseg_fast.cli:main"]},
    ext_modules=[
        Pybind11Extension(
            "ldmseg_fast._C",
            sources("*.cpp"),
            depends=sources("*.hpp"),  # or the sdist leaves the headers out
            cxx_std=17,
            extra_compile_args=["-O3"],
            optional=True,  # no compiler: install without it
        )
    ],
    cmdclass={"build_ext": build_ext},
    zip_safe=False,
)
