"""The explorer served from a thread, and the browser that looks at it."""

import asyncio
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from playwright.sync_api import Browser, Page, Playwright, expect
from starlette.applications import Starlette

from headscope.explorer.connections import Connection

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@contextmanager
def serving(app: Starlette, protocol: type[asyncio.Protocol] = Connection) -> Iterator[str]:
    """Serve an application from a thread, over connections as `serve` has them; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=protocol, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def launched(playwright: Playwright) -> Browser:
    """The system's Chromium."""
    return playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)


@contextmanager
def quiet_page(browser: Browser, *, allowed: str = "404", **options) -> Iterator[Page]:
    """A page on which any script error, dialog or request elsewhere is a failure at the end.

    `allowed` is in what the console may say: it reports every answer that is a refusal.
    """
    context = browser.new_context(**({"viewport": {"width": 1440, "height": 900}} | options))
    page = context.new_page()
    page.set_default_timeout(8000)
    expect.set_options(timeout=8000)
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: troubles.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: troubles.append(request.url) if is_foreign(request.url) else None)
    yield page
    context.close()
    assert [trouble for trouble in troubles if allowed not in trouble] == []


def is_foreign(url: str) -> bool:
    """Whether a request leaves this machine."""
    return re.match(r"(http://127\.0\.0\.1:\d+/|file:|data:|blob:|about:)", url) is None
