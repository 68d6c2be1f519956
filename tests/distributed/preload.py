"""Imported by the server of tests/distributed/processes.py: what every process of a run needs, and nothing that starts
a thread."""

import contextlib
import gc

import torch.distributed.checkpoint.state_dict  # noqa: F401
import torch.distributed.fsdp  # noqa: F401

import tests.distributed.processes  # noqa: F401
import trainer.loop  # noqa: F401
import trainer.parallel.ddp  # noqa: F401
import trainer.parallel.fsdp  # noqa: F401
import trainer.train  # noqa: F401
from model.errors import UserError
from trainer.data.mds import import_streaming
from trainer.parallel.deepspeed import import_deepspeed

for get in (import_streaming, import_deepspeed):
    with contextlib.suppress(UserError):
        get()
with contextlib.suppress(ImportError):
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (ZeRO asks for it, and it for torch's compiler)
gc.freeze()  # the processes that are forked collect their own garbage, not all this
