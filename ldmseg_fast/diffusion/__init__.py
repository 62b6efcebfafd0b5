"""Holds the noise schedule and the samplers."""
