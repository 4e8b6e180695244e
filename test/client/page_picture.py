"""Makes README's picture of the gateway's page, beside a running gateway:

.venv-client/bin/python test/client/page_picture.py http://localhost:9000 docs/page.png
"""

import io
import sys

from chromium import chromium
from PIL import Image


def main(url: str, picture: str) -> None:
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1160, "height": 900}, color_scheme="light")
        page.goto(url)
        page.get_by_text("ready", exact=True).wait_for()
        page.get_by_role("button", name="Three topics").click()
        page.get_by_role("status").filter(has_text="9 passages ranked").wait_for()
        page.mouse.move(0, 0)  # away from the button, which has another colour below a mouse
        pixels = page.screenshot(full_page=True)
    # Few colours, because every version of the file stays in the history.
    Image.open(io.BytesIO(pixels)).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(picture)


main(*sys.argv[1:])
