"""A page in headless Chromium."""

import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib import pyplot

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")


def check_page(text: str, folder: Path, width: int) -> None:
    """Assert that a page is not wider than its window, and not blank; `folder` holds what that takes."""
    frame = f"<iframe style='border:0' width={width} height=2000 srcdoc='{html.escape(text)}'></iframe>"
    script = "onload = () => { document.title = frames[0].document.documentElement.scrollWidth }"
    (folder / "frame.html").write_text(f"{frame}<script>{script}</script>")
    (folder / "page.html").write_text(text)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},2000"]
    place = (folder / "frame.html").as_uri()
    done = subprocess.run([CHROMIUM, *flags, "--dump-dom", place], capture_output=True, text=True, timeout=100)
    assert int(re.findall(r"<title>(\d+)</title>", done.stdout)[0]) <= width
    picture, place = folder / "page.png", (folder / "page.html").as_uri()
    subprocess.run([CHROMIUM, *flags, f"--screenshot={picture}", place], capture_output=True, timeout=100, check=True)
    assert len(set(pyplot.imread(picture).reshape(-1, 4)[::97].round(2).ravel())) > 10, "it is not blank"
