"""`dcdit report RUN1 RUN2 ...`: curves over each other, what differs, final numbers, samples side by side."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.trainer.browser import CHROMIUM, WIDTHS, look
from tests.trainer.synthetic_run import elastic_curve, export, metrics, run_folder, tiny_model
from tests.trainer.test_report import Balanced
from trainer import cli
from trainer.reporting import compare


def second(first: Path, folder: Path, name: str, **changes: str) -> Path:
    """Another run like `first`, with other values in its config."""
    shutil.copytree(first, folder)
    text = (folder / "config.yaml").read_text().replace("small & <odd>", name)
    for key, value in changes.items():
        text = re.sub(rf"{key}: .*", f"{key}: {value}", text)
    (folder / "config.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Two runs with weights and curves, of the same shape, and one that has just begun; and their page."""
    root = tmp_path_factory.mktemp("compare")
    first = run_folder(root / "a", steps=60)
    elastic_curve(first)
    other = second(first, root / "other", "other", total_images="2560")
    export(next(other.rglob("ema")), tiny_model(seed=1))
    metrics(other, steps=60)
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()[:-1]]
    for row in rows:
        row |= {"heldout_mse": row["heldout_mse"] / 2, "frechet_offline": 9.5} if row.get("eval") else {}
    (other / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elastic_curve(other, better=3.0)
    young = root / "young"
    young.mkdir()
    (young / "metrics.jsonl").touch()
    runs = [first, other, young]
    to = root / "page.html"
    assert cli.main(["report", *map(str, runs), "--to", str(to), "--quick", "--steps", "2"]) == 0
    return runs, to


def part(page: str, title: str) -> str:
    return re.search(rf"<section><h2>{title}</h2>(.*?)</section>", page, re.S).group(1)


def cells(text: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    return [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in rows]


def test_stands_alone_and_is_escaped(three):
    page = three[1].read_text()
    Balanced(page)
    assert "<script" not in page and "http" not in page and "url(" not in page
    assert "small &amp; &lt;odd&gt;" in page and "<odd>" not in page


def test_final_numbers_and_the_best_of_each(three):
    rows = {row[0]: row[1:] for row in cells(part(three[1].read_text(), "Final numbers"))}
    assert rows[""][1:] == ["other", "young"] and rows["images seen"] == ["1,920", "1,920", "–"]
    assert rows["held-out error"] == ["0.01667", "0.008333", "–"] and rows["frechet offline"] == [
        "–",
        "9.5",
        "–",
    ]
    assert '<td class="best">0.008333</td>' in three[1].read_text()
    assert '<td class="best">1,920</td>' not in three[1].read_text()


def test_curves_lie_over_each_other(three):
    text = part(three[1].read_text(), "How they learned")
    loss = text[text.index("Training loss") : text.index("Held-out error")]
    assert loss.count('<path class="line s0"') == loss.count('<path class="line s1"') == 1
    assert loss.count("<i class=") == 2, "the run that has just begun has no line and no legend"
    for title in ("Tokens kept", "Frechet offline", "Gradient norm", "Speed"):
        assert title in text
    text = part(three[1].read_text(), "Quality against compute")
    assert text.count("<circle") == 8 and "10 DDPM steps, guidance 1.5" in text


def test_differences_of_the_configurations(three):
    text = part(three[1].read_text(), "What differs in the configuration")
    assert cells(text)[1:] == [["train.total_images", "1280", "2560"]]
    assert "1 of 2 keys" in text and "No readable config.yaml in young" in text


def test_samples_of_every_run_that_has_weights(three):
    text = part(three[1].read_text(), "Samples")
    assert text.count("<img") == 2 * 4 and "No weights that can be read, and so no pictures, of young" in text
    pictures = re.findall(r'src="([^"]*)"', text)
    assert len(set(pictures)) == 8


def test_runs_that_are_alike_or_nameless(tmp_path):
    first = run_folder(tmp_path / "a")
    other = second(first, tmp_path / "b", "small & <odd>")
    assert cli.main(["report", str(first), str(other), "--quick", "--steps", "1"]) == 0
    page = (tmp_path / "a" / "comparison.html").read_text()
    assert "Nothing: the runs differ in their names and folders alone" in page
    assert "Comparison of run and b" in page, "of one name: their folders tell them apart"
    assert compare._names([first, first]) == [str(first)] * 2


def test_too_many_and_twice_the_same(tmp_path, capsys):
    run = run_folder(tmp_path)
    for words, said in [([str(run)] * 2, "named twice"), ([str(run)] * 7, "at most 6")]:
        assert cli.main(["report", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert cli.main(["report", str(run), str(tmp_path / "gone")]) == 2
    assert not (tmp_path / "comparison.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", WIDTHS)
def test_browser_shows_all_of_it(three, tmp_path, width):
    page = three[1].read_text()
    seen = look(three[1], width, tmp_path)
    assert seen.images == page.count("<img") and seen.charts == page.count("<svg")
