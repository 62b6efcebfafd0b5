"""The whole page in a browser: no other host, phones, dark mode, contrast, and the keyboard alone."""

from urllib.parse import urlsplit

import pytest

from tests.app.browser.steps import open_tab, segment, segments_of, take_example, wait_for_text

TABS = ("Segment", "Complete", "Compare", "Batch", "Score")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}

# contrast of every visible text with the nearest opaque background, as WCAG 2.1 defines it
FAINT = """() => {
  const numbers = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => {
    const linear = [r, g, b].map((v) => (v /= 255, v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (element.closest("script, style, :disabled, [aria-hidden=true], svg, .viewer-stage")) continue;
    const box = element.getBoundingClientRect();
    if (box.width < 2 || box.height < 2) continue;
    let at = element, back = null;
    while (at && !back) {
      const color = numbers(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) back = color;
      at = at.parentElement;
    }
    back = back || [255, 255, 255];
    const [one, other] = [light(numbers(getComputedStyle(element).color)), light(back)].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    const style = getComputedStyle(element);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.6 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)} ${style.color} on ${back}`);
  }
  return found;
}"""


def through_tabs(page):
    """Visits every tab with its settings open."""
    for name in TABS:
        open_tab(page, name)
        for button in page.get_by_role("button", name="ettings").locator("visible=true").all():
            if button.get_attribute("aria-expanded") != "true" and "open" not in (button.get_attribute("class") or ""):
                button.click()
        page.wait_for_timeout(250)
        yield name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_tab_asks_another_host_and_every_text_can_be_read(visitor, url, scheme):
    page = visitor(color_scheme=scheme)
    segment(page)
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    for name in through_tabs(page):
        assert page.evaluate(FAINT) == [], name
    hosts = {urlsplit(each).netloc for each in page.asked if each.startswith("http")}
    assert hosts == {urlsplit(url).netloc}
    assert all(each.startswith(("http", "data:", "blob:")) for each in page.asked)


def test_a_phone_shows_every_tab_without_scrolling_sideways(visitor):
    page = visitor(**PHONE)
    segment(page)
    segments_of(page).nth(0).tap()
    for name in through_tabs(page):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        page.locator(f"#{name.lower()}-start").scroll_into_view_if_needed()
        outside = page.evaluate(
            """() => [...document.querySelectorAll("button, input, [role=tab], .viewer, .legend, img")]
              .filter((each) => each.checkVisibility() && !each.closest(".visually-hidden, .table-wrap"))
              .map((each) => [each, each.getBoundingClientRect()])
              .filter(([, box]) => box.width > 1 && box.height > 1 && (box.right > 391 || box.left < -1))
              .map(([each]) => each.outerHTML.slice(0, 120))"""
        )
        assert outside == [], name
        assert page.locator(f"#{name.lower()}-start").bounding_box()["height"] >= 36


def test_the_editor_fits_a_phone(visitor):
    page = visitor(**PHONE)
    open_tab(page, "Complete")
    take_example(page, "complete", 0)
    page.click("#complete-load")
    page.wait_for_selector("#complete-editor canvas")
    page.wait_for_selector("#complete-view .viewer[data-result]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator("#complete-editor").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def focus_by_tab(page, selector: str, most: int = 60) -> None:
    """Presses the tab key until the focus is on an element, which has to show it."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            shown = page.evaluate(
                "() => { const style = getComputedStyle(document.activeElement);"
                " return style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2; }"
            )
            assert shown, f"{selector}: the focus cannot be seen"
            return
    raise AssertionError(f"{selector}: the tab key does not get there")


def test_a_picture_is_segmented_and_changed_by_keys_alone(visitor):
    page = visitor()
    focus_by_tab(page, "#segment-examples button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#segment-picture img")
    focus_by_tab(page, "#segment-start")
    page.keyboard.press("Enter")
    page.wait_for_selector("#segment-view .viewer[data-result]")
    count = segments_of(page).count()
    focus_by_tab(page, "#segment-view .viewer-opacity")
    page.keyboard.press("Home")
    assert page.locator("#segment-view .viewer-tint").evaluate("canvas => canvas.style.opacity") == "0"
    focus_by_tab(page, "#segment-view .viewer-segments button")
    page.keyboard.press("Space")
    focus_by_tab(page, "#segment-view .viewer-segments button")
    page.keyboard.press("Enter")
    assert page.inner_text("#segment-view .viewer-chosen").count(",") == 1
    for _ in range(40):  # back to the tools
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.dataset.action") == "merge":
            break
    page.keyboard.press("Enter")
    page.wait_for_function(
        "count => document.querySelectorAll('#segment-view .viewer-segments li').length === count", arg=count - 1
    )


def test_every_control_has_a_name(visitor):
    page = visitor()
    for name in through_tabs(page):
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, input, select, textarea")]
              .filter((each) => each.checkVisibility() && each.type !== "file" && !each.closest("[aria-hidden=true]"))
              .filter((each) => !(each.ariaLabel || each.title || each.innerText || each.placeholder ||
                each.labels?.length || each.getAttribute("aria-labelledby")))
              .map((each) => each.outerHTML.slice(0, 160))"""
        )
        assert nameless == [], name


def test_the_stop_button_ends_work_and_the_next_goes_on(visitor):
    page = visitor()
    open_tab(page, "Compare")
    take_example(page, "compare", 0)
    page.locator("#compare-second-steps input[type=number]").fill("100")
    page.locator("#compare-second-steps input[type=number]").press("Tab")
    page.click("#compare-start")
    page.wait_for_timeout(400)
    page.click("#compare-stop")
    page.wait_for_timeout(600)
    page.locator("#compare-second-steps input[type=number]").fill("1")
    page.locator("#compare-second-steps input[type=number]").press("Tab")
    page.click("#compare-start")
    wait_for_text(page, "#compare-said", "The maps agree on")
