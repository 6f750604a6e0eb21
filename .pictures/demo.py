"""Makes demo.png, the README's picture: two windows of the demo side by side. Needs playwright and a Chromium.

python .pictures/demo.py
"""

import base64
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
NOTES = [
    ("Release", "0.1 on Thursday. Ada writes the notes, Grace the news.", "Ada"),
    ("Groceries", "milk, bread, coffee", "Grace"),
]
SAID = [
    ("Ada", "Is the new site up?"),
    ("Grace", "Since noon."),
    ("Ada", "Let us tell them!"),
]
SHEET = """<body style="margin: 0; padding: 20px; background: #d8d6cd; display: flex; gap: 20px; width: max-content">
<style>img { width: 660px; display: block; border-radius: 12px; box-shadow: 0 6px 24px #0003 }</style>%s</body>"""


def main() -> None:
    programs = map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])
    browser = os.environ.get("CHROMIUM") or next(filter(None, programs))
    command = [sys.executable, HERE.parent / "nova_lite.py", "--port", "0", "--db", ":memory:"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (found := re.search(r"serving on http://\S+:(\d+)/", server.stderr.readline())):
        assert server.poll() is None
    try:
        (HERE / "demo.png").write_bytes(picture(browser, int(found[1])))
    finally:
        server.terminate()
        server.communicate()


def picture(browser: str, port: int) -> bytes:
    client = http.client.HTTPConnection("127.0.0.1", port)
    for title, body, author in NOTES:
        note = json.dumps({"title": title, "body": body, "author": author})
        client.request("POST", "/api/notes", note, {"Content-Type": "application/json"})
        client.getresponse().read()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        size = {"width": 660, "height": 520}
        windows = {name: chromium.new_page(viewport=size, reduced_motion="reduce") for name in ("Ada", "Grace")}
        for name, page in windows.items():
            page.goto(f"http://127.0.0.1:{port}/")
            page.get_by_label("Your name").fill(name)
            page.get_by_label("Your comment").focus()
        for number, (name, text) in enumerate(SAID, 1):
            windows[name].get_by_label("Your comment").fill(text)
            windows[name].get_by_label("Your comment").press("Enter")
            for page in windows.values():
                page.wait_for_function(f"document.querySelectorAll('#comments p:not(.pending)').length === {number}")
        windows["Grace"].get_by_label("Your comment").press_sequentially("Shipping n")
        windows["Ada"].get_by_text("is typing").wait_for()
        shots = [base64.b64encode(page.screenshot()).decode() for page in windows.values()]
        sheet = chromium.new_page(viewport={"width": 1380, "height": 560})
        sheet.set_content(SHEET % "".join(f'<img src="data:image/png;base64,{shot}">' for shot in shots))
        return sheet.screenshot(full_page=True)


if __name__ == "__main__":
    main()
