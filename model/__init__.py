"""DC-DiT and DiT: what is trained. No files, no processes, no global state."""

from model.config import DCDiTConfig, DiTConfig, preset
from model.dcdit import DCDiT, DCDiTOutput
from model.dit import DiT
from model.router import ratio_loss

__all__ = ["DCDiT", "DCDiTConfig", "DCDiTOutput", "DiT", "DiTConfig", "preset", "ratio_loss"]
