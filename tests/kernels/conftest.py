"""What all kernels' tests share: the device, one table of tolerances, poisoned allocations, the checks of an op."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
FLOATS = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]  # the interpreter gets bfloat16 wrong

# (rtol, atol) against float64; atol is in units of the largest expected value. Attention is held to torch's own error.
TOLERANCES = {torch.float32: (2e-5, 2e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (2e-2, 2e-2)}


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(scope="session")
def on_gpu() -> bool:
    return CUDA


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def close() -> Callable[..., None]:
    """Compare with a float64 result at the tolerance of a dtype (by default that of the actual result)."""

    def check(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
        rtol, atol = TOLERANCES[dtype or actual.dtype]
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=rtol, atol=atol * max(largest, 1e-3), check_stride=False
        )

    return check


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN or the largest integer, so that a kernel which leaves a hole is seen."""
    plain = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = plain(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield


@pytest.fixture
def check_op() -> Callable[..., None]:
    """`opcheck`, and the op inside a compiled graph without a break."""

    def check(op: Any, args: tuple[Any, ...]) -> None:
        torch.library.opcheck(op, args)
        torch._dynamo.reset()

        def first(*args: Any) -> Tensor:
            result = op(*args)
            return (result if isinstance(result, Tensor) else result[0]) * 1

        compiled = torch.compile(first, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), first(*args), equal_nan=True)

    return check


@pytest.fixture
def refuses() -> Callable[..., None]:
    """A call raises a ValueError which begins with the argument's name, for real tensors and for fake ones."""

    def check(name: str, function: Callable[..., Any], op: Any, args: tuple[Any, ...], fake: bool = True) -> None:
        with pytest.raises(ValueError, match=rf"^{name}: "):
            function(*args)
        if fake:
            with FakeTensorMode() as mode, pytest.raises(ValueError, match=rf"^{name}: "):
                op(*(mode.from_tensor(each) if isinstance(each, Tensor) else each for each in args))

    return check
