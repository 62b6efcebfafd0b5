"""Defines the bottlenecks of the mask auto-encoder: what stands between encoder output and latents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Posterior:
    """Describes a diagonal Gaussian over latents (Kingma & Welling 2014), or a point where `logvar` is None.

    Attributes:
        mean, logvar: float [B, C, h, w], unscaled; logvar clamped to [-30, 20].
        loss: the bottleneck's own loss, a scalar.
    """

    mean: Tensor
    logvar: Tensor | None = None
    loss: Tensor | None = None

    def mode(self) -> Tensor:
        """Gives the most probable latents, float [B, C, h, w]."""
        return self.mean

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """Draws latents float [B, C, h, w]: mean + exp(logvar / 2) noise; the mean itself for a point."""
        if self.logvar is None:
            return self.mean
        noise = torch.randn_like(self.mean) if noise is None else noise
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Sums the KL to the standard normal over C, h, w: float [B] (Kingma & Welling 2014, appendix B)."""
        if self.logvar is None:
            return self.mean.new_zeros(self.mean.shape[0])
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


def gaussian(moments: Tensor) -> Posterior:
    """Makes a Gaussian of float [B, 2 * C, h, w]: the mean's channels, then the log-variance's (as in diffusers)."""
    mean, logvar = moments.chunk(2, dim=1)
    return Posterior(mean, logvar.clamp(-30.0, 20.0))


def point(latents: Tensor, activation: str) -> Posterior:
    """Makes a point of latents float [B, C, h, w].

    The activation is "none", "tanh", "sigmoid", "clip" to [-1, 1], or "l2" over the channels, which are options of
    LDMSeg (arXiv 2401.10227).
    """
    if activation == "tanh":
        latents = latents.tanh()
    elif activation == "sigmoid":
        latents = latents.sigmoid()
    elif activation == "clip":
        latents = latents.clamp(-1.0, 1.0)
    elif activation == "l2":
        latents = F.normalize(latents, dim=1)
    return Posterior(latents)


class Codebook(nn.Module):
    """Quantises vectors, with a straight-through gradient (van den Oord et al. 2017, equations 2 and 3)."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(size, channels).uniform_(-1.0 / size, 1.0 / size))

    def forward(self, latents: Tensor) -> Posterior:
        """Quantises latents float [B, C, h, w]: a point of the same shape."""
        flat = latents.permute(0, 2, 3, 1)  # [B, h, w, C]
        nearest = torch.cdist(flat.flatten(0, 2).float(), self.embedding.float()).argmin(dim=-1).view(flat.shape[:3])
        quantised = self.embedding[nearest].permute(0, 3, 1, 2)
        loss = F.mse_loss(quantised, latents.detach()) + 0.25 * F.mse_loss(latents, quantised.detach())
        return Posterior(latents + (quantised - latents).detach(), loss=loss)


class GumbelCodebook(nn.Module):
    """Mixes codebook entries by a Gumbel softmax (Jang et al. 2017, equation 2)."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(size, channels))

    def forward(self, logits: Tensor) -> Posterior:
        """Mixes by logits float [B, size, h, w]: a point [B, C, h, w]. In evaluation it takes the likeliest entry."""
        if self.training:
            weights = F.gumbel_softmax(logits.float(), dim=1).to(logits.dtype)
        else:
            weights = F.one_hot(logits.argmax(dim=1), logits.shape[1]).permute(0, 3, 1, 2).to(logits.dtype)
        latents = torch.einsum("bkhw,kc->bchw", weights, self.embedding.to(weights.dtype))
        log_probability = F.log_softmax(logits.float(), dim=1)
        uniform_kl = (log_probability.exp() * (log_probability + torch.tensor(logits.shape[1]).log())).sum(dim=1)
        return Posterior(latents, loss=uniform_kl.mean())
