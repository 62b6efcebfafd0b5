"""Networks: mask auto-encoder, image encoders, denoiser."""
