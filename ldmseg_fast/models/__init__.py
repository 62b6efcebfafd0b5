"""Defines the networks: mask auto-encoder, image encoders, denoiser, and what the denoiser is conditioned on."""
