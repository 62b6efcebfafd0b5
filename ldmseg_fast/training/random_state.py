"""The random generators of a process, saved and restored as tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """Every generator that code outside ours might draw from; our own draws depend on (seed, item) alone."""
    _, words, gauss = random.getstate()
    kind: Any = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(kind[1]).astype(np.int64)),
        "numpy_place": torch.tensor([kind[2], kind[3]], dtype=torch.int64),
        "gauss": torch.tensor([float("nan") if gauss is None else gauss, kind[4]], dtype=torch.float64),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Tensor]) -> None:
    """Go on where `random_state` was taken."""
    gauss, numpy_gauss = state["gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    place, has_gauss = state["numpy_place"].tolist()
    words = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, place, has_gauss, numpy_gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
