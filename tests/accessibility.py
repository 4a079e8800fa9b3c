"""axe-core in Chromium over built pages: ``python tests/accessibility.py FOLDER_OR_PAGE ...``.

Every page is opened headless in the light and in the dark theme with axe-core added to it; what
axe calls serious or critical is printed, and is exit code 1. axe-core is fetched by npm into
``.axe/``, which git ignores.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
AXE = ROOT / ".axe" / "node_modules" / "axe-core" / "axe.min.js"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BAD = ("serious", "critical")
RUNNER = """
addEventListener("load", () => axe.run().then((found) => {
  const said = document.createElement("pre");
  said.id = "axe-findings";
  said.textContent = JSON.stringify(found.violations.map((v) => ({
    id: v.id, impact: v.impact, help: v.help,
    nodes: v.nodes.slice(0, 4).map((n) => n.html.slice(0, 160)), count: v.nodes.length,
  })));
  document.body.append(said);
}));
"""


def fetch_axe() -> Path:
    """axe-core's script.

    Raises:
        SystemExit: there is no npm to fetch it with.
    """
    if not AXE.exists():
        if shutil.which("npm") is None:
            raise SystemExit("npm is not installed, so axe-core cannot be fetched; install nodejs")
        subprocess.run(
            ["npm", "install", "--silent", "--no-save", "--prefix", ROOT / ".axe", "axe-core@4"],
            check=True,
        )  # fmt: skip
    return AXE


def browser() -> str:
    """The browser there is.

    Raises:
        SystemExit: there is none.
    """
    found = next((name for name in BROWSERS if shutil.which(name)), None)
    if found is None:
        raise SystemExit(f"no browser found ({', '.join(BROWSERS)}); apt-get install chromium")
    return found


def findings(page: Path, *, dark: bool = False) -> list[dict[str, Any]]:
    """What axe-core finds in a page."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # admits us
    script = f"<script>{fetch_axe().read_text(encoding='utf-8')}</script><script>{RUNNER}</script>"
    copy = page.with_name(f"axe-{page.name}")
    copy.write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    try:
        with tempfile.TemporaryDirectory() as profile:
            done = subprocess.run(
                [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                 "--allow-file-access-from-files", f"--user-data-dir={profile}", *theme,
                 "--virtual-time-budget=60000", "--window-size=1280,900", copy.as_uri()],
                capture_output=True, text=True, check=True, timeout=240,
            )  # fmt: skip
    finally:
        copy.unlink()
    said = re.search(r'<pre id="axe-findings">(.*?)</pre>', done.stdout, re.DOTALL)
    if said is None:
        raise SystemExit(f"{page}: axe-core did not finish")
    found: list[dict[str, Any]] = json.loads(html.unescape(said[1]))
    return found


def main(places: list[str]) -> int:
    pages: list[Path] = []
    for place in map(Path, places):
        pages += sorted(place.rglob("*.html")) if place.is_dir() else [place]
    pages = [p.resolve() for p in pages if "_modules" not in p.parts and p.name[:4] != "axe-"]
    wrong = 0
    for page in pages:
        for dark in (False, True):
            for finding in findings(page, dark=dark):
                serious = finding["impact"] in BAD
                wrong += serious
                print(f"{page.name}{' (dark)' if dark else ''}: {finding['impact']} {finding['id']}"
                      f" x{finding['count']}: {finding['help']}")  # fmt: skip
                for node in finding["nodes"] if serious else ():
                    print(f"    {node}")
    print(f"{len(pages)} pages in two themes, {wrong} serious findings")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
