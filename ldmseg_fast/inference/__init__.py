"""From noise to masks: sampling of a batch, inpainting, ensembles."""
