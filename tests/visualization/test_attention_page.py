"""The interactive page of attention: its data, and its behavior in a browser."""

import base64
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

import dat_jax
from dat_jax.errors import UserError
from dat_jax.inference import attention, classification
from dat_jax.visualization import attention_page, charts
from tests.helpers.photographs import photographs
from tests.helpers.random_variables import random_variables

TINY = dict(
    num_classes=3,
    image_size=64,
    dim_stem=16,
    dims=(16, 32),
    stages=("ND", "D"),
    num_heads=(2, 4),
    num_groups=(1, 2),
    key_strides=(4, 2),
    offset_kernels=(3, 3),
    offset_range_factors=(-1, -1),
    position_bias=("table", "table"),
    use_offsets=(True, True),
    window_sizes=(7, 7),
    neighborhood_sizes=(3, 3),
    reduction_ratios=(1, 1),
    lpu=(True, True),
    conv_mlp=(True, True),
    layer_scale_init=(-1, -1),
)
HTML_NAME = "</script><b>&"


def make_classifier(directory, **options):
    """Classifier with random weights."""
    model = dat_jax.create_model("dat_pp_nano", **TINY)
    variables = random_variables(model, np.zeros((1, 64, 64, 3), np.float32))
    names = directory / "names.txt"
    names.write_text(f"{HTML_NAME}\ncat\ndog\n")
    return classification.from_trained(directory, model, variables, classes=names, **options)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return make_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def attended(classifier):
    return attention.make_attention_reader(classifier)(photographs(width=90, height=80)[0])


@pytest.fixture(scope="module")
def page(attended):
    return attention_page.make_page(
        attended, title=f"a {HTML_NAME}", query=(32, 32), block="stages_1/blocks_0", max_keys=5
    )


def read_data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def decode(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype)


def test_positions_are_in_pixels_of_the_image(attended):
    assert list(attended.blocks) == ["stages_0/blocks_0", "stages_0/blocks_1", "stages_1/blocks_0"]
    assert attended.image.shape == (64, 64, 3)
    neighbors, _, last = attended.blocks.values()
    assert (neighbors.map_shape, last.map_shape, last.groups) == ((16, 16), (8, 8), 2)
    assert (neighbors.find_query((0, 63.9)), neighbors.find_query((64, 12))) == ((0, 15), (15, 3))
    np.testing.assert_array_equal(neighbors.find_window((0, 15)), [0, 52, 12, 64])  # shifted inward
    np.testing.assert_array_equal(neighbors.find_window((5, 4)), [16, 12, 28, 24])
    np.testing.assert_array_equal(neighbors.find_keys((5, 4))[0, 4], [22, 18])  # the middle key is the query itself
    # Positions are clamped to the centers of the first and last cell, which are 8 pixels wide.
    assert last.positions.min() >= 4 - 1e-4
    assert last.positions.max() <= 60 + 1e-4
    group, key, weights = last.rank_keys((2, 3), 5)
    of_query = last.weights[:, 2 * 8 + 3].reshape(2, 2, -1).mean(axis=1)
    np.testing.assert_array_equal(weights, np.sort(of_query.ravel())[::-1][:5])
    np.testing.assert_array_equal(of_query[group, key], weights)
    np.testing.assert_allclose(last.received.sum(axis=1), 1, rtol=1e-5)


def test_page_stores_the_most_important_keys_of_every_query(page, attended):
    data = read_data(page)
    assert [block["kind"] for block in data["blocks"]] == ["N", "D", "D"]
    for packed in data["blocks"]:
        block = attended.blocks[packed["name"]]
        shape = (block.groups, block.weights.shape[1], 5)
        indices, codes = (
            decode(packed[name], kind).reshape(shape) for name, kind in (("indices", "<u2"), ("weights", "<u2"))
        )
        expected = -np.sort(-block.group_weights, axis=-1)[..., :5]
        np.testing.assert_array_equal(np.take_along_axis(block.group_weights, indices.astype(int), axis=-1), expected)
        np.testing.assert_allclose(packed["scale"] * codes / 65535, expected, atol=packed["scale"] / 65535)
    np.testing.assert_array_equal(decode(packed["positions"], "<f4"), block.positions.ravel())


def test_class_names_are_escaped_and_nothing_is_downloaded(page):
    assert page.count("</script>") == page.count("<script") == 2
    assert "a &lt;/script&gt;&lt;b&gt;&amp;</title>" in page
    assert HTML_NAME in dict(read_data(page)["classes"])
    assert not re.search(r'(src|href)="|@import|url\((?!#)|fetch\(', page.replace("url(#arrow)", ""))


def test_pages_of_large_images_store_fewer_keys_and_at_least_one(attended):
    blocks = list(attended.blocks.values())  # 256 queries in each of two blocks, and 64 queries with two groups
    assert attention_page.choose_count(blocks, 16) == 16
    assert attention_page.choose_count(blocks * 300, 16) == 3_000_000 // (4 * 640 * 300)
    assert attention_page.choose_count(blocks * 10_000, 16) == 1


@pytest.mark.parametrize("count", [3, 10, 16, 30])
def test_groups_have_different_colors(count):
    assert len(set(charts.make_group_colors(count))) == count


def test_pixels_of_the_image_are_located_in_the_network_input(tmp_path):
    cropped = make_classifier(tmp_path, image_size=64, resize=80)  # by 8 pixels on each side
    assert attention.find_input_point(cropped, (160, 40), None) == (32, 32)
    assert attention.find_input_point(cropped, (160, 40), (79.5, 19.5)) == (32, 32)
    resized = dataclasses.replace(cropped, options={**cropped.options, "resize": 64})
    assert attention.find_input_point(resized, (80, 90), (0, 89)) == (0.4, 89.5 * 64 / 90)
    with pytest.raises(UserError, match=r"query 3,20 .* Y from 16 to 143 and X from 4 to 35\."):
        attention.find_input_point(cropped, (160, 40), (3, 20))
    with pytest.raises(UserError, match=r"query 20,40 lies outside the image of 160 x 40 pixels"):
        attention.find_input_point(cropped, (160, 40), (20, 40))


@pytest.fixture
def opened(page, tmp_path):
    """The page in Chromium of the system or of Playwright, and a list of console messages and network requests."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    with sync_api.sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"there is no Chromium that starts: {str(error).splitlines()[0]}")
        tab, messages = browser.new_page(viewport={"width": 900, "height": 800}), []
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or messages.append(request.url))
        tab.goto((tmp_path / "page.html").as_uri())
        tab.wait_for_selector("body[data-ready=true]")
        yield tab, messages
        browser.close()


def test_clicks_and_arrow_keys_select_a_query(opened, attended):
    tab, messages = opened
    figure = tab.locator("#figure")

    def shown():  # (group, key) by rank
        script = "rows => rows.map(row => [Number(row.cells[1].textContent), Number(row.dataset.key)])"
        return [tuple(pair) for pair in tab.eval_on_selector_all("#values tr", script)]

    def expected(name, row, column):
        return list(zip(*map(list, attended.blocks[name].rank_keys((row, column), 5)[:2]), strict=True))

    box = figure.bounding_box()
    click = lambda y, x: figure.click(position={"x": x * box["width"], "y": y * box["height"]})  # noqa: E731
    at = lambda: tuple(int(figure.locator("#query").get_attribute(f"data-{name}")) for name in ("row", "column"))  # noqa: E731
    first = shown()
    assert at() == (4, 4)
    assert set(first) == set(expected("stages_1/blocks_0", 4, 4))
    click(0.05, 0.95)
    assert at() == (0, 7)
    assert set(shown()) == set(expected("stages_1/blocks_0", 0, 7)) != set(first)
    assert tab.locator("#keys circle").count() == 5
    figure.press("ArrowDown")
    figure.press("ArrowRight")  # at the border already
    assert at() == (1, 7)
    assert set(shown()) == set(expected("stages_1/blocks_0", 1, 7))
    assert "row 1, column 7 of 8 x 8" in tab.inner_text("#status")

    tab.select_option("#group", "1")
    assert {group for group, _ in shown()} == {1}
    assert tab.locator("#points circle").count() == 0
    for name in ("points", "references", "offsets"):
        tab.check(f"#show-{name}")
    assert [tab.locator(f"#{name} > *").count() for name in ("points", "references", "offsets")] == [16, 16, 16]

    tab.select_option("#block", "stages_0/blocks_0")  # a window, clamped at the corner
    click(0.01, 0.01)
    window = tab.locator("#window rect").first
    assert [float(window.get_attribute(name)) for name in ("x", "y", "width", "height")] == [0, 0, 12, 12]
    assert set(shown()) == set(expected("stages_0/blocks_0", 0, 0))
    assert tab.locator("#points circle").count() == 0
    assert messages == []


def test_page_fits_narrow_screens_and_follows_the_color_scheme(opened):
    tab, messages = opened
    tab.set_viewport_size({"width": 340, "height": 700})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 340
    assert tab.locator("#title b").count() == tab.locator("#classes b").count() == 0
    tab.emulate_media(color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    assert messages == []
