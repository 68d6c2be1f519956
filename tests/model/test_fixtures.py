"""Every stage, every output and every gradient of the released model, on its recorded runs."""

import pytest
import torch

from model import DCDiT, ops, ratio_loss
from model.weights import from_released, released_name
from tests.model.conftest import Reference

FACTOR = 10  # times the float32 noise floor measured for the release itself


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


class Run:
    """One forward and backward pass with every intermediate kept."""

    def __init__(self, name: str) -> None:
        self.reference = ref = Reference(name)
        self.model = model = DCDiT(ref.config())
        model.load_state_dict(from_released(ref.parameters()))
        mid = self.mid = {}

        def keep(name):
            return lambda module, args, out: mid.__setitem__(name, out.detach())

        model.x_embedder.register_forward_hook(keep("x_embed"))
        model.t_embedder.register_forward_hook(keep("t_embed"))
        model.y_embedder.register_forward_hook(keep("y_embed"))
        model.encoder.register_forward_hook(keep("encoder_out"))
        model.router.scorer.register_forward_hook(keep("router_logit"))
        model.backbone.blocks[0].register_forward_hook(keep("main_block0_packed"))
        model.backbone.register_forward_hook(keep("main_out_packed"))
        model.decoder.register_forward_hook(keep("decoder_out"))

        t = ref.tensors
        self.out = model(t["in/x"], t["in/t"], t["in/y"], ref.facts["tail_dropping_fraction"])
        r = self.out.routing
        group = 1 if name == "tiny16" else len(t["in/t"])
        self.ratio = ratio_loss(r.boundary_prob, r.natural, 4.0, group)
        self.loss = (self.out.sample * t["in/loss_weight"]).sum() + 0.03 * self.ratio
        self.loss.backward()
        # The release adds positions after this point, and the residual after that one.
        mid["packed_in"] = ops.gather_tokens(mid["encoder_out"], None, r.index, r.slot)
        maps = (r.natural, r.index, r.slot, r.cu_seqlens, torch.zeros_like(mid["encoder_out"]), r.grid)
        mid["dechunk_out"] = ops.dechunk(mid["main_out_packed"], r.boundary_prob.detach(), *maps, 1.0)
        mid["smoothed_packed"] = mid["dechunk_out"].flatten(0, 1)[r.index.long()]


@pytest.fixture(scope="module", params=["tiny16", "tiny32_drop03"])
def run(request):
    return Run(request.param)


def test_selection_and_packing_are_equal(run):
    t, r = run.reference.tensors, run.out.routing
    assert torch.equal(r.natural, t["out/boundary_mask_natural"].bool())
    assert torch.equal(r.retained, t["out/boundary_mask"].bool())
    assert torch.equal(r.cu_seqlens, t["out/cu_seqlens"])
    B, L = r.natural.shape
    places = t["out/chunk_idx"] + L * torch.arange(B, dtype=torch.int32)[:, None]
    assert torch.equal(r.index, places[t["out/next_mask"].bool()])
    nearest = ops.nearest(r.slot, B, *r.grid).reshape(B, L) - r.cu_seqlens[:-1, None]
    assert torch.equal(nearest, t["out/plug_back_idx"].to(nearest.dtype))
    assert sum(r.seqlens) == r.index.numel() and list(r.seqlens) == run.reference.facts["kept_counts"]


def test_every_stage_agrees(run):
    floor = run.reference.floor
    floors = {"encoder_out": floor["encoder_out_rel"], "dechunk_out": floor["dechunk_rel"]}
    # The release was measured at three places; the rest is held to the tightest of them.
    strict = min(floor["encoder_out_rel"], floor["dechunk_rel"], floor["model_output_rel"])
    recorded = [name for name in run.reference.tensors if name.startswith("mid/")]
    assert len(recorded) >= 9
    for name in recorded:
        want = run.reference.tensors[name]
        got = run.mid[name.removeprefix("mid/")].reshape(want.shape)
        limit = FACTOR * floors.get(name.removeprefix("mid/"), strict)
        assert relative(got, want) < limit, name


def test_outputs_agree(run):
    t, floor, r = run.reference.tensors, run.reference.floor, run.out.routing
    assert relative(run.out.sample, t["out/model_output"]) < FACTOR * floor["model_output_rel"]
    worst = (run.out.sample - t["out/model_output"]).abs().max().item()
    assert worst < FACTOR * floor["model_output_maxabs"]
    assert relative(r.boundary_prob, t["out/boundary_prob"]) < FACTOR * floor["encoder_out_rel"]
    selected = torch.where(r.natural, r.boundary_prob, 1 - r.boundary_prob)
    assert relative(selected, t["out/selected_probs"][..., 0]) < FACTOR * floor["encoder_out_rel"]
    assert run.ratio.item() == pytest.approx(t["out/ratio_loss"].item(), rel=1e-6)
    assert run.loss.item() == pytest.approx(t["out/loss"].item(), rel=1e-5)


def test_every_gradient_agrees(run):
    t, facts, floors = run.reference.tensors, run.reference.facts, run.reference.floor["grad_rel"]
    recorded = 0
    for name, parameter in run.model.named_parameters():
        theirs = released_name(name)
        floor = floors[theirs]
        norm = facts["grad_norms"][theirs]
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=FACTOR * floor), name
        if f"grad/{theirs}" in t:
            recorded += 1
            assert relative(parameter.grad, t[f"grad/{theirs}"]) < FACTOR * floor, name
    assert recorded == sum(name.startswith("grad/") for name in t)


def test_bfloat16_attention_stays_as_close_as_the_release_does(run):
    t, facts = run.reference.tensors, run.reference.facts
    want = t["out_bf16attn/model_output"]
    assert relative(run.out.sample, want) < 2 * facts["bf16attn_vs_fp32attn"]["model_output_rel"]


def test_double_precision_lies_closer(run):
    """The same code in float64, with the float32 selection, bounds the float32 error from the other side."""
    t, ref = run.reference.tensors, run.reference
    model = DCDiT(ref.config())
    model.load_state_dict(from_released(ref.parameters()))
    model.double()
    with torch.no_grad():
        out = model(t["in/x"].double(), t["in/t"], t["in/y"], ref.facts["tail_dropping_fraction"])
    assert torch.equal(out.routing.retained, run.out.routing.retained)
    assert relative(run.out.sample, out.sample) < FACTOR * ref.floor["model_output_rel"]
