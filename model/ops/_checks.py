"""Argument checks shared by all forms of the ops. Messages name the argument."""

import torch


def need(ok: bool, op: str, message: str) -> None:
    if not ok:
        raise ValueError(f"{op}: {message}")


def shape(op: str, name: str, tensor: torch.Tensor, want: tuple) -> None:
    """`want` may hold None for "any"."""
    got = tuple(tensor.shape)
    ok = len(got) == len(want) and all(w is None or g == w for g, w in zip(got, want, strict=True))
    if not ok:
        text = ", ".join("any" if w is None else str(w) for w in want)
        raise ValueError(f"{op}: {name} has shape {got}, expected ({text})")


def dtype(op: str, name: str, tensor: torch.Tensor, *want: torch.dtype) -> None:
    if tensor.dtype not in want:
        raise ValueError(f"{op}: {name} is {tensor.dtype}, expected {' or '.join(map(str, want))}")


def same_device(op: str, **tensors: torch.Tensor) -> None:
    (first, anchor), *rest = tensors.items()
    for name, tensor in rest:
        if tensor.device != anchor.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {first} is on {anchor.device}")
