"""Where weights come from and go to: model folders, shipped models, Stable Diffusion, published LDMSeg checkpoints."""
