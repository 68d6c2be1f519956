"""The "offline" features: a fixed Gabor bank with multi-scale statistics. No weights, no randomness, no download.

It is made like the front end of a wavelet scattering network (Bruna and Mallat 2013): luminance on four octaves from
the picture's own pixels on, six orientations each; the modulus of every band, and of every band the modulus of its
coarser variations. Of these the logarithm of mean and deviation; besides, colour detail per octave, and the picture at
4 x 4 for layout and colour. The filters are formulas, so every machine has the same to rounding.

It sees blur, noise, wrong texture, colour and layout, and a wrong share of kinds of pictures. It knows no objects:
distances in it are NOT comparable with FID, only with each other, on pictures of one size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

VERSION = 1  # of the numbers: change it with anything below
OCTAVES, ORIENTATIONS, SIDE, LEAST = 4, 6, 7, 32
THUMB = 4
PAIRS = [(fine, coarse) for fine in range(OCTAVES) for coarse in range(fine + 1, OCTAVES)]
BANDS = OCTAVES * ORIENTATIONS
DIM = 2 * BANDS + len(PAIRS) * ORIENTATIONS + 2 * OCTAVES + 3 * THUMB * THUMB + 3
FLOOR = 0.01  # of what a logarithm is taken of: about two grey levels of contrast
LAYOUT = 3.0  # brings the 4 x 4 picture to the spread of the logarithms, on photographs


class GaborBank:
    """Call it with (n, 3, H, W) uint8; it gives (n, DIM) float32 on its device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.gabor = gabor_filters().to(
            self.device
        )  # (2 * ORIENTATIONS, 1, SIDE, SIDE): even ones, then odd ones
        # Opponent colours: luminance, red-green, yellow-blue.
        self.colour = torch.tensor(
            [[1 / 3, 1 / 3, 1 / 3], [0.5, -0.5, 0.0], [0.25, 0.25, -0.5]], device=self.device
        )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = enlarged(images.to(self.device)).float() / 255.0
        x = torch.einsum("oc,nchw->nohw", self.colour, x)
        pyramid = [x]
        for _ in range(OCTAVES - 1):
            pyramid.append(halved(pyramid[-1]))
        bands = [self.moduli(level[:, :1]) for level in pyramid]  # OCTAVES of (n, ORIENTATIONS, h, w)
        first = [b.mean((2, 3)) for b in bands] + [b.std((2, 3), correction=0) for b in bands]
        second = [variation(b) for b in self.coarser(bands)]
        detail = [variation(level[:, 1:]) for level in pyramid]
        spread = x.std((2, 3), correction=0)
        logs = torch.cat([*first, *second, *detail, spread], 1).add(FLOOR).log()
        thumb = F.adaptive_avg_pool2d(x, THUMB).flatten(1)
        return torch.cat([logs, LAYOUT * thumb], 1)

    def moduli(self, luminance: torch.Tensor) -> torch.Tensor:
        """(n, 1, h, w) to the local amplitude per orientation, (n, ORIENTATIONS, h, w)."""
        pad = SIDE // 2
        out = F.conv2d(F.pad(luminance, (pad,) * 4, mode="replicate"), self.gabor)
        even, odd = out.chunk(2, 1)
        return (even.square() + odd.square()).sqrt()

    @staticmethod
    def coarser(bands: list[torch.Tensor]) -> list[torch.Tensor]:
        """Every band reduced to every octave above its own, in the order of PAIRS."""
        out = []
        for fine, band in enumerate(bands):
            for _ in range(fine + 1, OCTAVES):
                band = halved(band)
                out.append(band)
        return out


def gabor_filters() -> torch.Tensor:
    """(2 * ORIENTATIONS, 1, SIDE, SIDE) float32: even and odd Gabor filters of wavelength 4 pixels, without response
    to a constant, of unit response to a sine of amplitude 1 along their own wave."""
    ring = torch.arange(SIDE, dtype=torch.float64) - SIDE // 2
    y, x = torch.meshgrid(ring, ring, indexing="ij")
    window = torch.exp(-(x.square() + y.square()) / (2 * 1.6**2))
    window = window / window.sum()
    even, odd = [], []
    for k in range(ORIENTATIONS):
        angle = math.pi * k / ORIENTATIONS
        phase = (x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / 4)
        cosine, sine = torch.cos(phase), torch.sin(phase)
        cosine = cosine - (cosine * window).sum()
        for kept, wave in ((even, cosine), (odd, sine)):
            kernel = wave * window
            kept.append(kernel / (kernel * wave).sum())
    return torch.stack(even + odd).unsqueeze(1).float()


def halved(x: torch.Tensor) -> torch.Tensor:
    """(n, c, h, w) at half the size: means of 2 x 2; what is left over at an odd edge is averaged alone."""
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


def enlarged(images: torch.Tensor) -> torch.Tensor:
    """Small pictures repeat their pixels a whole number of times, until the shorter side is at least LEAST."""
    factor = -(-LEAST // min(images.shape[2:]))
    if factor == 1:
        return images
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def variation(x: torch.Tensor) -> torch.Tensor:
    """(n, c, h, w) to (n, c): mean distance of a pixel from the average of its 3 x 3 surroundings."""
    smooth = F.avg_pool2d(F.pad(x, (1,) * 4, mode="replicate"), 3, stride=1)
    return (x - smooth).abs().mean((2, 3))
