"""Says where weights come from and go to.

`model_folder` is the format, on top of `tensors`; `shipped` finds models by name, `hub` those of the Hugging Face Hub,
and `hub_push` sends them there; `init_from` takes starting weights from a folder of ours or Stable Diffusion's
(`diffusers_folder`); `original` reads published LDMSeg checkpoints, through `safe_pickle`.
"""
