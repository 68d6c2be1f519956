"""Shapes and gradients of the adaLN ops, the same for every library that registers their schemas."""

import torch


def register_adaln(namespace: str) -> None:
    """Fakes and gradients of NAMESPACE::modulate, ::add_gated and their backward ops, which must exist."""
    _register_fakes(namespace)
    ops = getattr(torch.ops, namespace)

    def modulate_setup(ctx, inputs, output):
        x, shift, scale, cu_seqlens, _ = inputs
        ctx.save_for_backward(x, scale, cu_seqlens)
        ctx.dtypes = shift.dtype, scale.dtype

    def modulate_backward(ctx, grad):
        dx, dshift, dscale = ops.modulate_backward(grad, *ctx.saved_tensors)
        return dx, dshift.to(ctx.dtypes[0]), dscale.to(ctx.dtypes[1]), None, None

    def add_gated_setup(ctx, inputs, output):
        _, gate, y, cu_seqlens = inputs
        ctx.save_for_backward(gate, y, cu_seqlens)

    def add_gated_backward(ctx, grad):
        gate, y, cu_seqlens = ctx.saved_tensors
        dy, dgate = ops.add_gated_backward(grad, gate, y, cu_seqlens)
        return grad, dgate.to(gate.dtype), dy, None

    register = torch.library.register_autograd
    register(f"{namespace}::modulate", modulate_backward, setup_context=modulate_setup)
    register(f"{namespace}::add_gated", add_gated_backward, setup_context=add_gated_setup)


def _register_fakes(namespace: str) -> None:
    @torch.library.register_fake(f"{namespace}::modulate")
    def _(x, shift, scale, cu_seqlens, dtype):
        return x.new_empty(x.shape, dtype=dtype)

    @torch.library.register_fake(f"{namespace}::modulate_backward")
    def _(grad, x, scale, cu_seqlens):
        sums = [x.new_empty(scale.shape, dtype=torch.float32) for _ in range(2)]
        return x.new_empty(x.shape), *sums

    @torch.library.register_fake(f"{namespace}::add_gated")
    def _(x, gate, y, cu_seqlens):
        return x.new_empty(x.shape)

    @torch.library.register_fake(f"{namespace}::add_gated_backward")
    def _(grad, gate, y, cu_seqlens):
        return y.new_empty(y.shape), y.new_empty(gate.shape, dtype=torch.float32)
