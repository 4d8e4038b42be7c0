"""The page as a browser sees it, with no network."""

import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape
from pathlib import Path

import pytest

from burnish.report import read_run, render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


@pytest.fixture
def open_page(tmp_path: Path) -> Callable[..., tuple[str, list[str]]]:
    """Opens HTML text; gives the DOM as the browser holds it, and what the console said."""

    def open_(html: str, *flags: str) -> tuple[str, list[str]]:
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        command = [
            str(CHROMIUM),
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
        ]
        done = subprocess.run(
            [*command, *flags, "--dump-dom", file.as_uri()], capture_output=True, text=True, check=True, timeout=90
        )
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return open_


def test_page_opens_without_a_word_on_the_console(
    make_run: Callable[..., Path], open_page: Callable[..., tuple[str, list[str]]]
) -> None:
    dom, console = open_page(render(read_run(make_run())))
    assert console == []
    assert "<title>do-acp-k4 · Qwen3-MoE → Qwen3ForCausalLM</title>" in dom
    assert len(re.findall(r'<rect class="q\d"', dom)) == 4 * 16
    assert len(re.findall(r'<rect class="mark"', dom)) == 4 * 4 + 1
    assert not re.search(r'(src|href)="(?!#|data:,)', dom)


@pytest.mark.parametrize("kind", ["recipe", "distillation", "pruning"])
def test_every_kind_of_page_opens_without_a_word_on_the_console(
    request: pytest.FixtureRequest, open_page: Callable[..., tuple[str, list[str]]], kind: str
) -> None:
    dom, console = open_page(render(read_run(request.getfixturevalue(f"make_{kind}")())))
    assert console == []
    assert "</footer>" in dom


def test_page_with_a_foreign_resource_would_be_seen_and_blocked(
    make_run: Callable[..., Path], open_page: Callable[..., tuple[str, list[str]]]
) -> None:
    html = render(read_run(make_run()))
    foreign = '<img src="http://127.0.0.1:9/pixel.png"><script>document.title = "taken"</script>'
    dom, console = open_page(html.replace("</main>", f"{foreign}</main>"))
    assert len([line for line in console if "Content Security Policy" in line]) == 2
    assert "<title>taken" not in dom


@pytest.mark.parametrize("width", [360, 760, 1280])
def test_page_never_scrolls_sideways(
    make_sweep: Callable[[], Path],
    make_run: Callable[..., Path],
    make_recipe: Callable[[], Path],
    make_distillation: Callable[..., Path],
    make_pruning: Callable[..., Path],
    open_page: Callable[..., tuple[str, list[str]]],
    width: int,
) -> None:
    """Wide tables and maps scroll inside the page; measured in a frame, since windows have a smallest width."""
    long = make_run(4, 128, 8, name="organisation/" + "a-very-long-name-" * 8)
    for directory in (make_sweep(), long, make_recipe(), make_distillation(), make_pruning()):
        html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", render(read_run(directory)))
        frame = f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{escape(html)}"></iframe>'
        measure = (
            "onload = () => { const d = document.querySelector('iframe').contentDocument;"
            " d.querySelectorAll('details').forEach(e => e.open = true);"
            " document.title = d.documentElement.scrollWidth + ' of ' + d.documentElement.clientWidth"
            " + ', ' + [...d.querySelectorAll('.map')].some(e => e.scrollWidth > e.clientWidth); }"
        )
        dom, _ = open_page(f"<!doctype html><title></title>{frame}<script>{measure}</script>", "--window-size=1400,900")
        found = re.search(r"<title>(\d+) of (\d+), (true|false)</title>", dom)
        assert found and int(found[1]) <= int(found[2]) <= width
        if directory == long:
            assert (found[3] == "true") == (width < 1100)
