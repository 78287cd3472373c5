"""The page of examples/space in a headless Chromium, as a visitor uses it, with tiny models."""

import re
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BitImageProcessor, PreTrainedTokenizerFast

from hf_tokens.testing import zoo

BROWSER = Path(sys.prefix) / "browser"
SPACE = Path(__file__).parents[2] / "examples" / "space"
WHY = "un-skip when the extras `space` and `browser` are installed"
gradio = pytest.importorskip("gradio", reason=WHY)
playwright = pytest.importorskip("playwright.sync_api", reason=WHY)
pytestmark = [
    pytest.mark.skipif(
        not (BROWSER / "chromium").exists(), reason="un-skip when npm delivers Chromium here: `make browser`, on Linux x86_64"
    ),
    # what Gradio's queue asks of pandas
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated", "ignore:The copy keyword is deprecated"),
]
WAIT = 30_000  # milliseconds for an answer, on a machine that has other things to do
LONG = " ".join(f"word{i}" for i in range(40))


def tiny_tokenizer():
    """One id for each of the words here, the same for all others."""
    words = {"<unk>": 0, "<eos>": 1} | {f"word{i}": i + 2 for i in range(90)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def address():
    """Where the page is served, by this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        patch.syspath_prepend(SPACE)
        import app

        picture, size = zoo.build("dinov2").model.base_model, {"height": 32, "width": 32}
        processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size=size)
        page = app.build((zoo.build("llama").model, tiny_tokenizer()), (picture, processor))
        _, served, _ = app.launch(page, prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
        yield served
        page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    """Chromium with the libraries and the font that came along."""
    environment = {"LD_LIBRARY_PATH": str(BROWSER / "lib"), "FONTCONFIG_PATH": str(BROWSER), "HOME": str(BROWSER)}
    with playwright.sync_playwright() as started:
        yield started.chromium.launch(executable_path=BROWSER / "chromium", args=["--no-sandbox", "--disable-gpu"], env=environment)


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.set_default_timeout(WAIT)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(error))
    page.goto(address)
    tile(page, "text", "KV cache")
    yield page
    page.close()
    assert not wrong


def tile(page, kind, name):
    """What a number of a tab says."""
    return page.locator(f"#{kind}-result .tile", has_text=name).locator(".of").inner_text()


def changed(page, kind, name, before):
    """Wait until a number is another one, and return that."""
    row = page.locator(f"#{kind}-result .tile", has_text=name).locator(".of")
    playwright.expect(row).not_to_have_text(before, timeout=WAIT)
    return row.inner_text()


def pick(page, kind, choice):
    """Choose a method."""
    field = page.locator(f"#{kind}-choice input")
    field.fill(choice)
    page.get_by_role("option", name=choice, exact=True).click()


def share(said):
    return int(re.match(r"(\d+)%", said)[1])


def test_a_slider_changes_the_numbers(page):
    first = tile(page, "text", "KV cache")
    pick(page, "text", "snapkv")
    slider = page.get_by_role("slider", name=re.compile("budget"))
    before = changed(page, "text", "KV cache", first)
    slider.click(position={"x": slider.bounding_box()["width"] / 10, "y": 3})
    assert share(changed(page, "text", "KV cache", before)) < share(before)
    assert page.locator("#text-plot-0 img, #text-plot-1 img").count()


def test_a_picture_is_uploaded_and_seen(page, tmp_path):
    from PIL import Image

    page.get_by_role("tab", name="Picture").click()
    first = page.locator("#picture-result img").first.get_attribute("src")
    Image.radial_gradient("L").resize((90, 60)).save(tmp_path / "mine.png")
    page.locator("#picture-input").get_by_label("Remove Image").click()
    page.locator("#picture-input input[type=file]").set_input_files(tmp_path / "mine.png")
    playwright.expect(page.locator("#picture-result img").first).not_to_have_attribute("src", first, timeout=WAIT)
    assert share(tile(page, "picture", "FLOPs")) < 100


@pytest.mark.parametrize("kind", ["text", "picture"])
def test_nothing_in_the_field_is_answered_by_a_message_and_the_page_goes_on(page, kind):
    if kind == "text":
        page.locator("#text-input textarea").fill(" ")
    else:
        page.get_by_role("tab", name="Picture").click()
        page.locator("#picture-input").get_by_label("Remove Image").click()
    page.locator(f"#{kind}-run").click()
    message = page.locator(f"#{kind}-message [role=alert]")
    playwright.expect(message).to_contain_text("needs a", timeout=WAIT)
    playwright.expect(page.locator(".toast-body")).to_contain_text("needs a", timeout=WAIT)
    assert tile(page, kind, "FLOPs")
    if kind == "text":
        page.locator("#text-input textarea").fill(LONG)
        page.locator("#text-run").click()
        playwright.expect(message).to_have_count(0, timeout=WAIT)


def test_a_strength_out_of_bounds_and_a_method_that_does_not_fit_say_so(page):
    message = page.locator("#text-message [role=alert]")
    pick(page, "text", "tome")
    playwright.expect(message).to_contain_text("Choose another method or model", timeout=WAIT)
    pick(page, "text", "snapkv")
    playwright.expect(message).to_have_count(0, timeout=WAIT)
    page.get_by_text("More knobs").click()
    field = page.get_by_label(re.compile("^kernel"))
    field.fill("0")
    field.press("Enter")
    playwright.expect(message).to_contain_text("SnapKVConfig.kernel must be in [1, inf), got 0", timeout=WAIT)


def test_on_a_phone_the_result_stands_first_and_the_rest_below_it(browser, address):
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(address)
    page.locator("#text-result .tile").first.wait_for(timeout=WAIT)
    result, controls = page.locator("#text-result").bounding_box(), page.locator("#text-choice").bounding_box()
    assert result["width"] > 300 and result["x"] + result["width"] <= 390
    assert controls["y"] >= result["y"] + result["height"] and controls["x"] + controls["width"] <= 390
    page.close()
