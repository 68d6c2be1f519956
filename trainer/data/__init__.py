"""Where training images come from: shards, their manifest, and the batches made of them."""

from trainer.data.batches import check_batch, heldout_batches, train_loader
from trainer.data.manifest import Manifest
from trainer.data.mds import MDSSource
from trainer.data.mix import Mix
from trainer.data.open import open_data, open_source
from trainer.data.source import Source

__all__ = [
    "MDSSource",
    "Manifest",
    "Mix",
    "Source",
    "check_batch",
    "heldout_batches",
    "open_data",
    "open_source",
    "train_loader",
]
