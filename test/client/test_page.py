"""The gateway's page in a real Chromium, as a person uses it."""

import os
import re
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from chromium import NoChromium, chromium
from conftest import MAX_SEQUENCE_TOKENS, TOY, Address, gateway_running, serving
from nv_embed_client.instructions import QUERY_INSTRUCTION, TASK_INSTRUCTIONS
from playwright.sync_api import Error, expect
from started_server import free_ports

WAIT_MILLISECONDS = 120_000  # the machine may be busy with anything
QUESTION = "Why does bread dough rise?"
PASSAGES = ["The moon has phases.", "Yeast in the dough gives off gas.", "Bread is sold by bakers."]


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=WAIT_MILLISECONDS)
    with ExitStack() as stack:
        try:
            browser = stack.enter_context(chromium())
        except NoChromium as error:
            pytest.skip(str(error))
        yield browser


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


@pytest.fixture
def page(browser, gateway):
    with opened(browser, gateway + "/") as page:
        expect(page.locator("#state")).to_have_text("ready")
        yield page


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


# --- ranking ---


def test_passages_are_ranked_with_the_scores_of_the_client_and_with_their_tokens(page, client, default_checkpoint):
    ask(page)
    ranking = rows(page)
    scores = (client.embed_query(QUESTION) @ client.embed_documents(PASSAGES).T)[0]
    assert [text for text, _ in ranking] == [PASSAGES[index] for index in np.argsort(-scores)]
    assert [score for _, score in ranking] == pytest.approx(sorted(scores, reverse=True), abs=0.002)
    counts = client.embed(PASSAGES, token_counts=True).token_counts[np.argsort(-scores)]
    assert page.locator("#ranking .tokens").all_text_contents() == [f"{count} tokens" for count in counts]
    for place, (_, score) in enumerate(ranking):
        bar, whole = (page.locator(f"#ranking .bar{inner}").nth(place).bounding_box()["width"] for inner in (" i", ""))
        assert bar / whole == pytest.approx(max(score, 0), abs=0.01)
    if default_checkpoint:
        assert ranking[0][0] == PASSAGES[1]


def test_the_page_says_which_model_it_is(page, client):
    info = client.model_info()
    expect(page.get_by_role("heading", level=1)).to_have_text("nv-embed-v2")
    expect(page.locator("header")).to_contain_text(f"{info.dimension} dimensions")
    expect(page.locator("header")).to_contain_text(f"up to {MAX_SEQUENCE_TOKENS} tokens")


def test_the_plane_keeps_as_much_as_principal_components_do_and_puts_each_text_where_they_do(page, client):
    ask(page)
    ranking = rows(page)
    vectors = np.vstack([client.embed_query(QUESTION), client.embed_documents([text for text, _ in ranking])])
    _, values, axes = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    expected = (vectors - vectors.mean(0)) @ axes[:2].T
    kept = round(100 * (values[:2] ** 2).sum() / (values**2).sum())
    expect(page.locator("#plane-said")).to_contain_text(f"keeps {kept} %")
    # Where an axis points is free, so distances are compared, which the picture shows on one scale.
    boxes = [page.locator(f"#plane [data-at='{place}'] > :nth-child(2)").bounding_box() for place in range(-1, 3)]
    shown = np.array([(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in boxes])
    distances, expected_distances = (
        np.linalg.norm(points[:, None] - points[None], axis=2) for points in (shown, expected)
    )
    scale = distances.max() / expected_distances.max()
    assert distances == pytest.approx(expected_distances * scale, abs=2)


@pytest.mark.parametrize("name", ["Kitchen", "Help desk", "Three topics"])
def test_an_example_ranks_what_answers_its_question_first(page, default_checkpoint, name):
    page.get_by_role("button", name=name).click()
    ranking = rows(page)
    if default_checkpoint:
        first = {"Kitchen": "Yeast feeds", "Help desk": "If you return an item", "Three topics": "In the core of the"}
        assert ranking[0][0].startswith(first[name])


def test_blank_lines_separate_passages_of_several_lines(page):
    ask(page, passages=["first line\nsecond line", "", "another passage"])
    assert {text for text, _ in rows(page)} == {"first line\nsecond line", "another passage"}


def test_a_text_of_a_megabyte_is_ranked_and_said_to_be_cut(page):
    ask(page, passages=["bread and dough " * 2**16, "A short passage."])
    ranking = rows(page)
    assert len(ranking) == 2
    long = page.locator("#ranking li", has_text="characters")
    expect(long).to_contain_text("1,048,575 characters")
    expect(long).to_contain_text("cut: the end was not read")
    expect(long.locator(".tokens")).to_have_text(f"{MAX_SEQUENCE_TOKENS} tokens")
    expect(page.get_by_role("status").filter(has_text="1 text cut")).to_be_visible()
    assert page.locator("#ranking .cut").count() == 1
    assert len(page.locator("#lines").text_content()) < 10_000


def test_a_ranking_is_stopped_and_another_begins(page):
    page.get_by_label("Passages", exact=True).fill("\n".join(f"{number} {'word ' * 400}" for number in range(200)))
    page.get_by_role("button", name="Rank").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status").filter(has_text="Stopped.")).to_be_visible()
    ask(page)
    assert len(rows(page)) == 3


def test_one_of_several_models_is_chosen(browser, server, logs):
    names = ("--model-name", "nv-embed-v2", "--model-name", "absent")
    with (
        gateway_running(logs / "page-models.log", server.url, *names) as url,
        opened(browser, url + "/") as page,
    ):
        page.get_by_label("Model").select_option("absent")
        expect(page.get_by_role("heading", level=1)).to_have_text("absent")
        ask(page)
        expect(page.get_by_role("alert")).to_contain_text("404")
        expect(page.get_by_role("alert")).to_contain_text("got 'absent', which it does not have")
        page.get_by_label("Model").select_option("nv-embed-v2")
        ask(page)
        assert len(rows(page)) == 3


# --- the instruction ---


def test_an_instruction_is_chosen_and_its_changes_are_shown(page, client):
    show_instruction(page)
    expect(page.get_by_label("Put before the question")).to_have_value(QUERY_INSTRUCTION)
    chosen = page.get_by_label("Task").locator("option", has_text="SciFact").get_attribute("value")
    page.get_by_label("Task").select_option(chosen)
    expect(page.get_by_label("Put before the question")).to_have_value(TASK_INSTRUCTIONS["SciFact"])
    ask(page)
    check_changes(page, client, TASK_INSTRUCTIONS["SciFact"])


def test_an_instruction_is_written_and_its_changes_are_shown(page, client):
    show_instruction(page)
    own = "The moon, the moon, the moon! Phases of the moon\nQuery: "
    page.get_by_label("Put before the question").fill(own)
    expect(page.get_by_label("Task")).to_have_value("own")
    ask(page)
    check_changes(page, client, own)


def check_changes(page, client, instruction):
    ranking = rows(page)
    documents = client.embed_documents(PASSAGES).T
    before, after = ((client.embed_query(QUESTION, instruction=each) @ documents)[0] for each in (None, instruction))
    order, order_before = np.argsort(-after), np.argsort(-before)
    assert [text for text, _ in ranking] == [PASSAGES[index] for index in order]
    assert [score for _, score in ranking] == pytest.approx(after[order], abs=0.002)
    changes = page.locator("#ranking .change").all_text_contents()
    shown = [float(re.match(r"[+−][\d.]+", each)[0].replace("−", "-")) for each in changes]
    assert shown == pytest.approx((after - before)[order], abs=0.002)
    moved = [index for place, index in enumerate(order) if order_before[place] != index]
    assert sum("place" in each for each in changes) == len(moved)
    expect(page.locator("#change")).to_contain_text(f"{len(moved) or 'none'} of 3 passages moved")


def test_the_models_own_instruction_is_compared_with_nothing(page):
    ask(page)
    rows(page)
    expect(page.locator("#change")).to_be_hidden()
    assert page.locator("#ranking .change").count() == 0


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
        expect(page.get_by_role("alert")).to_be_hidden(timeout=WAIT_MILLISECONDS)
        expect(key).to_be_hidden()
        ask(page)
        rows(page)
        for tool in ("curl", "openai"):
            page.get_by_label(tool).check()
            expect(page.locator("#lines")).to_contain_text("GATEWAY_API_KEY")
        assert "sesame" not in page.content()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        page.reload()
        expect(key).to_be_visible(timeout=WAIT_MILLISECONDS)
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


def test_empty_lines_alone_are_no_passages_and_ask_nobody(page):
    ask(page, QUESTION, [" ", "", " "])
    passages = page.get_by_label("Passages", exact=True)
    assert passages.evaluate("field => field.validationMessage") == "Write at least one passage."
    expect(page.locator("#said")).to_have_text("Passages appear here, the nearest to the question first.")
    ask(page)
    assert len(rows(page)) == len(PASSAGES)


def test_a_text_is_never_shortened_in_the_middle_of_a_character(page):
    texts = ["x" * 399 + "\N{GRINNING FACE}" * 100, "y" * 499 + "\N{GRINNING FACE}" * 100]
    ask(page, texts[1], texts)
    assert sorted(text for text, _ in rows(page)) == ["x" * 399 + "…", "y" * 400 + "…"]
    for tool in ("curl", "openai", "client"):
        page.get_by_label(tool).check()
        assert "\\ud83d" not in page.locator("#lines").text_content().replace("\\ud83d\\ude00", "")
        assert '"' + "y" * 499 + '"' in page.locator("#lines").text_content()


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


# --- lines to copy ---


def test_the_lines_to_copy_give_the_same_scores(page, client):
    show_instruction(page)
    own = 'Instruct: It\'s a "test" \\ of $HOME\nQuery: '
    page.get_by_label("Put before the question").fill(own)
    passages = [*PASSAGES, "It's 'quoted' and \"double\", costs $5 \\n, and is \N{BREAD}."]
    ask(page, passages=passages)
    ranking = dict(rows(page))
    expected = pytest.approx([ranking[text] for text in passages], abs=0.002)
    environ = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}

    def output(tool, *command):
        page.get_by_label(tool).check()
        lines = page.locator("#lines").text_content()
        done = subprocess.run([*command, lines], capture_output=True, text=True, check=True, timeout=120, env=environ)
        return done.stdout

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("status").filter(has_text="Copied.")).to_be_visible()
    copied = page.evaluate("() => navigator.clipboard.readText()")
    assert copied == page.locator("#lines").text_content()
    for tool in ("openai", "client"):
        printed = output(tool, sys.executable, "-c")
        assert [float(number) for number in re.findall(r"-?\d+\.\d*(?:e-?\d+)?", printed)] == expected
    found = re.findall(r'"embedding":\[(.*?)\]', output("curl", "bash", "-c"))
    question, *vectors = (np.array(numbers.split(","), np.float32) for numbers in found)
    assert [float(question @ vector) for vector in vectors] == expected


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
