"""A report's page as a browser shows it: what it draws of each figure in each view, and what its console says."""

import json
import re
import shutil
import subprocess
import threading

import pytest
from processes import LIMIT_S

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"),
    *("--enable-logging=stderr", "--v=0"),
)
# Draws every figure in every view, and looks at each as a picture: the share of pixels that are not white, that of
# coloured ones, and how many of twelve hues are on one pixel in 5,000 or more. What it saw is its last line.
LOOK = """<script>
(async () => {
  const tell = (seen) => console.log(`SEEN ${JSON.stringify([document.body.dataset.drawn, seen])}`);
  for (const kind of ["error", "unhandledrejection"]) addEventListener(kind, () => setTimeout(tell, 0, []));
  const pause = () => new Promise((done) => setTimeout(done, 20));
  const product = (lists) =>
    lists.reduce((some, list) => some.flatMap((view) => [...list.options].map((o) => [...view, o.value])), [[]]);
  const choose = (lists, view, kind) => {
    const changed = lists.find((list, i) => list.value !== view[i]);
    lists.forEach((list, i) => { list.value = view[i]; });
    changed?.dispatchEvent(new Event(kind));
  };
  async function picture(svg) {
    const { width, height } = svg.getBoundingClientRect();
    const image = new Image();
    image.src = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(svg)], { type: "image/svg+xml" }));
    await image.decode();
    const context = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
    context.drawImage(image, 0, 0);
    URL.revokeObjectURL(image.src);
    const pixels = context.getImageData(0, 0, width, height).data, hues = new Array(12).fill(0);
    let ink = 0, coloured = 0;
    for (let i = 0; i < pixels.length; i += 4) {
      const r = pixels[i], g = pixels[i + 1], b = pixels[i + 2], most = Math.max(r, g, b), least = Math.min(r, g, b);
      if (least < 250) ink++;
      if (most - least < 60) continue;
      const sixth = most === r ? (g - b) / (most - least) : most === g ? 2 + (b - r) / (most - least)
        : 4 + (r - g) / (most - least);
      coloured++;
      hues[Math.round(2 * sixth + 12) % 12]++;
    }
    const count = pixels.length / 4;
    return { ink: ink / count, coloured: coloured / count, hues: hues.filter((n) => n > count / 5000).length };
  }
  while (!document.body.dataset.drawn) await pause();
  const seen = [];
  for (const figure of document.querySelectorAll("figure")) {
    const lists = [...figure.querySelectorAll(".choice select")];
    const own = () => [...figure.querySelectorAll(".vega-bind select")];
    const look = async (view) => {
      while (figure.dataset.state === "drawing") await pause();
      const svg = figure.querySelector("svg.marks");
      const said = figure.dataset.state === "drawn" ? "" : figure.querySelector(".drawing").textContent;
      seen.push({ figure: figure.id, view: view.join("|"), said, ...(svg ? await picture(svg) : {}) });
    };
    for (const view of product(lists)) {
      choose(lists, view, "change");
      await look(view);
    }
    for (const view of own().length ? product(own()).slice(1) : []) {
      choose(own(), view, "input");
      await pause();
      await look(["own list", ...view]);
    }
  }
  tell(seen);
})();
</script>"""


def opened(page, scratch):
    """(data-drawn, what was seen of each figure in each view, the errors on the console) of the page in a browser.

    Without a browser the test fails.
    """
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail("no browser to open a report's page with: apt-get install chromium", pytrace=False)
    copy = scratch / "looked_at.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("<body>", f"<body>{LOOK}", 1), encoding="utf-8")
    command = [found, *FLAGS, f"--user-data-dir={scratch / 'browser'}", copy.as_uri()]
    said, seen = [], None
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        limit = threading.Timer(LIMIT_S, process.kill)
        limit.start()
        for line in process.stderr:
            if seen := re.search(r'CONSOLE.*"SEEN (.*)", source: ', line):
                break
            said.append(line)
        limit.cancel()
        process.kill()
    errors = [line for line in said if "CONSOLE" in line and '"WARN ' not in line]
    assert seen, f"the browser ended before it had drawn the page: {errors or said}"
    return *json.loads(seen[1]), errors


def assert_whole(page, scratch):
    """Every figure of the page is drawn in every view, none is blank, nothing is fetched; returns what was seen.

    One point has 0.00025 of its picture in colour.
    """
    drawn, seen, errors = opened(page, scratch)
    assert errors == [] and drawn == "all"
    assert [each for each in seen if each["said"]] == []
    assert [each for each in seen if each["ink"] < 0.01 or each["coloured"] < 0.0001] == []
    assert max(each["hues"] for each in seen) > 1
    return seen
