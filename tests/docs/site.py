"""Checks the documentation site: `python tests/docs/site.py FOLDER [FOLDER FOR PICTURES]`.

Every link inside the site leads to a page and a place on it. Where a Chromium is installed, every
page is opened in it: it shows a heading, all of its pictures and no error, asks nothing of other
servers, and the search finds what is there. Without one, this says so, and the rest is checked.
"""

import functools
import html.parser
import http.server
import shutil
import sys
import threading
import urllib.parse
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# What a user looks for, and the page that must be among the first results.
SEARCHES = {
    "favor_attention": "reference/functions",
    "LiteRT": "serving",
    "near keys exactly": "near-and-far",
}


class Page(html.parser.HTMLParser):
    """The links of a page, and the places that links may lead to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.places = [], set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if attributes.get("id"):
            self.places.add(attributes["id"])
        name = {"a": "href", "img": "src", "link": "href", "script": "src"}.get(tag)
        if name and attributes.get(name):
            self.links.append(attributes[name])


def pages_of(site):
    """The pages that Sphinx wrote, without templates of the theme."""
    return sorted(path for path in site.rglob("*.html") if path.parent.name != "_static")


def broken_links(site):
    """The links that lead nowhere, each with the page that has it."""
    site = site.resolve()
    pages = {path: Page(path) for path in pages_of(site)}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            target = urllib.parse.urlsplit(link)
            if target.scheme or target.netloc:
                continue
            file = (path.parent / urllib.parse.unquote(target.path)).resolve()
            file = path if not target.path else file
            place = urllib.parse.unquote(target.fragment)
            known = place in pages[file].places if file in pages and place else file.exists()
            if not known:
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, *_):
        pass


def faults_in_browser(site, browser, pictures=None):
    """What is wrong with the pages as a browser shows them."""
    from playwright.sync_api import sync_playwright

    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}/"
    faults: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab = chromium.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(60_000)
        tab.on("pageerror", lambda error: faults.append(f"{tab.url}: {error}"))
        tab.on("console", lambda line: line.type == "error" and faults.append(line.text))

        def failed(request):
            # What the search still reads when its page is left is broken off, and no fault.
            if request.failure != "net::ERR_ABORTED":
                faults.append(f"{request.failure}: {request.url}")

        tab.on("requestfailed", failed)

        def local(route):
            if route.request.url.startswith((root, "data:")):
                return route.continue_()
            faults.append(f"{tab.url} asks for {route.request.url}")
            return route.abort()

        tab.route("**/*", local)
        for path in pages_of(site):
            name = path.relative_to(site).as_posix()
            tab.goto(root + name, wait_until="load")
            if not tab.locator("h1").first.is_visible():
                faults.append(f"{name}: no heading")
            for picture in tab.locator("article img").all():
                picture.scroll_into_view_if_needed()
                if not picture.evaluate("x => x.decode().then(() => true, () => false)"):
                    faults.append(f"{name}: {picture.get_attribute('src')} does not show")
            if tab.evaluate("document.documentElement.scrollWidth > window.innerWidth + 1"):
                faults.append(f"{name}: wider than the window")
            if pictures:
                tab.screenshot(path=pictures / f"{name.replace('/', '-')}.png", full_page=True)
        for words, page in SEARCHES.items():
            tab.goto(f"{root}search.html?q={urllib.parse.quote(words)}", wait_until="load")
            found = tab.locator("#search-results li a")
            found.first.wait_for()
            tab.wait_for_load_state("networkidle")  # it reads the pages that it has found
            if not any(page in (link.get_attribute("href") or "") for link in found.all()[:10]):
                faults.append(f"search for {words}: {page} is not among the first ten results")
        if pictures:
            tab.screenshot(path=pictures / "search.png")
        chromium.close()
    server.shutdown()
    return faults


def main(site, pictures=None):
    """Ends the program with a list of what is wrong, if anything is."""
    faults = broken_links(site)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("no Chromium is installed: the pages were not opened in a browser")
    else:
        if pictures:
            pictures.mkdir(parents=True, exist_ok=True)
        faults += faults_in_browser(site, browser, pictures)
    if faults:
        raise SystemExit("\n".join(["the site has faults:", *faults]))
    print(f"{len(pages_of(site))} pages without fault: {site / 'index.html'}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(*map(Path, sys.argv[1:]))
