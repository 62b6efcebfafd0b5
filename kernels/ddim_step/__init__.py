"""One step of the DDIM loop and the UNet's next input, in one pass."""

from ldmseg_fast.kernels.ddim_step.op import ddim_step, make_ddim_table

__all__ = ["ddim_step", "make_ddim_table"]
