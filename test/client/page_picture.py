"""Makes README's picture of the gateway's page, beside a running gateway:

.venv-client/bin/python test/client/page_picture.py http://localhost:9000 docs/page.png
"""

import sys

from chromium import chromium


def main(url: str, picture: str) -> None:
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
        page.goto(url)
        page.get_by_text("ready", exact=True).wait_for()
        page.get_by_role("button", name="Three topics").click()
        page.get_by_role("status").filter(has_text="9 passages ranked").wait_for()
        page.mouse.move(0, 0)  # away from the button, which has another colour below a mouse
        page.screenshot(path=picture, full_page=True)


main(*sys.argv[1:])
