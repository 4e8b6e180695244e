"""The gateway's page in a real Chromium: rankings, the plane, instructions, lines to copy."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import MAX_SEQUENCE_TOKENS, gateway_running
from nv_embed_client.instructions import QUERY_INSTRUCTION, TASK_INSTRUCTIONS
from page_use import PASSAGES, QUESTION, ask, opened, rows, show_instruction
from playwright.sync_api import expect

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
        assert command[-1] != "-c" or lines.startswith("# pip install ") or lines.startswith("curl "), lines
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
