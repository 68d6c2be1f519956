"""Where training images come from: MDS shards, their manifest, and the batches made of them."""

from trainer.data.batches import check_batch, heldout_batches, train_loader
from trainer.data.manifest import Manifest
from trainer.data.mds import MDSSource, open_source

__all__ = ["MDSSource", "Manifest", "check_batch", "heldout_batches", "open_source", "train_loader"]
