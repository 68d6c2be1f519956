"""From the model's space to pictures that can be looked at and measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from model.errors import UserError

if TYPE_CHECKING:  # torch is not needed to know the names
    from trainer.sampling.source import Source

LATENT_NOTE = "false colours of the VAE's latents, not photographs"
DECODED_NOTE = "photographs decoded from latents"


def to_pictures(source: Source, images, vae=None, batch: int = 8) -> tuple[list[np.ndarray], str]:
    """(n, C, H, W) in model space to n uint8 (H, W, 3) pictures, and what kind of picture they are.

    batch: latents decoded at once; a VAE's decoder takes far more memory than the model.
    """
    from trainer import pictures

    if vae is not None:
        decoded = decode(vae, images, float(source.data.get("scale") or 0.18215), batch)
        return [pictures.to_uint8(one) for one in decoded], DECODED_NOTE
    if source.latent:
        return list(pictures.false_colour(images)), LATENT_NOTE
    return list(pictures.show(images)), "pixels"


def check_finite(images, numbers) -> None:
    """Raises UserError where pictures (n, C, H, W), of these numbers, are not finite: they would be saved, and
    measured, as black ones."""
    bad = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"--checkpoint: {len(bad)} of {len(images)} pictures have values that are not finite, the first is number "
            f"{numbers[bad[0]]}: the weights have diverged, or bf16 is too narrow for them (--precision fp32)"
        )


def decode(vae, latents, scale: float, batch: int = 8):
    """Latents (n, C, h, w) in model space to pixels (n, 3, H, W) float32 on the CPU, in [-1, 1] or a little out."""
    import torch

    with torch.no_grad():
        pieces = [
            vae.decode(piece.to(vae.device, vae.dtype) / scale).sample.float().cpu()
            for piece in latents.split(batch)
        ]
    return torch.cat(pieces)
