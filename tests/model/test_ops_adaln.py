"""adaLN ops: every form against the formula in float64, padding rows, strides, same bits, compile, bad input."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from model.ops import add_gated, available, modulate, resolve

ROOT = Path(__file__).parents[2]
FORMS = [f for f in ("torch", "native", "triton") if f == "torch" or available()[f]]
NARROW = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

# lengths of the images, rows of padding, D
SHAPES = [((1,), 0, 1), ((2, 3), 0, 33), ((70, 2, 190), 5, 300), ((5, 0, 4), 2, 16), ((129,) * 3, 64, 128)]
CASES = [(f, s, x, y) for f in FORMS if f != "triton" for s in SHAPES for x in NARROW for y in NARROW]
if "triton" in FORMS:  # interpreted, a program takes milliseconds
    for s in [((1,), 0, 1), ((5, 0, 4), 2, 16), ((30, 2, 17), 5, 140)]:
        CASES += [("triton", s, NARROW[i], NARROW[j]) for i, j in ((0, 0), (0, 1), (1, 1), (2, 0))]


def inputs(lengths, padding, D, x_dtype, other_dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), sum(lengths) + padding
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    vectors = torch.randn(B, 3 * D, generator=g).to(other_dtype)
    x, y = torch.randn(T, D, generator=g).to(x_dtype), torch.randn(T, D, generator=g).to(other_dtype)
    x[T - padding :] = 0  # as the ops leave it
    return x, vectors.requires_grad_(), y, cu_seqlens


def formula(x, vectors, y, cu_seqlens):
    """Both ops in float64, the plain way."""
    shift, scale, gate = vectors.chunk(3, dim=-1)
    outs = []
    for b, (first, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        outs.append((x[first:end] * (1 + scale[b]) + shift[b], x[first:end] + gate[b] * y[first:end]))
    pad = x[int(cu_seqlens[-1]) :]
    return torch.cat([a for a, _ in outs] + [pad * 0]), torch.cat([b for _, b in outs] + [pad])


def run(form, x, vectors, y, cu_seqlens, dtype=None):
    shift, scale, gate = vectors.chunk(3, dim=-1)  # views with rows 3D apart
    a = modulate(x, shift, scale, cu_seqlens, dtype=dtype, backend=form)
    return a, add_gated(x, gate, y, cu_seqlens, backend=form)


@pytest.mark.parametrize("form, shape, x_dtype, other_dtype", CASES, ids=str)
def test_values_and_gradients_against_the_formula(form, shape, x_dtype, other_dtype):
    x, vectors, y, cu_seqlens = inputs(*shape, x_dtype, other_dtype)
    leaves = [x.requires_grad_(), vectors, y.requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got = run(form, *leaves, cu_seqlens)
    want = formula(*exact, cu_seqlens)
    assert got[0].dtype == torch.promote_types(x_dtype, other_dtype) and got[1].dtype == x_dtype
    grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(7)).to(o.dtype) for o in got]
    used = int(cu_seqlens[-1])
    for grad in grads:
        grad[used:] = 0
    ours = torch.autograd.grad(got, leaves, grads)
    theirs = torch.autograd.grad(want, exact, [g.double() for g in grads])
    for one, two in zip([*got, *ours], [*want, *theirs], strict=True):
        tolerance = TOLERANCE[one.dtype]
        # Two rounded terms meet in the gradient of x; sums over rows are judged by their largest value.
        atol = 2 * tolerance * max(1.0, float(two.detach().abs().max()) if two.numel() else 1.0)
        torch.testing.assert_close(one.double(), two, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_no_image_are_inert(form):
    """Zero out of modulate, passed on by add_gated, and their gradient reaches nothing."""
    x, vectors, y, cu_seqlens = inputs((3, 6), 4, 20, torch.float32, torch.float32)
    leaves = [x.requires_grad_(), vectors, y.requires_grad_()]
    a, b = run(form, *leaves, cu_seqlens)
    assert not a[9:].any() and torch.equal(b[9:], x[9:])
    da = torch.autograd.grad(a[9:].sum(), leaves[:2])
    assert not any(g.any() for g in da)
    dx, dvectors, dy = torch.autograd.grad(b[9:].sum(), leaves)
    assert bool((dx[9:] == 1).all()) and not dx[:9].any() and not dvectors.any() and not dy.any()


@pytest.mark.parametrize("form", [f for f in FORMS if f != "torch"])
def test_garbage_on_rows_of_no_image_is_not_read(form):
    x, vectors, y, cu_seqlens = inputs((3, 6), 4, 20, torch.float32, torch.float32)
    x[9:] = y[9:] = torch.nan
    leaves = [x.requires_grad_(), vectors, y.requires_grad_()]
    a, b = run(form, *leaves, cu_seqlens)
    grad = torch.full_like(a, torch.nan)
    grad[:9] = 1
    grads = [*torch.autograd.grad(a, leaves[:2], grad), *torch.autograd.grad(b, leaves, grad)[1:]]
    assert all(torch.isfinite(t).all() for t in (a, *grads))


@pytest.mark.parametrize("form", FORMS)
def test_the_output_may_be_narrower_than_the_input(form):
    x, vectors, y, cu_seqlens = inputs((30, 7), 3, 40, torch.float32, torch.float32)
    wide, narrow = (run(form, x, vectors, y, cu_seqlens, d)[0] for d in (None, torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("form", FORMS)
def test_two_runs_give_the_same_bits_whatever_the_threads(form):
    lengths, D = ((60, 33), 130) if form == "triton" else ((600, 33, 301), 600)
    x, vectors, y, cu_seqlens = inputs(lengths, 9, D, torch.float32, torch.bfloat16)
    leaves, results, before = [x.requires_grad_(), vectors, y.requires_grad_()], [], torch.get_num_threads()
    try:
        for threads in (1, 1, 2) if form == "native" else (1, 1):
            torch.set_num_threads(threads)
            outs = run(form, *leaves, cu_seqlens)
            results.append([*outs, *torch.autograd.grad(outs, leaves, [o.detach().sin() for o in outs])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_float64_takes_the_exact_form():
    x, vectors, y, cu_seqlens = inputs((4, 2), 0, 6, torch.float64, torch.float64)
    vectors = vectors.detach().requires_grad_()
    leaves = [x.requires_grad_(), vectors, y.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *t: run("auto", *t, cu_seqlens), leaves)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "torch"])
def test_opcheck(form):
    ops = torch.ops.dcdit if form == "native" else torch.ops.dcdit_triton
    x, vectors, y, cu_seqlens = inputs((4, 3), 2, 12, torch.float32, torch.bfloat16)
    x.requires_grad_(), y.requires_grad_()
    shift, scale, gate = (v.detach().requires_grad_() for v in vectors.chunk(3, dim=-1))
    torch.library.opcheck(ops.modulate, (x, shift, scale, cu_seqlens, torch.bfloat16))
    torch.library.opcheck(ops.add_gated, (x, gate, y, cu_seqlens))
    grad = torch.randn(9, 12)
    torch.library.opcheck(ops.modulate_backward, (grad, x.detach(), scale.detach(), cu_seqlens))
    torch.library.opcheck(ops.add_gated_backward, (grad, gate.detach(), y.detach(), cu_seqlens))


@pytest.mark.parametrize("form", FORMS)
def test_compiles_as_one_graph(form):
    def path(x, vectors, y, cu_seqlens):
        return run(form, x, vectors, y, cu_seqlens)

    compiled = torch.compile(path, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in (((4, 3), 2, 16), ((2, 9), 5, 16)):
        x, vectors, y, cu_seqlens = inputs(*shape, torch.float32, torch.float32)
        leaves = [x.requires_grad_(), vectors, y.requires_grad_()]
        results = []
        for function in (compiled, path):
            outs = function(*leaves, cu_seqlens)
            results.append([*outs, *torch.autograd.grad(outs, leaves, [torch.ones_like(o) for o in outs])])
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_is_named(form):
    x, vectors, y, cu_seqlens = inputs((4, 3), 0, 8, torch.float32, torch.float32)
    shift, scale, gate = vectors.chunk(3, dim=-1)
    for name, call in [
        ("x has shape", lambda: modulate(x[0], shift, scale, cu_seqlens, backend=form)),
        ("shift has shape", lambda: modulate(x, shift[:1], scale, cu_seqlens, backend=form)),
        ("scale has shape", lambda: modulate(x, shift, scale[:, :3], cu_seqlens, backend=form)),
        ("cu_seqlens is torch.int64", lambda: modulate(x, shift, scale, cu_seqlens.long(), backend=form)),
        ("y has shape", lambda: add_gated(x, gate, y[:3], cu_seqlens, backend=form)),
        ("gate has shape", lambda: add_gated(x, gate[:1], y, cu_seqlens, backend=form)),
    ]:
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.skipif("native" not in FORMS, reason="the native ops are not built")
def test_native_refuses_maps_that_would_touch_foreign_memory():
    x, vectors, y, cu_seqlens = inputs((4, 3), 0, 8, torch.float32, torch.float32)
    shift, scale, gate = vectors.chunk(3, dim=-1)
    ops = torch.ops.dcdit
    for wrong in ([0, 4, 8], [-1, 4, 7], [0, 5, 4], [1, 4, 7]):
        wrong = torch.tensor(wrong, dtype=torch.int32)
        with pytest.raises(ValueError, match="cu_seqlens must ascend"):
            ops.modulate(x, shift, scale, wrong, torch.float32)
        with pytest.raises(ValueError, match="cu_seqlens must ascend"):
            ops.add_gated_backward(x, gate, y, wrong)


def test_a_backend_without_a_form_of_the_op_leaves_it_to_auto(monkeypatch):
    from model.ops import _native, triton

    monkeypatch.setattr(_native, "SERVES", dict.fromkeys(_native.OPS[:5], ("cpu", "cuda")))
    monkeypatch.setattr(triton, "_REASON", None)
    assert (
        resolve("native", "cuda", "select") == "native" and resolve("native", "cuda", "modulate") == "triton"
    )
    assert resolve("triton", "cuda", "select") == "native" and resolve("auto", "cuda", "modulate") == "triton"
    monkeypatch.setattr(triton, "_REASON", "not there")
    assert resolve("auto", "cuda", "modulate") == resolve("native", "cuda", "add_gated") == "torch"


@pytest.mark.parametrize("target", [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)], ids=str)
def test_triton_kernels_compile_for_gpus_that_are_not_here(target):
    triton = pytest.importorskip("triton", reason="triton is not installed (pip install triton==3.7.1)")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model.ops.triton import adaln

    if "triton" in FORMS:
        pytest.skip("the interpreter has taken the place of the compiler")
    types = {"cu": "*i32", "shifts": "*fp32", "scales": "*fp32", "sums": "*fp32", "y": "*bf16"}
    for kernel in (adaln._modulate, adaln._modulate_backward, adaln._add_gated, adaln._add_gated_backward):
        names = kernel.arg_names
        numbers = [n for n in names if n in ("images", "T", "D", "parts") or n.startswith("s_")]
        signature = {n: "i32" if n in numbers else types.get(n, "*fp32") for n in names}
        signature |= dict.fromkeys("RC", "constexpr")
        source = ASTSource(kernel, signature, {"R": adaln.ROWS, "C": adaln.BLOCK})
        assert triton.compile(source, target=GPUTarget(*target)).asm


def test_triton_kernels_in_the_interpreter():
    """This file once more, with the Triton kernels run on CPU tensors."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install triton==3.7.1)")
    if "triton" in FORMS:
        pytest.skip("the other tests have run them")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]
