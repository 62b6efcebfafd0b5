"""Cuts training state along the ranks: every rank writes what it owns, and any number of ranks reads it back.

A file holds flat pieces, each named KIND:START:NAME, where START is its first element in the flattened parameter:

    weight:0:unet.conv_in.weight  exp_avg:0:unet.conv_in.weight  exp_avg_sq:...  average:...

Moments in 8 bits are exp_avg_codes and exp_avg_scales, and the other's alike.

So nothing is gathered to save, nothing is pickled, and how the pieces were cut does not matter to the reader. A rank's
random state, `random_state`, is its own, and useful to as many ranks only.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldmseg_fast.checkpoints.tensors import save_weights
from ldmseg_fast.errors import CheckpointError
from ldmseg_fast.files import require_file
from ldmseg_fast.training.adamw_8bit import MOMENTS, Moment, adam_state


@dataclass(frozen=True)
class Shard:
    """Holds what this rank owns of one trainable parameter.

    Attributes:
        name: of the parameter.
        start: the piece's first element in the flattened parameter.
        weight: master weights in float32, the whole parameter or, under ZeRO, a flat piece of it; writing to it changes
            them.
        moments: AdamW's, alike, or in 8 bits.
    """

    name: str
    start: int
    weight: Tensor
    moments: Mapping[str, Tensor | Moment]


def whole_shards(stage: nn.Module, optimizer: torch.optim.AdamW) -> list[Shard]:
    """Takes parameters whole: one process, or ZeRO 0."""
    return [
        Shard(name, 0, parameter.detach(), adam_state(optimizer, parameter))
        for name, parameter in stage.named_parameters()
        if parameter.requires_grad
    ]


def flat_shards(stage: nn.Module, zero: Any) -> list[Shard]:
    """Cuts as ZeRO 1 and 2 do: each rank owns one run of each parameter group, flattened end to end."""
    states = [adam_state(zero.optimizer, flat) for flat in zero.single_partition_of_fp32_groups]
    shards = []
    for name, parameter in stage.named_parameters():
        piece = getattr(parameter, "_hp_mapping", None)
        if piece is None or not parameter.requires_grad:
            continue  # all of it lies on other ranks
        place, state = piece.hp_fragment_address, states[piece.param_group_index]
        moments = {key: state[key].narrow(0, place.start, place.numel) for key in MOMENTS}
        shards.append(Shard(name, piece.lp_fragment_address.start, piece.hp_fragment, moments))
    return shards


def parameter_shards(stage: nn.Module, zero: Any, rank: int) -> list[Shard]:
    """Cuts as ZeRO 3 does: each rank owns a piece of every parameter; the last one's is padded."""
    states = [adam_state(zero.optimizer, flat) for flat in zero.fp32_partitioned_groups_flat]
    shards = []
    parameter: Any
    for name, parameter in stage.named_parameters():
        if not parameter.requires_grad:
            continue
        group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
        start = rank * length
        length = min(length, parameter.ds_numel - start)
        if length > 0:
            cut = {"weight": zero.fp32_partitioned_groups_flat[group]} | {key: states[group][key] for key in MOMENTS}
            pieces = {key: value.detach().narrow(0, offset, length) for key, value in cut.items()}
            shards.append(Shard(name, start, pieces.pop("weight"), pieces))
    return shards


class Averages:
    """Keeps exponential moving averages of this rank's shards.

    The decay is min(decay, (1 + step) / (10 + step)), so that early averages are not the initialisation.
    """

    def __init__(self, shards: list[Shard], decay: float) -> None:
        self.decay, self.shards = decay, shards
        self.values = [shard.weight.detach().float().clone() for shard in shards]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the averages towards the weights after 1-based `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [shard.weight.detach() for shard in self.shards], 1.0 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges averages and master weights; called twice it changes nothing."""
        for value, shard in zip(self.values, self.shards):
            weight = shard.weight.clone()
            shard.weight.copy_(value)
            value.copy_(weight)


def save_shards(path: Path, shards: Iterable[tuple[Shard, Tensor | None]]) -> None:
    """Writes shards, float32 of any shape, each with its average where there is one.

    Raises:
        OSError: the file cannot be written.
    """
    state: dict[str, Tensor] = {}
    for shard, average in shards:
        tensors = {"weight": shard.weight}
        for key in MOMENTS:
            tensors |= _parts_of(key, shard.moments[key])
        tensors |= {} if average is None else {"average": average}
        state |= {f"{kind}:{shard.start}:{shard.name}": tensor.reshape(-1) for kind, tensor in tensors.items()}
    save_weights(state, path)


def _parts_of(key: str, moment: Tensor | Moment) -> dict[str, Tensor]:
    """A moment's tensors as files hold them, by their kinds."""
    if isinstance(moment, Moment):
        return {f"{key}_codes": moment.codes, f"{key}_scales": moment.scales}
    return {key: moment}


class ShardReader:
    """Reads all shard files of a checkpoint as one; only what is asked for is read."""

    def __init__(self, folder: Path) -> None:
        """Opens the files. Raises CheckpointError for one that is damaged."""
        self.folder = folder
        self.pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            require_file(path, CheckpointError)
            try:
                file = safe_open(path, framework="pt")
                for key in file.keys():  # noqa: SIM118 (a file, not a dictionary)
                    kind, start, name = key.split(":", 2)
                    (length,) = file.get_slice(key).get_shape()
                    self.pieces.setdefault((kind, name), []).append((int(start), length, file, key))
            except (SafetensorError, ValueError, OSError) as error:
                raise CheckpointError(f"{path}: damaged shard ({str(error)[:200]}); go back to an older one") from None

    def has(self, kind: str) -> bool:
        """Tells whether there are pieces of a kind: weight, exp_avg, exp_avg_sq, average, exp_avg_codes, ..."""
        return any(known == kind for known, _ in self.pieces)

    def read_into(self, target: Tensor, kind: str, name: str, start: int) -> None:
        """Fills `target`, any shape and float type, with elements `start`.. of a flattened parameter.

        Raises:
            CheckpointError: some are missing.
        """
        values = torch.empty(target.numel(), dtype=target.dtype)
        found = 0
        for piece_start, length, file, key in self.pieces.get((kind, name), []):
            low, high = max(start, piece_start), min(start + len(values), piece_start + length)
            if low < high:
                values[low - start : high - start] = file.get_slice(key)[low - piece_start : high - piece_start]
                found += high - low
        if found != len(values):
            raise CheckpointError(
                f"{self.folder}: {found} of {len(values)} elements of {kind} {name}; is a file missing?"
            )
        with torch.no_grad():
            target.copy_(values.view(target.shape))

    def load(self, shards: list[Shard], averages: Averages | None) -> None:
        """Reads weights, moments and averages into `shards`.

        Without averages in the files, those of `averages` start anew.

        Raises:
            CheckpointError: something is missing, or moments are to be in 8 bits and are not.
        """
        eight = any(isinstance(shard.moments[MOMENTS[0]], Moment) for shard in shards)
        if eight and not self.has(f"{MOMENTS[0]}_codes"):
            raise CheckpointError(
                f"{self.folder}: its moments are not in 8 bits, so not of train.optimizer=adamw_8bit; go on with the "
                f"optimizer that the run began with"
            )
        for shard in shards:
            self.read_into(shard.weight, "weight", shard.name, shard.start)
            for key in MOMENTS:
                for kind, part in _parts_of(key, shard.moments[key]).items():
                    self.read_into(part, kind, shard.name, shard.start)
        if averages is None:
            return
        for value, shard in zip(averages.values, averages.shards):
            kind = "average" if self.has("average") else "weight"
            self.read_into(value, kind, shard.name, shard.start)


def random_state() -> dict[str, Tensor]:
    """Reads every generator that code outside ours might draw from.

    Our own draws depend on (seed, item) alone.

    Returns:
        Tensors [N] by the generator's name: uint8 for torch's, int64 and float64 for Python's and numpy's.
    """
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


def check_random_state(state: Mapping[str, Tensor]) -> None:
    """Checks that `set_random_state` can take a state: tensors [N], uint8, int64 and float64, by name.

    Raises:
        ValueError, TypeError, OverflowError, RuntimeError: of another kind, or a state that no generator can have.
    """
    for name, own in random_state().items():
        if name == "cuda" and name not in state:
            continue
        if name not in state or state[name].dtype != own.dtype or state[name].shape != own.shape:
            raise ValueError(f"{name} is missing, or no state of this generator")
    of_python, of_numpy = _states(state)
    random.Random().setstate(of_python)
    np.random.RandomState().set_state(of_numpy)
    torch.Generator().set_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.Generator("cuda").set_state(state["cuda"])


def _states(state: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Returns the states of Python's and numpy's generators as their modules take them."""
    gauss, numpy_gauss = state["gauss"].tolist()
    place, has_gauss = state["numpy_place"].tolist()
    of_python = (3, tuple(state["python"].tolist()), None if gauss != gauss else gauss)
    return of_python, ("MT19937", state["numpy"].numpy().astype(np.uint32), place, has_gauss, numpy_gauss)


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Goes on where `random_state` was taken: tensors [N], uint8, int64 and float64, by name."""
    of_python, of_numpy = _states(state)
    random.setstate(of_python)
    np.random.set_state(of_numpy)  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
