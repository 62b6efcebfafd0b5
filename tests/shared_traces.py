"""Equal networks that tests export are traced once, for all processes: it takes seconds, however small they are."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

OF_MODULES = vars(nn.Module()).keys()  # hooks, and what is asked for by name below


def fingerprint(module: nn.Module, *others: object) -> str:
    """Hashes weights, classes and all other attributes of the modules within one, and the `repr` of further values.

    What is patched outside of them, such as a function that they call, is not seen.
    """
    found = hashlib.sha256(repr(others).encode())
    for name, each in module.named_modules():
        hooks = len(each._forward_hooks), len(each._forward_pre_hooks)
        found.update(repr((name, type(each), each.training, hooks)).encode())
        own = {key: value for key, value in vars(each).items() if key not in OF_MODULES}
        for key, value in {**own, **each._parameters, **each._buffers}.items():
            leaves, spec = tree_flatten(value)
            found.update(repr((key, spec)).encode())
            for leaf in leaves:
                if torch.is_tensor(leaf):
                    found.update(repr((leaf.dtype, leaf.shape)).encode())
                    found.update(leaf.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
                else:
                    found.update(repr(leaf).encode())
    return found.hexdigest()


@contextmanager
def share_traces(folder: Path) -> Iterator[None]:
    """Lets `torch.onnx.export` of keyword arguments return what it returned before, here or in another process."""
    trace = torch.onnx.export

    def export(module: nn.Module, *args: Any, kwargs: dict[str, torch.Tensor] | None = None, **settings: Any) -> Any:
        import onnx_ir

        if kwargs is None:
            return trace(module, *args, **settings)
        shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in kwargs.items()}
        path = folder / f"{fingerprint(module, shapes, settings)}.onnx"
        if path.exists():
            model = onnx_ir.load(path)
            for value in (*model.graph.inputs, *model.graph.outputs):
                value.shape = None if value.shape is None else onnx_ir.Shape(value.shape)  # one that can be changed
            return torch.onnx.ONNXProgram(model, None)
        program: Any = trace(module, *args, kwargs=kwargs, **settings)
        unfinished = path.with_suffix(f".{os.getpid()}")
        onnx_ir.save(program.model, unfinished)
        unfinished.replace(path)
        return program

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", export)
        yield
