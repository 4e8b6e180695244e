"""The gateway's page in a real Chromium: errors, the key, servers that go and come, hostile texts, access for all."""

import re
from contextlib import ExitStack

import numpy as np
import pytest
from conftest import TOY, Address, gateway_running, serving
from page_use import PASSAGES, QUESTION, ask, opened, rows, show_instruction
from playwright.sync_api import Error, expect
from started_server import free_ports

# --- errors, the key, a server that goes and comes ---


def test_an_error_of_the_api_is_shown_as_it_is_and_is_gone_after_a_success(page):
    ask(page, passages=["x" * (2**21 + 1)])  # more than the gateway takes
    error = page.get_by_role("alert")
    expect(error).to_contain_text("413")
    expect(error).to_contain_text(re.compile(r"expected a body of at most 2097152 bytes; got \d+; split the input"))
    assert page.locator("#ranking li").count() == 0
    ask(page)
    rows(page)
    expect(error).to_be_hidden()


def test_the_key_is_asked_for_and_kept_in_memory_only(browser, server, logs):
    with (
        gateway_running(logs / "page-key.log", server.url, GATEWAY_API_KEY="sesame") as url,
        opened(browser, url + "/") as page,
    ):
        key = page.get_by_label("Key of this gateway")
        expect(page.get_by_role("alert")).to_contain_text("401")
        expect(key).to_be_focused()
        key.fill("guess")
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_role("alert")).to_contain_text("got another; ask its operator")
        key.fill("sesame")
        key.press("Enter")
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(key).to_be_hidden()
        ask(page)
        rows(page)
        for tool in ("curl", "openai"):
            page.get_by_label(tool).check()
            expect(page.locator("#lines")).to_contain_text("GATEWAY_API_KEY")
        assert "sesame" not in page.content()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        page.reload()
        expect(key).to_be_visible()
        expect(key).to_have_value("")


def test_a_server_or_gateway_that_dies_is_said_to_be_away_and_a_server_is_used_again_when_it_is_back(browser, logs):
    address = Address(*free_ports(3))
    with ExitStack() as stack:
        with gateway_running(logs / "page-gateway.log", address.url) as url:
            page = stack.enter_context(opened(browser, url + "/"))
            state, error = page.locator("#state"), page.get_by_role("alert")
            for _ in range(2):
                with serving(logs / "page-server.log", address, TOY):
                    expect(state).to_have_text("ready")
                    expect(page.locator("header")).to_contain_text("dimensions")
                    ask(page)
                    rows(page)
                    expect(error).to_be_hidden()
                expect(state).to_have_text("waiting for the server")
                ask(page)
                expect(error).to_contain_text("503")
                expect(error).to_contain_text("try again")
        expect(state).to_have_text("the gateway does not answer")
        ask(page)
        expect(error).to_contain_text(f"expected an answer from {url}; got none")


# --- safety ---


def test_hostile_texts_are_texts(page):
    hostile = [
        "<img src=x onerror=\"document.title='caught'\">",
        "<script>document.title='caught'</script>",
        "</code></pre><svg onload=\"document.title='caught'\">",
        "'; document.title='caught'; '",
    ]
    title = page.title()
    show_instruction(page)
    page.get_by_label("Put before the question").fill(hostile[0])
    for tool in ("curl", "openai", "client"):
        page.get_by_label(tool).check()
        ask(page, hostile[1], hostile)
        assert {text for text, _ in rows(page)} == set(hostile)
    assert page.title() == title
    assert page.locator("img, main script, #ranking svg").count() == 0


def test_the_policy_runs_this_script_and_nothing_else(http, browser):
    answer = http.get("/")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"\son\w+=|\sstyle=|javascript:|https?:(?!//www.w3.org/)", answer.text)
    # The browser holds to it: what somebody gets into the page does nothing.
    with browser.new_context() as tab:
        page = tab.new_page()
        page.goto(f"{http.base_url}")
        with page.expect_console_message(lambda line: "inline style violates" in line.text):
            page.evaluate(
                "() => document.body.append(Object.assign(document.createElement('style'), {textContent: '*{}'}))"
            )
        with pytest.raises(Error, match="TrustedHTML"):
            page.evaluate("() => { document.body.innerHTML = '<p>' }")
        with page.expect_console_message(lambda line: "connect-src" in line.text):
            page.evaluate("() => fetch('http://127.0.0.1:9/').catch(() => {})")


# --- for everybody ---


def test_the_keyboard_is_enough(page):
    reached = set()
    while True:
        page.keyboard.press("Tab")
        name = page.evaluate("() => document.activeElement.id || document.activeElement.textContent.trim()")
        if name in reached:
            break
        reached.add(name)
        if name == "question":
            page.keyboard.press("Control+A")
            page.keyboard.type(QUESTION)
        if name == "passages":
            page.keyboard.press("Control+A")
            page.keyboard.type("\n".join(PASSAGES))
            page.keyboard.press("Control+Enter")
            assert len(rows(page)) == 3
        if name.startswith("Instruction"):
            page.keyboard.press("Enter")
            expect(page.get_by_label("Task")).to_be_visible()
    assert {"API reference", "Kitchen", "question", "passages", "task", "instruction", "rank", "copy"} <= reached
    page.get_by_role("button", name="Rank").focus()
    outline = "() => getComputedStyle(document.activeElement).outlineStyle"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(outline) == "solid"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert len(rows(page)) == 3


def test_every_field_and_picture_has_a_name_and_news_are_read_aloud(page):
    ask(page)
    rows(page)
    show_instruction(page)
    unnamed = page.locator("input, select, textarea, button").evaluate_all(
        "(fields) => fields.filter((each) => !each.labels?.length && !each.textContent.trim()).map((each) => each.id)"
    )
    assert unnamed == []
    expect(page.get_by_role("img", name=re.compile("All texts on a plane"))).to_be_visible()
    expect(page.get_by_role("status").filter(has_text="3 passages ranked")).to_be_visible()
    expect(page.get_by_role("list").get_by_role("listitem")).to_have_count(3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast_in_light_and_dark(browser, gateway, scheme):
    with opened(browser, gateway + "/", color_scheme=scheme) as page:
        colours = page.evaluate(
            """() => Object.fromEntries(["paper", "card", "wash", "bad-wash", "ink", "quiet", "accent", "on-accent",
                "question", "bad", "good", "wait", "field"].map((name) =>
                [name, getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim()]))"""
        )

    def luminance(name):
        parts = np.array([int(colours[name][i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    def contrast(*names):
        low, high = sorted(map(luminance, names))
        return (high + 0.05) / (low + 0.05)

    assert (luminance("paper") < 0.1) == (scheme == "dark")
    texts = {
        "paper": "ink quiet accent good wait bad",
        "card": "ink quiet accent question bad",
        "wash": "ink quiet bad question",
    }
    texts |= {"bad-wash": "ink bad", "on-accent": "accent question"}
    too_weak = [
        (ground, text) for ground, each in texts.items() for text in each.split() if contrast(ground, text) < 4.5
    ]
    assert too_weak == []
    assert contrast("field", "card") >= 3


def test_a_phone_shows_everything_without_scrolling_sideways(browser, gateway):
    with opened(browser, gateway + "/", viewport={"width": 320, "height": 640}, has_touch=True) as page:
        show_instruction(page)
        ask(page, "w" * 300, [*PASSAGES, "x" * 500])
        rows(page)
        for tool in ("curl", "openai", "client"):
            page.get_by_label(tool).check()
            assert page.evaluate("document.documentElement.scrollWidth") == 320
