"""The small runs of tests/distributed, started by Slurm here."""

from tests.distributed.conftest import runs, shards

__all__ = ["runs", "shards"]
