"""The page of the server in a real browser."""

import json

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture
def open_page(browser, served):
    """Opens the page, in a context that fails the test if the page says or loads anything else."""
    contexts, heard = [], []

    def opened(scheme="light", width=1400):
        size = {"width": width, "height": 900}
        contexts.append(browser.new_context(color_scheme=scheme, viewport=size))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))

        def asked(request):
            if not request.url.startswith(served.url):
                heard.append(f"request: {request.url}")

        page.on("request", asked)
        page.goto(served.url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not heard


def run(page, served, prompt="sum 37295"):
    page.wait_for_selector("#keyfield:not([hidden])")
    page.fill("#key", served.api_key)
    page.fill("#prompt", prompt)
    page.fill("#most", "48")
    page.click("#run")
    page.wait_for_selector("#saved:not(:empty)")


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_prompt_with_exits_and_without(open_page, served, loaded, scheme, width):
    import jexit

    page = open_page(scheme, width)
    run(page, served)
    made = [
        jexit.generate(*loaded, ["sum 37295"], policy=policy, max_new_tokens=48)
        for policy in (jexit.Threshold(0.5), jexit.Full())
    ]
    for side, wanted in zip(("early", "full"), made, strict=True):
        spans = page.query_selector_all(f"#text-{side} span")
        assert len(spans) == len(wanted.depths[0])
        said = loaded[1].decode(wanted.tokens[0], keep_special=True)
        assert page.text_content(f"#text-{side}") == said
        shades = [int(span.get_attribute("class")[1:]) for span in spans]
        assert shades == [round(9 * (depth - 1) / 7) for depth in wanted.depths[0]]
        sums = f"{len(spans)} tokens, {sum(wanted.depths[0])} layers"
        assert page.inner_text(f"#numbers-{side}").startswith(sums)
    saved = 100 * (1 - sum(made[0].depths[0]) / sum(made[1].depths[0]))
    assert page.inner_text("#saved").startswith(f"The exits saved {saved:.0f} % of the layers")
    page.hover("#text-early span:nth-child(3)")
    tip = page.inner_text("#tip")
    assert f"{made[0].depths[0][2]} of 8 layers" in tip and "hazard at 1: 0." in tip
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def answer_with(page, *chunks):
    """Answers the page's requests with `chunks`, lists of the bytes of tokens, all of 3 layers."""
    lines = []
    for tokens in chunks:
        content = [
            {"token": token.decode(errors="replace"), "bytes": [*token], "logprob": -0.1}
            for token in tokens
        ]
        choice = {
            "index": 0, "depths": [3] * len(tokens), "hazards": [[0.5, None]] * len(tokens),
            "logprobs": {"content": content},
        }  # fmt: skip
        lines.append(f"data: {json.dumps({'choices': [choice]})}\n\n")
    said = "".join(lines) + "data: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=said, content_type="text/event-stream"),
    )


def test_what_a_model_writes_is_text(open_page, served):
    """Markup in tokens stays text, and the page's policy lets no other script run."""
    page = open_page()
    token = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    answer_with(page, [token.encode()])
    run(page, served)
    assert page.inner_text("#text-early") == token
    assert page.query_selector("#text-early img, #text-early script") is None
    assert "script-src 'self'" in page.request.get(served.url).headers["content-security-policy"]


def test_a_character_split_over_tokens_is_shown_once(open_page, served):
    """Each token keeps its span, and the token that completes a character shows it."""
    page = open_page()
    tokens = [b"\xef\xbb", b"\xbfa\xf0", b"\x9f\x98", b"\x80",
              b"\xc3", b"\xa9", b"b\x80c", b"\xe2\x82"]  # fmt: skip
    answer_with(page, tokens[:3], tokens[3:5], tokens[5:])
    run(page, served)
    for side in ("early", "full"):
        spans = page.query_selector_all(f"#text-{side} span")
        shown = [span.text_content() for span in spans]
        assert shown == ["", "\ufeffa", "", "😀", "", "é", "b\ufffdc", "\ufffd"]
        assert "".join(shown) == b"".join(tokens).decode(errors="replace")
        assert {span.get_attribute("class") for span in spans} == {"d3"}
        assert page.inner_text(f"#numbers-{side}").startswith("8 tokens, 24 layers")
    page.hover("#text-early span:nth-child(4)")
    assert page.inner_text("#tip").startswith('"😀"')


def test_errors_are_said_and_a_run_can_be_stopped(open_page, served, idle):
    page = open_page()
    page.wait_for_selector("#keyfield:not([hidden])")
    page.fill("#prompt", "sum 1")
    page.click("#run")
    page.get_by_text("asks for its API key").wait_for()
    page.fill("#key", served.api_key)
    page.fill("#prompt", "1" * 200)
    page.click("#run")
    page.get_by_text("but this pool allows at most").wait_for()
    assert page.is_enabled("#run") and not page.is_enabled("#stop")
    page.fill("#prompt", "sum 37295")
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    page.click("#run")
    page.click("#stop")
    page.get_by_text("stopped").wait_for()
    idle()
