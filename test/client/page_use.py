"""The gateway's page in a browser, used as a person does."""

import re
from contextlib import contextmanager

from playwright.sync_api import expect

WAIT_MILLISECONDS = 120_000  # the machine may be busy with anything
QUESTION = "Why does bread dough rise?"
PASSAGES = ["The moon has phases.", "Yeast in the dough gives off gas.", "Bread is sold by bakers."]

expect.set_options(timeout=WAIT_MILLISECONDS)


@contextmanager
def opened(browser, url, **context):
    """The page at `url`, as soon as it knows the server. At the end nothing may have gone wrong in it unseen."""
    wrong, asked = [], []
    with browser.new_context(**context) as tab:
        page = tab.new_page()
        page.set_default_timeout(WAIT_MILLISECONDS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        # Of errors of the API the browser says so, too; they are no errors of the page.
        page.on("console", lambda line: wrong.append(line.text) if "Failed to load resource" not in line.text else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        yield page
    assert wrong == []
    assert [each for each in asked if not each.startswith((url, "data:"))] == []


def ask(page, question=QUESTION, passages=PASSAGES):
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_label("Passages", exact=True).fill("\n".join(passages))
    page.get_by_role("button", name="Rank").click()


def rows(page):
    """Of the ranking: text and score of each passage."""
    expect(page.get_by_role("status").filter(has_text="ranked in")).to_be_visible(timeout=WAIT_MILLISECONDS)
    texts, scores = (page.locator(f"#ranking .{name}").all_text_contents() for name in ("text", "score"))
    return list(zip(texts, [float(score.replace("−", "-")) for score in scores], strict=True))


def show_instruction(page):
    page.get_by_text(re.compile("^Instruction")).click()
