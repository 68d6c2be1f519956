"""Attention stays inside each sequence, whichever kernel computes it; the choice of kernel explains itself."""

import sys
import types
from itertools import pairwise

import pytest
import torch

from model import attention
from model.attention import attend, choose, compute_dtype, survey
from model.errors import UserError
from tests.model.conftest import batch, tiny_dcdit


def dense_reference(qkv, cu_seqlens):
    """Plain softmax over a block-diagonal mask, in float64."""
    q, k, v = qkv.double().unbind(1)
    rows = torch.arange(qkv.shape[0])
    owner = torch.bucketize(rows, cu_seqlens[1:], right=True)
    scores = torch.einsum("ink,jnk->nij", q, k) / qkv.shape[-1] ** 0.5
    scores = scores.masked_fill(owner[:, None] != owner[None, :], float("-inf"))
    return torch.einsum("nij,jnk->ink", scores.softmax(-1), v)


@pytest.mark.parametrize("seqlens", [(2, 9, 5), (4, 4, 4), (7,), (2, 2)])
def test_sdpa_is_block_diagonal_attention(seqlens):
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, *torch.tensor(seqlens).cumsum(0)], dtype=torch.int32)
    qkv = torch.randn(sum(seqlens), 3, 2, 8, requires_grad=True)
    grad = torch.randn(sum(seqlens), 2, 8)
    want = dense_reference(qkv, cu_seqlens)
    (want_grad,) = torch.autograd.grad(want, qkv, grad.double())
    got = attend(qkv, cu_seqlens, 16, seqlens, "sdpa")
    torch.testing.assert_close(got, want.float())
    torch.testing.assert_close(torch.autograd.grad(got, qkv, grad)[0], want_grad.float())


def test_uniform_needs_no_host_lengths():
    qkv = torch.randn(12, 3, 2, 8)
    cu_seqlens = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    got = attend(qkv, cu_seqlens, 4, None, "flash2", uniform=4)
    torch.testing.assert_close(got, dense_reference(qkv, cu_seqlens).float())


def test_cpu_takes_sdpa_and_says_why_not_the_others():
    choice = choose("auto", "cpu", torch.bfloat16, 64)
    assert choice.name == "sdpa" and choice.usable
    listed = survey("cpu", torch.float32, 64)
    assert [c.name for c in listed] == ["flash3", "flash2", "torch_varlen", "sdpa"]
    assert [c.usable for c in listed] == [False, False, False, True]
    assert all("cpu" in c.why for c in listed[:-1])


@pytest.mark.parametrize("name", attention.KERNELS)
def test_a_backend_that_is_not_there_names_the_mend(name):
    with pytest.raises(UserError, match=f"attention_backend={name}.*attention_backend=auto"):
        choose(name, "cpu", torch.bfloat16, 64)
    with pytest.raises(UserError, match="attention_backend='best'"):
        choose("best", "cpu", torch.bfloat16, 64)


@pytest.fixture
def pretend_gpu(monkeypatch):
    """The facts of an Ampere GPU, and no memory of earlier choices."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "pretend")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(attention, "_KERNELS", {})
    for cached in (attention._problem, attention._choose):
        cached.cache_clear()
    yield
    for cached in (attention._problem, attention._choose):
        cached.cache_clear()


def test_gpu_reasons_come_before_any_import(pretend_gpu):
    reasons = {c.name: c.why for c in survey("cuda:0", torch.float32, 64)}
    assert all("bf16 or fp16" in reasons[name] for name in attention.KERNELS)
    assert choose("auto", "cuda:0", torch.float32, 64).name == "sdpa"
    reasons = {c.name: c.why for c in survey("cuda:0", torch.bfloat16, 30)}
    assert all("multiple of 8" in reasons[name] for name in attention.KERNELS)


def test_missing_and_failing_libraries_are_told_apart(pretend_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # import fails
    reasons = {c.name: c.why for c in survey("cuda:0", torch.bfloat16, 64)}
    assert "Hopper" in reasons["flash3"]
    assert "cannot be imported" in reasons["flash2"] and "pip install" in reasons["flash2"]
    assert "fails on this GPU" in reasons["torch_varlen"]  # there is none to run the trial on
    assert choose("auto", "cuda:0", torch.bfloat16, 64).name == "sdpa"
    with pytest.raises(UserError, match="pip install"):
        choose("flash2", "cuda:0", torch.bfloat16, 64)


@pytest.mark.parametrize("library, name", [("flash_attn_interface", "flash3"), ("flash_attn", "flash2")])
def test_varlen_kernels_get_the_ragged_batch(pretend_gpu, monkeypatch, library, name):
    """A stand-in library sees the arguments that the real ones take; a tuple answer is unpacked."""
    seen = {}

    def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options):
        seen.update(options, max=(max_q, max_k), cu=(cu_q, cu_k))
        out = dense_reference(torch.stack([q, k, v], 1), cu_q).to(q.dtype)
        return (out, None) if name == "flash3" else out

    module = types.ModuleType(library)
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, library, module)
    qkv = torch.randn(11, 3, 2, 8)
    cu_seqlens = torch.tensor([0, 2, 11], dtype=torch.int32)
    got = attend(qkv, cu_seqlens, 64, None, name)
    torch.testing.assert_close(got, dense_reference(qkv, cu_seqlens).float())
    assert seen["max"] == (64, 64) and seen["cu"] == (cu_seqlens, cu_seqlens) and "deterministic" not in seen
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    attend(qkv, cu_seqlens, 64, None, name)
    assert seen["deterministic"] is True


def test_torchs_varlen_takes_the_seven_arguments_we_give():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    import inspect

    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_dtype_follows_autocast():
    assert compute_dtype("cpu", torch.float32) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype("cpu", torch.float32) == torch.bfloat16


def test_a_compiled_block_is_not_compiled_again_for_new_lengths():
    """The bound on the lengths is constant and the host lengths stay out of the graph."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model = tiny_dcdit(depth=1)
    data = [batch(model.config, 3, seed=s) for s in range(6)]
    with torch.no_grad():
        want = [model(*d) for d in data]
    assert len({w.routing.seqlens for w in want}) == 6
    counter, compiled = CompileCounterWithBackend("eager"), []
    torch._dynamo.reset()
    model.backbone.blocks[0].compile(backend=counter)
    with torch.no_grad():
        for d, w in zip(data, want, strict=True):
            torch.testing.assert_close(model(*d).sample, w.sample)
            compiled.append(counter.frame_count)
    # Once for the first T, once more when T turns out to vary, never again.
    assert compiled[0] > 0 and len(set(compiled[1:])) == 1


@pytest.fixture(scope="module")
def varlen_on_cpu():
    """torch's own varlen op with a CPU kernel, forward and backward: what surrounds it runs and compiles here."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 or newer")

    @varlen._varlen_attn.register_kernel("cpu")
    def _(query, key, value, cu_seq_q, *_):
        out = dense_reference(torch.stack([query, key, value], 1), cu_seq_q).to(query.dtype)
        return out, query.new_zeros(query.shape[1::-1], dtype=torch.float), torch.zeros(2, dtype=torch.uint64)

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def _(grad_out, query, key, value, out, lse, cu_seq_q, *_):
        tensors = (query, key, value, grad_out)
        grads = [
            _gradients(*(x[a:b].double().transpose(0, 1) for x in tensors))
            for a, b in pairwise(cu_seq_q.tolist())
        ]
        return tuple(torch.cat(few).to(query.dtype) for few in zip(*grads, strict=True))


def _gradients(q, k, v, grad):
    """Of softmax(q k' / sqrt(K)) v of one sequence, by hand (no autograd inside an op): (N, n, K) -> (n, N, K) each."""
    p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    dp = grad @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    return [x.transpose(0, 1) for x in (ds @ k, ds.mT @ q, p.mT @ grad)]


@pytest.mark.parametrize("head_dim", [32, 72])
def test_the_trial_takes_a_right_kernel_and_no_wrong_one(varlen_on_cpu, monkeypatch, head_dim):
    monkeypatch.setattr(attention, "_KERNELS", {})
    device = torch.device("cpu")
    assert attention.trial("torch_varlen", device, head_dim) < 0.02
    right = attention._KERNELS["torch_varlen"]

    class Halved(torch.autograd.Function):
        """A right answer with a wrong gradient."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    def off_by_a_token(q, k, v, *rest):
        return right(q, k, v.roll(1, 0), *rest)

    wrong = [lambda *a: Halved.apply(right(*a)), off_by_a_token, lambda *a: right(*a) * torch.nan]
    for kernel in wrong:
        monkeypatch.setitem(attention._KERNELS, "torch_varlen", kernel)
        assert attention.trial("torch_varlen", device, head_dim) > 0.1
    with torch.inference_mode():  # sampling may be what asks first
        monkeypatch.setitem(attention._KERNELS, "torch_varlen", right)
        assert attention.trial("torch_varlen", device, head_dim) < 0.02


def test_attention_through_a_library_is_one_compiled_graph(varlen_on_cpu, monkeypatch):
    """As parallel.compile does it on a GPU: an import or a cache inside `attend` would break the graph."""
    monkeypatch.setattr(attention, "_KERNELS", {})
    attention.trial("torch_varlen", torch.device("cpu"), 8)  # what `choose` does on a GPU
    compiled = torch.compile(attend, backend="aot_eager", dynamic=True, fullgraph=True)
    for tokens in (11, 14, 23):
        qkv = torch.randn(tokens, 3, 2, 8, requires_grad=True)
        cu_seqlens = torch.tensor([0, 4, tokens], dtype=torch.int32)
        got = compiled(qkv, cu_seqlens, 64, None, "torch_varlen")
        want = dense_reference(qkv, cu_seqlens).float()
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(out.square().sum(), qkv)[0] for out in (got, want)]
        torch.testing.assert_close(*grads)
