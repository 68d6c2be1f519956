"""A page in headless Chromium: what it measures, what its console says, how it looks."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
WIDTHS = (1280, 390)
HEIGHT = 3000
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--enable-logging=stderr", "--virtual-time-budget=3000",
]  # fmt: skip
# A window is never narrower than 500 pixels, so the page is shown in a frame, which may be.
FRAME = """<!doctype html><title>nothing</title><body style="margin:0">
<script>onmessage = e => document.title = e.data</script>
<iframe src="probe.html" style="display:block;border:0;width:{width}px;height:{height}px"></iframe></body>"""
PROBE = """<script>
onload = () => {
  const pictures = [...document.images], charts = [...document.querySelectorAll("svg")];
  const box = e => e.getBoundingClientRect();
  parent.postMessage("seen=" + JSON.stringify({
    width: innerWidth, wide: document.documentElement.scrollWidth,
    images: pictures.filter(i => i.complete && i.naturalWidth > 0 && box(i).width >= 4 && box(i).height >= 4).length,
    charts: charts.filter(c => box(c).width > 200 && box(c).height > 100).length,
    sections: [...document.querySelectorAll("section")].filter(s => box(s).height > 20).length,
    out: [...document.querySelectorAll("main *")].filter(
      e => !e.closest(".scroll, pre, svg") && box(e).right > innerWidth + 1).length,
  }) + "=seen", "*");
};
</script></body>"""


class Seen(NamedTuple):
    """What is on the page and has a size: pictures that are decoded, charts, sections."""

    images: int
    charts: int
    sections: int


def look(page: Path, width: int, folder: Path) -> Seen:
    """Show `page` in a frame of `width` pixels. Fails where it is wider than that, anything sticks out of it, its
    console speaks, a part has no height or it is blank."""
    (folder / "probe.html").write_text(page.read_text().replace("</body>", PROBE))
    (folder / "frame.html").write_text(FRAME.format(width=width, height=HEIGHT))
    shot = folder / f"shot{width}.png"
    flags = [*FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},{HEIGHT}"]
    command = [
        CHROMIUM,
        *flags,
        f"--screenshot={shot}",
        "--dump-dom",
        (folder / "frame.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said, said
    found = json.loads(re.search(r"<title>seen=(.*?)=seen", done.stdout).group(1))
    assert found["width"] == width and found["wide"] <= width, f"{found['wide']} wide in a frame of {width}"
    assert not found["out"], f"{found['out']} elements stick out of the page"
    assert found["sections"] == page.read_text().count("<section>")
    pixels = np.asarray(Image.open(shot).convert("L"))[:, :width]
    assert pixels.shape == (HEIGHT, width) and pixels[:1000].std() > 5
    return Seen(found["images"], found["charts"], found["sections"])
