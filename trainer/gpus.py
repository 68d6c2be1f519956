"""GPUs by their data sheets: what `dcdit plan` reckons with, and the peak that MFU is a share of.

Sources: the vendors' data sheets named here, compared in November 2026 with the tables of
github.com/stas00/ml-engineering (compute/accelerator, network), which quote them. Peaks are dense, half of what sheets
give with sparsity.
    A100    NVIDIA A100 data sheet: 312 TFLOPS, 2039 GB/s (80 GB SXM), NVLink 600 GB/s in both directions together;
            DGX A100: 8 x 200 Gb/s
    H100    NVIDIA H100 data sheet (SXM): 989 TFLOPS, 3.35 TB/s, NVLink 900 GB/s; DGX H100: 8 x 400 Gb/s
    H200    NVIDIA H200 data sheet (SXM): 141 GB, 4.8 TB/s, the rest as H100
    B200    DGX B200 data sheet: 1440 GB, 64 TB/s and 14.4 TB/s of NVLink for eight, 8 x 400 Gb/s; HGX B200: 2250 TFLOPS
    MI250X  AMD product page: 383 TFLOPS, 128 GB, 3.28 TB/s for two dies, each a device of its own; ROCm's "MI250
            microarchitecture": 50 GB/s a link; 200 Gb/s for a module, as Frontier has it
    MI300X  AMD data sheet: 1307 TFLOPS, 192 GB, 5.3 TB/s, 7 links of 128 GB/s in both directions together
    MI325X  AMD data sheet: 256 GB, 6 TB/s, the rest as MI300X
    MI355X  AMD data sheet: 2.5 PFLOPS (1024 matrix cores x 512 FMA x 2.4 GHz = 2517), 288 GB, 8 TB/s, 7 links of
            153.6 GB/s; AMD's platforms have 400 Gb/s a GPU, here as with the other two
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """memory in GB (1e9); dense bf16 peak in TFLOP/s; bandwidth of the memory, link to the other GPUs of the node and
    the node's network per GPU, each in GB/s and one direction. device: pattern of the name that torch gives it. mesh:
    `link` is the sum of one direct link to each of seven others; else all of it reaches any of them."""

    name: str
    device: str
    memory: float
    tflops: float
    bandwidth: float
    link: float
    network: float
    mesh: bool = False


# Cards of the same name with other clocks (PCIe, NVL; GH200, GB200) are none of these.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", r"A100", 80, 312, 2039, 300, 25),
        Gpu("h100", r"H100(?! PCIe| NVL)", 80, 989, 3350, 450, 50),
        Gpu("h200", r"H200(?! NVL)", 141, 989, 4800, 450, 50),
        Gpu("b200", r"B200", 180, 2250, 8000, 900, 50),
        # One of its two dies. A ring over all of them runs over single links somewhere, the slowest there are.
        Gpu("mi250x", r"MI250X?", 64, 191.5, 1638, 50, 12.5),
        Gpu("mi300x", r"MI300X", 192, 1307, 5300, 448, 50, mesh=True),
        Gpu("mi325x", r"MI325X", 256, 1307, 6000, 448, 50, mesh=True),
        Gpu("mi355x", r"MI355X", 288, 2517, 8000, 538, 50, mesh=True),
    )
}


def peak_tflops(device: str) -> float | None:
    """The dense bf16 peak, TFLOP/s, of the device that torch calls `device`; None for one that is not listed."""
    return next((gpu.tflops for gpu in GPUS.values() if re.search(rf"\b{gpu.device}\b", device)), None)
