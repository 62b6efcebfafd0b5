"""What a TensorRT module offers, as JSON: {class: {member: its parameters after self, or null where it says none}}.

python tests/export/describe_bindings.py tensorrt_rtx|tensorrt|tensorrt_bindings

`tensorrt_bindings` is TensorRT's Python layer without its libraries, which need no GPU to be described: empty ones
stand in for them. In a process of its own, since two modules would register the same C++ classes.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip


def stand_in_for_libraries(major: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
        for name in LIBRARIES:
            library = Path(folder) / f"lib{name}.so.{major}"
            command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", str(source), "-o", str(library)]
            subprocess.run(command, check=True)
            ctypes.CDLL(str(library))


def parameters(name: str, member: object) -> list[str] | None:
    signature = re.search(rf"(?:^|\n)(?:\d+\. )?{name}\((.*?)\) -> ", str(member.__doc__ or ""))
    if not callable(member) or signature is None:
        return None
    names = [part.split(":")[0].strip() for part in re.split(r", (?=\w+:)", signature.group(1))]
    return [part for part in names if part and part != "self"]


def describe(module: object) -> dict[str, dict[str, list[str] | None]]:
    kinds = {name: kind for name, kind in vars(module).items() if isinstance(kind, type)}
    found = {}
    for name, kind in kinds.items():
        members = {member: getattr(kind, member, None) for member in dir(kind)}
        found[name] = {member: parameters(member, value) for member, value in members.items()}
    return found


def main() -> None:
    (name,) = sys.argv[1:]
    if name == "tensorrt_bindings":
        stand_in_for_libraries(int(importlib.metadata.version("tensorrt_cu13_bindings").partition(".")[0]))
    module = importlib.import_module(name)
    print(json.dumps({"version": module.__version__, "classes": describe(module)}))


if __name__ == "__main__":
    main()
