"""Pictures of a page in a browser: as a desk, a phone and the dark have it.

python tools/screenshots.py PAGE.html FOLDER
"""

import argparse
import base64
import pathlib
import shutil

VIEWS = {
    "desktop": (1280, 900, False),
    "dark": (1280, 900, True),
    "phone": (360, 780, False),
    "phone-dark": (360, 780, True),
}
TOP = (1280, 1180, False)  # what docs/report.png shows


def start_browser():
    """A headless Chromium, driven by the installed driver; nothing is downloaded.

    Raises:
        RuntimeError: no browser, driver or selenium is there.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        raise RuntimeError("chromium and chromedriver must be installed (got none)")
    try:
        from selenium import webdriver
    except ImportError as error:
        raise RuntimeError(f"selenium must be installed (got {error})") from error
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))


def set_view(browser, width, height, is_dark=False):
    """Gives the page a size, a pointer and a theme."""
    is_phone = width < 600
    size = {"width": width, "height": height, "deviceScaleFactor": 2 if is_phone else 1, "mobile": is_phone}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": is_phone})
    theme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})


def scroll_through(browser):
    """Brings everything of the page into sight once: charts are drawn when they are seen."""
    browser.execute_async_script(
        """const done = arguments[0];
        let top = 0;
        const next = () => {
          scrollTo({ top, behavior: "instant" });
          if (top > document.documentElement.scrollHeight) {
            scrollTo({ top: 0, behavior: "instant" });
            return requestAnimationFrame(done);
          }
          top += innerHeight;
          requestAnimationFrame(() => requestAnimationFrame(next));
        };
        next();"""
    )


def picture(browser, is_whole=True):
    """The page, or what is in sight of it, as the bytes of a PNG file."""
    scroll_through(browser)
    found = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": is_whole, "format": "png"})
    return base64.b64decode(found["data"])


def main():
    """Takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    browser = start_browser()
    try:
        for name, view in {**VIEWS, "top": TOP}.items():
            set_view(browser, *view)
            browser.get(arguments.page.resolve().as_uri())
            browser.execute_async_script("const done = arguments[0]; setTimeout(done, 300)")
            (arguments.folder / f"{name}.png").write_bytes(picture(browser, name in VIEWS))
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
