"""Reads which share of the learning rate each parameter has; 0 freezes it."""

from __future__ import annotations

from collections.abc import Mapping

from ldmseg_fast.config import Config
from ldmseg_fast.errors import ConfigError


def rate_factors(config: Config) -> dict[str, float]:
    """Returns factors on `train.learning_rate` by the prefix of parameters' names.

    They are those of `train.image_encoder_lr`, which is for what is pre-trained where the encoder has such a network,
    and `train.lr_factors`, which win.

    Raises:
        ConfigError: a factor that is no number.
    """
    train = config.train
    factors = {}
    if train.image_encoder_lr != 1.0:
        factors["image_vae.network." if config.image_encoder.is_pyramid else "image_vae."] = train.image_encoder_lr
    for item in train.lr_factors:
        prefix, _, value = item.partition(":")
        try:
            factors[prefix] = float(value)
        except ValueError:
            raise ConfigError(f"train.lr_factors: {item!r} is not PREFIX:NUMBER, such as unet.conv_in:10") from None
    return factors


def factor_of(name: str, factors: Mapping[str, float]) -> float:
    """Returns the factor of the longest prefix that a parameter's `name` has, 1 without any."""
    matching = [prefix for prefix in factors if name.startswith(prefix)]
    return factors[max(matching, key=len)] if matching else 1.0
