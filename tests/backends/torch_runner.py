"""A runner that needs no runtime: it runs a module as a runtime runs its engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ldmseg_fast.backends.graphs.specs import GraphSpec


class TorchRunner:
    """Runs a module of `modules` as a runtime runs its engine.

    Args:
        spec: of the graph.
        module: takes the spec's inputs by name and returns its outputs in order.
    """

    def __init__(self, spec: GraphSpec, module: nn.Module) -> None:
        self.spec = spec
        self.module = module

    def prepare(self, tensors: Mapping[str, Tensor], repeated: bool = False) -> Callable[[], None]:
        """See `Runner.prepare`."""
        inputs = {tensor.name: tensors[tensor.name] for tensor in self.spec.inputs}
        outputs = [tensors[tensor.name] for tensor in self.spec.outputs]

        def run() -> None:
            results = self.module(**inputs)
            for output, result in zip(outputs, results if isinstance(results, tuple) else (results,)):
                output.copy_(result)

        return run
