"""An explorer in a real JupyterLab: the live widget shows, a slider answers to the arrow keys, the picture changes."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium; on Debian: apt-get install chromium")

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "runs" / "browser"
CELLS = [
    """from cmlib import data, pipeline, widgets
from cmlib.consistency import ConsistencyFunction
images, _ = data.load("digits")
student = ConsistencyFunction.load(pipeline.shipped("digits_student.safetensors"))
teacher = pipeline.load_teacher("digits_teacher")""",
    "widgets.jump_explorer(student, teacher, images)",
    "widgets.schedule_explorer(data.to_float(images[0]))",
]


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab that serves one notebook."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "explorer.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser",
        "--allow-root",
        "--IdentityProvider.token=",
        f"--ServerApp.port={port}",
        "--ServerApp.ip=127.0.0.1",
    ]
    options += [f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=None", "--LabApp.expose_app_in_browser=True"]
    private = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "RUNTIME")}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options],
        env={**os.environ, **private, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=2)
                break
            except OSError:
                assert server.poll() is None, "JupyterLab did not start"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab/tree/explorer.ipynb"
    finally:
        server.terminate()
        server.wait(20)


def test_jump_slider_by_keyboard(lab):
    PICTURES.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(lab)
        page.locator(".jp-Notebook-cell").first.wait_for()
        page.wait_for_function("window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        images = page.locator(".jp-OutputArea-output img.widget-image")
        try:
            playwright.expect(images).to_have_count(2, timeout=60_000)
        finally:
            page.screenshot(path=PICTURES / "start.png")
        line = page.locator('[role="status"]').filter(has_text="RMS distance").first
        before, picture = line.inner_text(), images.first.screenshot()
        page.screenshot(path=PICTURES / "before.png")
        page.get_by_role("slider").first.focus()
        for _ in range(12):
            page.keyboard.press("ArrowRight")
        playwright.expect(line).not_to_have_text(before, timeout=30_000)
        page.wait_for_timeout(1_500)
        page.screenshot(path=PICTURES / "after.png")
        assert images.first.screenshot() != picture
        assert float(line.inner_text().split()[2].rstrip(".")) > float(before.split()[2].rstrip(".")), "σ has grown"
        browser.close()
