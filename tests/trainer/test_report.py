"""`dcdit report`: one file that stands alone, says what is missing, and looks right in a browser."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.trainer.browser import CHROMIUM, WIDTHS, look
from tests.trainer.synthetic_run import (
    SIZE,
    elastic_curve,
    export,
    manifest,
    mds,
    metrics,
    run_folder,
    tiny_model,
)
from trainer import charts, cli
from trainer.metrics import read_rows
from trainer.reporting import curves, elastic
from trainer.reporting.gather import NEED_WEIGHTS, TAIL_DROPS
from trainer.reporting.routing import NOISE_LEVELS

VOID = {"meta", "img", "link", "br"}  # what HTML closes by itself; SVG closes its own


class Balanced(HTMLParser):
    """Counts tags and fails where one closes another's."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.count = [], {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def section(page: str, title: str) -> str:
    return re.search(rf"<section><h2>{title}</h2>(.*?)</section>", page, re.S).group(1)


def write(run, *words) -> str:
    assert cli.main(["report", str(run), "--steps", "2", "--quick", *words]) == 0
    return (run / "report.html").read_text()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    run = run_folder(root, data=mds(root / "data"))
    elastic_curve(run)
    return run, write(run)


def test_stands_alone(full):
    _, page = full
    assert not re.search(r'(?:src|href)="(?!data:image/png;base64,)', page)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert page.count("http") == 0


def test_markup_is_balanced_and_text_is_escaped(full):
    _, page = full
    Balanced(page)
    assert "small &amp; &lt;odd&gt;" in page and "<odd>" not in page


def test_holds_every_part(full):
    _, page = full
    for words in (
        "Samples", "Where the tokens go", "The router by class and noise level", "By noise level", "By class",
        "drop 0%", "drop 30%", "drop 60%", "drop 90%", "Quality against compute",
        "Loss", "Held-out error", "Tokens kept", "Gradient norm", "By component", "By budget", "GFLOPs",
        "total_images: 1280", "printed page", "640", "of 1,280", "target 1/4",
    ):  # fmt: skip
        assert words in page, words
    assert "note" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    levels = len(NOISE_LEVELS)
    pictures = 4 + 2 * 3 * levels + 4 * (1 + levels) + 4 * len(TAIL_DROPS)
    assert Balanced(page).count["img"] == pictures and levels >= 6


def test_pictures_keep_their_own_size_and_are_enlarged_by_the_page(full):
    _, page = full
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    sizes = {Image.open(io.BytesIO(base64.b64decode(data))).size for data in found}
    assert sizes == {(SIZE, SIZE)} and "image-rendering: pixelated" in page
    assert len(page) < 400_000


def test_not_finite_values_leave_a_gap_and_cut_lines_are_skipped(full):
    run, page = full
    rows = [row for row in read_rows(run) if not row.get("eval")]
    assert [row["step"] for row in rows] == list(range(1, 21)) and rows[6]["grad_norm"] == "nan"
    norm = curves.points(rows, "grad_norm")
    assert [images // 32 for images, _ in norm] == [*range(1, 7), *range(8, 21)]
    drawn = re.findall(r"<svg.*?</svg>", page, re.S)
    values = [
        value for text in drawn for e in ElementTree.fromstring(text).iter() for value in e.attrib.values()
    ]
    assert len(drawn) > 4 and not [value for value in values if re.search(r"\b(nan|inf)\b", value)]


def test_budgets_begin_with_the_sheet_s_pictures_and_cost_less_and_less(full):
    _, page = full
    sheet = re.findall(r'src="([^"]*)"', section(page, "Samples"))
    budgets = re.findall(r'src="([^"]*)"', section(page, "One checkpoint, several budgets"))
    assert len(sheet) == 4 and budgets[:4] == sheet and len(set(budgets)) == len(budgets)
    kept = [float(x) for x in re.findall(r"([\d.]+)% of the tokens kept", page)]
    cost = [float(x) for x in re.findall(r"<span>([\d.]+) GFLOPs", page)]
    assert len(kept) == len(cost) == 4
    assert kept == sorted(set(kept), reverse=True) and cost == sorted(set(cost), reverse=True)


def test_elastic_curve_is_drawn_and_tabulated(full):
    run, page = full
    part = section(page, "Quality against compute")
    assert "10 DDPM steps, guidance 1.5, Fréchet distance on offline features" in part
    assert part.count("<circle") == 4 and 'aria-label="Fréchet distance"' in part
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", part)
    assert cells[:6] == ["ρ", "tokens kept", "GFLOPs", "images/s", "Fréchet", "held-out error"]
    assert cells[6:12] == ["0", "25.0%", "12", "2", "20", "0.031"] and len(cells) == 6 * 5
    (pairs, labels) = elastic.points(elastic.read(run)[0])
    assert pairs == sorted(pairs) and labels == ["0.6", "0.4", "0.2", "0"]


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "dcdit sweep"),
        ("{", "could not be read"),
        ("[]", "could not be read"),
        ('{"rows": [{"tail_drop": 0}], "metric": "frechet"}', "could not be read"),
        ('{"rows": [], "metric": "beauty"}', "'beauty', not one of"),
        (
            '{"rows": [{"tail_drop": 0, "gflops_per_image": 1, "frechet": null}], "metric": "frechet"}',
            "no rows with",
        ),
    ],
)
def test_elastic_curve_that_is_none(tmp_path, text, said):
    if text is not None:
        (tmp_path / "elastic.json").write_text(text)
    curve, why = elastic.read(tmp_path)
    assert curve == {} and said in why


@pytest.mark.parametrize("words", [["--steps", "0"], ["--steps", "1001"], ["--seed", "-1"]])
def test_wrong_numbers_are_one_line_before_anything_is_done(words, tmp_path, capsys):
    run = tmp_path / "young"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    assert cli.main(["report", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words[0]}: must be") and error.count("\n") == 1


def test_run_that_just_began_says_so(tmp_path, capsys):
    run = tmp_path / "young"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    page = write(run)
    Balanced(page)
    assert "No rows in metrics.jsonl yet" in page and "no readable config.yaml" in page
    assert "No pictures on this page" in page and page.count(NEED_WEIGHTS.split(":")[0]) >= 3
    assert "note: " in capsys.readouterr().out


def test_a_few_steps_without_evaluation_or_data(tmp_path):
    run = run_folder(tmp_path)
    metrics(run, steps=2, evals=False)
    page = write(run)
    assert "No held-out evaluation yet" in page and "give it with --data" in page
    assert "drop 60%" in page, "samples need no data"


def test_shares_are_measured_where_none_were_logged(tmp_path):
    run = run_folder(tmp_path)
    metrics(run, steps=2, evals=False)
    page = write(run, "--data", str(mds(tmp_path / "data")))
    assert "Measured now on 4 held-out images" in page and "By class" in page


def test_a_run_on_several_data_sets_has_router_maps(tmp_path):
    data = [mds(tmp_path / name) for name in "ab"]
    run = run_folder(tmp_path, data=data[0])
    config = run / "config.yaml"
    config.write_text(
        config.read_text() + f"  streams: [{{path: {data[0]}, weight: 2}}, {{path: {data[1]}, weight: 1}}]\n"
    )
    assert Balanced(write(run)).count["img"] > 4 + 4 * len(TAIL_DROPS)
    config.write_text(config.read_text() + "  cache_limit: 1gb\n")
    assert "could not be read (data.cache_limit" in write(run), "the whole section counts, as in training"


def test_data_that_moved_away_is_a_note_and_a_wrong_flag_an_error(tmp_path, capsys):
    run = run_folder(tmp_path, data=tmp_path / "gone")
    assert "held-out images could not be read" in write(run)
    capsys.readouterr()
    assert cli.main(["report", str(run), "--data", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err


def test_damaged_checkpoint_still_gives_curves(tmp_path):
    run = run_folder(tmp_path)
    weights = next(run.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    page = write(run)
    assert "No pictures on this page" in page and "model.safetensors" in page and "Gradient norm" in page


def test_baseline_without_a_router(tmp_path):
    page = write(run_folder(tmp_path, model=tiny_model(baseline=True), data=mds(tmp_path / "data")))
    assert "This model has no router" in page and "By component" in page and "drop 30%" not in page


def test_latents_and_flow(tmp_path):
    model = tiny_model(4, learn_sigma=False)
    run = run_folder(tmp_path, model=model)
    export(next(run.rglob("ema")), model, kind="flow", data=manifest(4, "latents"))
    sizes = run / "checkpoints" / "000000000640" / "COMPLETE"
    sizes.write_text("{}")
    page = write(run)
    assert "False colours of the VAE&#x27;s latents" in page and "EULER" in page


def test_old_page_stays_where_a_new_one_fails(tmp_path, capsys):
    run = run_folder(tmp_path)
    (run / "report.html").write_text("old")
    before = sorted(run.iterdir())
    assert cli.main(["report", str(run), "--vae", str(tmp_path), "--quick", "--steps", "1"]) == 2
    assert "--vae" in capsys.readouterr().err
    assert (run / "report.html").read_text() == "old" and sorted(run.iterdir()) == before


def test_what_is_no_run_is_told_and_left_alone(tmp_path, capsys):
    for path, said in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "not a run")):
        assert cli.main(["report", str(path)]) == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_before_anything_is_drawn(full, capsys, monkeypatch):
    monkeypatch.setattr("trainer.report.gather", None)
    assert cli.main(["report", str(full[0]), "--to", "/proc/x/r.html"]) == 2
    assert "--to: cannot write to /proc/x" in capsys.readouterr().err
    assert cli.main(["report", str(full[0]), "--to", str(full[0])]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_what_drawing_took_is_no_measure_of_the_model():
    row = {"step": 1, "images": 2, "eval": True, "heldout_mse": 0.1, "frechet_offline": 3.0, "drawn_images": 64,
           "drawn_seconds": 5.0, "drawn_images_per_s": 12.8, "drawn_retained_share": 0.2}  # fmt: skip
    assert curves.other_keys([curves.Run("a", [], [row])]) == ["frechet_offline", "drawn_retained_share"]


def _svg(chart: str):
    return ElementTree.fromstring(chart[chart.index("<svg") :])


def test_charts_side_by_side_in_a_file_of_their_own():
    """Each panel has its place, its legend inside it, and a colour for every line."""
    names = ["one <&>", "two", "three", "a long name that needs a line of its own, or nearly so"]
    series = [charts.Series(name, [(0, k), (1, k + 1)], tone=k) for k, name in enumerate(names)]
    small = charts.line_chart(series[:1], x_label="x", height=200)
    svg = ElementTree.fromstring(charts.standalone("title", charts.line_chart(series, x_label="x"), small))
    space = "{http://www.w3.org/2000/svg}"
    panels = svg.findall(f"{space}svg")
    assert [int(panel.get("x")) for panel in panels] == [0, charts.WIDTH]
    bottom = max(int(panel.get("y")) + int(panel.get("height")) for panel in panels)
    assert svg.get("viewBox") == f"0 0 {2 * charts.WIDTH} {bottom}"
    legend, other = svg.findall(f"{space}g")
    assert [text.text for text in legend.findall(f"{space}text")] == names and len(other) == 2
    below = max(float(text.get("y")) for text in legend.findall(f"{space}text"))
    assert 28 + below < int(panels[0].get("y")) and below > 17  # the last name is on the second line
    style = svg.find(f"{space}style").text
    assert len(set(re.findall(r"\.line\.s\d{stroke:(#\w+)}", style))) == charts.TONES


@pytest.mark.parametrize("points", [[], [(5, 1.0)], [(0, 2.0), (1, 2.0)], [(0, float("nan")), (1, 3.0)]])
def test_charts_of_next_to_nothing(points):
    svg = _svg(charts.line_chart([charts.Series("a", points)], x_label="x"))
    assert not any("nan" in value for element in svg.iter() for value in element.attrib.values())


def test_long_lines_are_thinned_but_keep_their_spikes():
    points = [(float(i), 0.0) for i in range(50_000)]
    points[31_234] = (31_234.0, 9.0)
    thin = charts._thin(points)
    assert len(thin) <= 402 and (31_234.0, 9.0) in thin and thin == sorted(thin)


@pytest.mark.parametrize("low,high", [(0, 1), (0.93, 1.07), (-3, 1e6), (2e-7, 3e-7), (5, 5)])
def test_ticks_are_round_and_cover_the_range(low, high):
    found = charts.ticks(low, high)
    step = found[1] - found[0]
    assert np.allclose(np.diff(found), step) and f"{step:.6e}"[:4] in ("1.00", "2.00", "2.50", "5.00")
    assert np.allclose(np.array(found) / step, np.round(np.array(found) / step), atol=1e-6)
    assert found[0] - low < step and max(high, low + (low == high)) - found[-1] < step * (1 + 1e-9)
    assert 2 <= len(found) <= 8 and found == sorted(found)
    assert found[0] >= low - 1e-9 and found[-1] <= max(high, low + 1) + 1e-9


def test_smoothing_is_a_mean_from_the_first_point_on():
    smooth = charts.smooth([(i, 3.0) for i in range(10)], 4)
    assert np.allclose([y for _, y in smooth], 3.0)
    step = dict(charts.smooth([(i, float(i >= 50)) for i in range(80)], 4))
    assert step[49] == 0 and step[50] == pytest.approx(1 / 4, abs=1e-5), (
        "a span of four: one in four of the weight"
    )
    assert step[53] == pytest.approx(1 - 0.75**4, abs=1e-5) and step[79] > 0.999
    assert charts.smooth([(0, 1.0), (1, float("nan")), (2, 3.0)], 2)[1] == (
        2,
        pytest.approx((0.5 * 1 + 3) / 1.5),
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", WIDTHS)
def test_browser_shows_all_of_it(full, tmp_path, width):
    run, page = full
    seen = look(run / "report.html", width, tmp_path)
    assert seen.images == Balanced(page).count["img"] and seen.charts == Balanced(page).count["svg"]


def test_logarithmic_axis_only_where_it_helps():
    falling = [charts.Series("a", [(i, 1.3 / (1 + i)) for i in range(40)])]
    texts = [e.text for e in _svg(charts.line_chart(falling, x_label="x", y_log=True)).iter() if e.text]
    assert {"0.02", "0.05", "0.1", "1", "2"} <= set(texts)
    flat = [charts.Series("a", [(0, 1.0), (1, 1.2)])]
    assert charts.line_chart(flat, x_label="x", y_log=True) == charts.line_chart(flat, x_label="x")
    zero = [charts.Series("a", [(0, 0.0), (1, 9.0)])]
    assert charts.line_chart(zero, x_label="x", y_log=True) == charts.line_chart(zero, x_label="x")
    far = [charts.Series("a", [(0, 1e-6), (1, 3e4)])]
    labels = [
        e
        for e in _svg(charts.line_chart(far, x_label="x", y_log=True)).iter()
        if e.get("text-anchor") == "end"
    ]
    assert len(labels) == 12 and labels[-1].text == "100K"
