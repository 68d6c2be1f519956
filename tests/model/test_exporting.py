"""One denoising step by `torch.export`: the same numbers as the model in capacity packing, after a trip through a
file, for any batch."""

import json
import math

import pytest
import torch
from safetensors import SafetensorError

from model import pretrained
from model.errors import UserError
from model.exporting import export_step, usual_capacity
from model.ops import resolve
from tests.model.conftest import batch, tiny_dcdit, tiny_dit


def reload(program, tmp_path):
    file = tmp_path / "step.pt2"
    torch.export.save(program, file)
    return torch.export.load(file).module()


def names(program) -> set[str]:
    """Everything that the program calls; what runs without autocast is in graphs of its own."""
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("backend, size", [("auto", (8, 8)), ("torch", (6, 10))])
def test_reloaded_program_gives_the_models_numbers(tmp_path, backend, size):
    """With room for every token that is retained, and without; for any batch."""
    model = tiny_dcdit(ops_backend=backend, input_size=size, depth=1).eval()
    program = export_step(model, capacity=0.2)
    native = {f"dcdit.{op}.default" for op in ("select", "limit", "gather_tokens", "dechunk")}
    if resolve(backend) == "native":
        assert native <= names(program), "native ops stay calls of ops"
    else:
        assert not native & names(program)
    assert "dcdit_attention.by_sequence.default" in names(program)
    step, rows = reload(program, tmp_path), math.ceil(0.2 * math.prod(size))
    for images, rho in ((1, 0.0), (2, 0.0), (5, 0.7), (5, 0.0)):
        x, t, y = batch(model.config, images, seed=images)
        drop = torch.full((images,), rho)
        with torch.no_grad():
            sample, retained, overflow = step(x, t.float(), y, drop)
            want, exact = model(x, t, y, drop, capacity=0.2), model(x, t, y, drop)
        torch.testing.assert_close(sample, want.sample, rtol=1e-5, atol=1e-5)
        assert torch.equal(retained, want.routing.retained.sum(1)) and overflow == want.routing.overflow
        assert want.routing.index.shape == (images * rows,) and want.routing.seqlens is None
        assert int(overflow) == max(0, int(exact.routing.retained.sum()) - images * rows)
        if rho:
            assert overflow == 0
            torch.testing.assert_close(sample, exact.sample, rtol=1e-4, atol=1e-5)
    assert overflow > 0


def test_the_baseline_gives_all_its_tokens(tmp_path):
    model = tiny_dit(depth=1).eval()
    step = reload(export_step(model), tmp_path)
    for images in (1, 3):
        x, t, y = batch(model.config, images)
        with torch.no_grad():
            sample, tokens, overflow = step(x, t.float(), y, torch.zeros(images))
            torch.testing.assert_close(sample, model(x, t, y).sample, rtol=1e-5, atol=1e-5)
        assert tokens.tolist() == [16] * images and overflow == 0


def test_capacity_of_a_forward_pass():
    """Asked for by argument, in either mode, whatever the config's packing; left alone otherwise."""
    model = tiny_dcdit()
    x, t, y = batch(model.config, 2)
    with torch.no_grad():
        for mode in (True, False):
            assert model.train(mode)(x, t, y, capacity=0.6).routing.index.shape == (2 * 39,)
            assert model(x, t, y).routing.seqlens is not None
        for wrong in (0.0, 1.5):
            with pytest.raises(ValueError, match="capacity"):
                model(x, t, y, capacity=wrong)
    assert usual_capacity(model.config) == 0.5


def test_wrong_numbers():
    model = tiny_dcdit()
    for words, match in [
        ({"capacity": 0.0}, "capacity"),
        ({"capacity": 2.0}, "capacity"),
        ({"batch": 0}, "batch"),
    ]:
        with pytest.raises(UserError, match=match):
            export_step(model, **words)
    assert model.training
    with pytest.raises(UserError, match="DyDiT decides"):
        export_step(tiny_dcdit(dydit=0.5))


def test_a_disk_that_runs_full_leaves_the_export_that_was_there(tmp_path, monkeypatch, capsys):
    """What the libraries raise then, in their own words."""
    from tests.trainer.synthetic_run import export, tiny_model
    from trainer import cli

    source, to, step = export(tmp_path / "weights", tiny_model()), tmp_path / "to", tmp_path / "step.pt2"
    words = ["export", str(source), "--overwrite"]
    assert cli.main([*words, "--to", str(to)]) == 0
    step.write_bytes(b"a good program")
    other = export(
        tmp_path / "weights", tiny_model(seed=1), data={"kind": "pixels", "class_names": ["other"]}
    )
    before = {file.name: file.read_bytes() for file in to.iterdir()}

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def broken(*_, **__):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(pretrained, "save_file", full)
    monkeypatch.setattr(torch.export, "save", broken)
    assert other == source and cli.main([*words, "--to", str(to)]) == 2
    assert f"--to: cannot write {to}: No space left on device" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in to.iterdir()} == before
    assert cli.main([*words, "--torch-export", str(step)]) == 2
    assert f"--torch-export: cannot write {step}: basic_ios" in capsys.readouterr().err
    assert step.read_bytes() == b"a good program"


def test_command_writes_a_program_that_says_what_it_is(tmp_path, capsys):
    from tests.trainer.synthetic_run import export, tiny_model
    from trainer import cli

    model = tiny_model().eval()
    folder, file = export(tmp_path / "weights", model), tmp_path / "step.pt2"
    words = ["--capacity", "0.75", "--batch", "1", "--precision", "bf16"]
    assert cli.main(["export", str(folder), "--torch-export", str(file), *words]) == 0
    extra = {"dcdit.json": ""}
    step = torch.export.load(file, extra_files=extra).module()
    about = json.loads(extra["dcdit.json"])
    assert (about["capacity"], about["batch"], about["precision"]) == (0.75, 1, "bf16")
    assert about["model"] == "DCDiT" and about["run"]["images"] == 640
    x, t, y = batch(model.config, 1)
    with torch.no_grad():
        got = step(x, t.float(), y, torch.zeros(1))[0]
        with torch.autocast("cpu", torch.bfloat16):
            want = model(x, t, y, capacity=0.75).sample.float()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))
    assert cli.main(["export", str(folder), "--torch-export", str(file)]) == 2
    assert "--overwrite" in capsys.readouterr().err
