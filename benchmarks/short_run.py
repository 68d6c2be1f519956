"""A training loop of a few hundred steps on one process, for benchmarks that look inside a model while it learns."""

import torch

from model import ratio_loss
from trainer.data import train_loader

RATIO_WEIGHT = 0.03


def short_run(model, source, process, batch_size, steps, seed, lr, warmup, before_first=None):
    """Train a DC-DiT with AdamW, clipping and a linear warm-up of `warmup` steps, as trainer/loop.py does.

    Yields after every optimizer step (output of the forward pass, loss terms). before_first(model, x_t, t, y) is called
    with the first batch; by default it starts the router at its target ratio.
    """
    before_first = before_first or (lambda model, x, t, y: model.calibrate_router(x, t, y))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    loader = train_loader(source, seed=seed, global_batch_size=batch_size, end_position=batch_size * steps)
    for step, batch in enumerate(loader):
        t = process.time(batch["u"])
        x_t = process.add_noise(batch["image"], batch["noise"], t)
        if step == 0:
            before_first(model, x_t, process.model_time(t), batch["label"])
        out = model(x_t, process.model_time(t), batch["label"])
        terms = process.losses(out.sample, batch["image"], x_t, batch["noise"], t)
        ratio = ratio_loss(out.routing.boundary_prob, out.routing.natural, model.config.target_ratio)
        (terms.total.mean() + RATIO_WEIGHT * ratio).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup)
        optimizer.step()
        optimizer.zero_grad()
        yield out, terms
