"""The page as `cmlib site` writes it, in Debian's Chromium: its pictures follow the controls and are Python's."""

import functools
import http.server
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cmlib.consistency import ConsistencyFunction, sample
from cmlib.ops import indexed_normal
from cmlib.serving import site
from cmlib.unet import UNet
from tests.small import UNET

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "runs" / "onnxruntime-web" / "dist"
PICTURES = ROOT / "runs" / "browser"
DIGITS = ROOT / "data" / "digits_student.safetensors"
SIZES = {"phone": (390, 844), "desktop": (1280, 800)}
pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium; on Debian: apt-get install chromium"),
    pytest.mark.skipif(not ASSETS.is_dir(), reason=f"no {ASSETS}; `make assets` brings it"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def address(folder):
    """`folder` behind Python's own web server, which sends no special headers."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    site.write(folder, "digits", DIGITS, assets=ASSETS)
    return folder


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(chromium, url, **options):
    """A page that may load nothing from elsewhere and write no error to the console."""
    context = chromium.new_context(**options)
    page, wrong = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("requestfailed", lambda request: wrong.append(request.url))
    context.route(lambda to: not to.startswith(url), lambda route: route.abort())
    try:
        yield page
        assert not wrong
    finally:
        context.close()


def ready(page, url):
    page.goto(url)
    playwright.expect(page.locator("#status")).to_have_text("Runs on WebAssembly, in this browser.", timeout=60_000)
    return page


@pytest.fixture(scope="module")
def page(folder, chromium):
    with address(folder) as url, opened(chromium, url, viewport={"width": 1280, "height": 800}) as page:
        yield ready(page, url)


def pixels(page, canvas):
    """What a canvas shows, [H,W] of the red channel."""
    script = "c => [c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((_, i) => i % 4 === 0)]"
    width, *values = page.locator(canvas).evaluate(script)
    return np.array(values).reshape(-1, width)


def shown(page, image, seed, level):
    playwright.expect(page.locator("#jump")).to_have_attribute("data-shown", f"{image},{seed},{level}")


def level(page):
    return int(page.locator("#level").input_value())


# ---- what it computes


def test_noise_is_python_s(page):
    script = "async (n) => [...(await import('./page/noise.js')).normal(7, 2**53 - 1, n, 2)]"
    found = np.array(page.evaluate(script, 300_000), dtype=np.float32)
    truth = indexed_normal(7, [2**53 - 1], (300_000,), stream=2)[0].numpy()
    assert np.abs(truth).max() > 4, "the tail of the ziggurat is among them"
    assert np.abs(found - truth).max() < 1e-6


@pytest.mark.parametrize("evaluations", [1, 2])
def test_images_are_python_s(page, evaluations):
    f, seeds = ConsistencyFunction.load(DIGITS), [0, 7, 2**53 - 1]
    made = page.evaluate("async ([s, k]) => [...(await student.sample(s, k)).images]", [seeds, evaluations])
    noise = [indexed_normal(0, seeds, f.image_shape, stream=k) for k in range(evaluations)]
    truth = sample(f, noise, f.levels(evaluations), f.sigma_min)
    torch.testing.assert_close(torch.tensor(made).reshape(truth.shape), truth, atol=1e-4, rtol=0)


def test_a_jump_takes_less_than_100_ms(page):
    script = "async () => { const x = student.noise([0]), all = [];"
    script += " for (let i = 0; i < 15; i++) all.push((await student.f(x, [80])).milliseconds);"
    script += " return all.sort((a, b) => a - b)[7] }"
    assert page.evaluate(script) < 100


# ---- what it shows


def test_slider_changes_the_pictures_by_keyboard(page):
    shown(page, 0, 0, level(page))
    before, noisy, start = pixels(page, "#jump"), pixels(page, "#noisy"), level(page)
    page.locator("#level").focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    shown(page, 0, 0, start + 6)
    assert (pixels(page, "#jump") != before).any() and (pixels(page, "#noisy") != noisy).any()
    playwright.expect(page.locator("#walk-said")).to_have_text(f"{start + 7} steps")
    said = page.locator("#level").get_attribute("aria-valuetext")
    assert said == page.locator("#sigma-said").inner_text() == "σ = 15.8"
    assert page.locator("#jump-said").inner_text().endswith(" ms")
    page.keyboard.press("Home")
    shown(page, 0, 0, 0)
    assert np.abs(pixels(page, "#jump") - pixels(page, "#clean")).mean() < 8, "hardly any noise, so nearly the image"
    playwright.expect(page.locator("#walk-said")).to_have_text("1 step")
    assert np.abs(pixels(page, "#walk") - pixels(page, "#clean")).mean() < 8


def test_examples_seeds_and_the_walk_that_goes_with_them(page):
    page.get_by_role("button", name="Example 4").click()
    playwright.expect(page.get_by_role("button", name="Example 4")).to_have_attribute("aria-pressed", "true")
    shown(page, 3, 0, level(page))
    noisy = pixels(page, "#noisy")
    page.get_by_label("Noise seed").fill("12")
    shown(page, 3, 12, level(page))
    assert (pixels(page, "#noisy") != noisy).any()
    playwright.expect(page.locator("#no-walk")).to_be_visible()
    page.get_by_label("Noise seed").fill("0")
    playwright.expect(page.locator("#no-walk")).to_be_hidden()


def test_draw_with_the_pointer_and_by_keyboard(page):
    page.get_by_role("button", name="Clear").click()
    assert not pixels(page, "#clean").any()
    box = page.locator("#clean").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 2.5 / 8, box["y"] + box["height"] * 1.5 / 8)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 2.5 / 8, box["y"] + box["height"] * 6.5 / 8)
    page.mouse.up()
    shown(page, -1, 0, level(page))
    expected = np.zeros((8, 8), int)
    expected[1:7, 2] = 255
    assert (pixels(page, "#clean") == expected).all(), "a fast stroke has no gaps"
    page.locator("#clean").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    expected[6, 3] = 255
    assert (pixels(page, "#clean") == expected).all()
    page.get_by_role("button", name="Invert").click()
    assert (pixels(page, "#clean") == 255 - expected).all()


def test_an_image_of_one_s_own(page, tmp_path):
    half = np.zeros((40, 64), np.uint8)
    half[:, 32:] = 255
    Image.fromarray(half).save(tmp_path / "half.png")
    page.locator("#file").set_input_files(tmp_path / "half.png")
    page.wait_for_function("document.querySelector('#clean').getContext('2d').getImageData(7, 3, 1, 1).data[0] > 250")
    assert pixels(page, "#clean")[:, :3].max() < 5 and pixels(page, "#clean")[:, 5:].min() > 250, "its middle, cut square"
    page.get_by_role("button", name="Clear").click()
    drop = """png => {
        const carried = new DataTransfer();
        carried.items.add(new File([Uint8Array.from(png)], "half.png", { type: "image/png" }));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true }));
    }"""
    page.evaluate(drop, list((tmp_path / "half.png").read_bytes()))
    page.wait_for_function("document.querySelector('#clean').getContext('2d').getImageData(7, 3, 1, 1).data[0] > 250")
    (tmp_path / "not.png").write_text("not an image")
    page.locator("#file").set_input_files(tmp_path / "not.png")
    playwright.expect(page.locator("#status")).to_have_text("not.png is not an image that this browser can read.")


def test_gallery(page):
    tiles = page.locator("#gallery button")
    playwright.expect(page.locator("#gallery")).to_have_attribute("data-shown", "0,1")
    assert tiles.count() == 36
    one = pixels(page, "#gallery button:nth-child(3) canvas")
    page.get_by_text("2", exact=True).click()
    playwright.expect(page.locator("#gallery")).to_have_attribute("data-shown", "0,2")
    two = pixels(page, "#gallery button:nth-child(3) canvas")
    assert (one != two).any()
    page.get_by_role("button", name="Next 36").click()
    playwright.expect(page.locator("#gallery")).to_have_attribute("data-shown", "36,2")
    assert " each" in page.locator("#gallery-said").inner_text()
    page.get_by_label("First seed").fill("0")
    playwright.expect(page.locator("#gallery")).to_have_attribute("data-shown", "0,2")
    page.get_by_role("button", name="Seed 2: work on it").press("Enter")
    shown(page, -1, 0, level(page))
    assert (pixels(page, "#clean") == two).all()


# ---- where it runs


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_fits_the_screen(folder, chromium, size, scheme):
    """Writes the screenshots that a person looks at."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    width, height = SIZES[size]
    with (
        address(folder) as url,
        opened(chromium, url, viewport={"width": width, "height": height}, color_scheme=scheme) as page,
    ):
        ready(page, url)
        playwright.expect(page.locator("#walk-said")).to_have_text("9 steps")
        page.screenshot(path=PICTURES / f"page-{size}-{scheme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing to scroll sideways"
        assert page.locator("#level").bounding_box()["y"] < height, "pictures and slider on one screen"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
        assert dark == (scheme == "dark")
        small = page.locator("button, input[type=range], input[type=number]").evaluate_all(
            "all => all.map(e => e.getBoundingClientRect()).filter(b => b.width && Math.min(b.width, b.height) < 24).length"
        )
        assert small == 0, "large enough for a finger"


def test_two_students_share_a_page_one_in_colour(folder, chromium, tmp_path):
    """The second has random weights and no teacher, and is drawn on with a brush of two pixels."""
    torch.manual_seed(0)
    f = ConsistencyFunction(UNet.from_config({**UNET, "sample_size": 32, "in_channels": 3, "out_channels": 3}))
    f.save(tmp_path / "student.safetensors")
    for part in ("train", "test"):
        (tmp_path / "patterns" / part).mkdir(parents=True)
        for k in range(3):
            values = np.random.default_rng(k).integers(256, size=(32, 32, 3)).astype(np.uint8)
            Image.fromarray(values).save(tmp_path / "patterns" / part / f"{k}.png")
    shutil.copytree(folder, tmp_path / "site")
    site.write(tmp_path / "site", str(tmp_path / "patterns"), tmp_path / "student.safetensors", assets=ASSETS)
    with address(tmp_path / "site") as url, opened(chromium, url) as page:
        ready(page, url)
        page.get_by_text("patterns").click()
        page.locator("#level").press("End")  # while it loads
        ready_again = "() => student.name === 'patterns' && document.querySelector('#status').textContent.startsWith('Runs')"
        page.wait_for_function(ready_again)
        assert page.locator("#examples button").count() == 3
        playwright.expect(page.locator("#no-walk")).to_have_text("This page has no teacher.")
        made = page.evaluate("async () => [...(await student.sample([5])).images]")
        truth = sample(f.eval(), indexed_normal(0, [5], f.image_shape), f.levels(1), f.sigma_min)
        torch.testing.assert_close(torch.tensor(made).reshape(truth.shape), truth, atol=1e-4, rtol=0)
        page.get_by_role("button", name="Clear").click()
        page.get_by_label("Colour").fill("#ff8000")
        page.locator("#clean").click(position={"x": 20, "y": 20})
        red = pixels(page, "#clean")
        assert (red[2:4, 2:4] == 255).all() and red.sum() == 4 * 255
        page.get_by_text("digits").click()
        page.wait_for_function(ready_again.replace("patterns", "digits"))
        shown(page, 0, 0, level(page))
        assert pixels(page, "#jump").shape == (8, 8)
        for name in ("patterns", "digits", "patterns", "digits"):  # faster than they load: the last one counts
            page.get_by_text(name, exact=True).click()
        page.wait_for_timeout(3_000)
        page.wait_for_function(ready_again.replace("patterns", "digits"))
        assert len(page.workers) == 1, "the others' workers have ended"


def test_from_the_cdn_only_what_is_pinned(folder, chromium, tmp_path):
    """The CDN, here by way of the same files; and one that sends something else."""
    shutil.copytree(folder, tmp_path / "site")
    site.write(tmp_path / "site", "digits", DIGITS)

    def answer(damage):
        def fulfil(route):
            body = (ASSETS / route.request.url.rpartition("/")[2]).read_bytes()
            route.fulfill(body=body + damage, headers={"Access-Control-Allow-Origin": "*"})

        return fulfil

    with address(tmp_path / "site") as url, opened(chromium, url) as page:
        page.context.route(site.CDN + "*", answer(b""))
        ready(page, url)
    with address(tmp_path / "site") as url:
        context = chromium.new_context()
        context.route(site.CDN + "*", answer(b" "))
        page = context.new_page()
        page.goto(url)
        playwright.expect(page.locator("#status")).to_contain_text("The student cannot be loaded", timeout=60_000)
        context.close()
