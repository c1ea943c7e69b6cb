"""Drives a headless Chromium by its DevTools protocol."""

import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

from support import required


class Page:
    """A page of a local file in a browser of its own; a context manager."""

    def __init__(self, file: Path, *, profile: Path):
        chromium = shutil.which("chromium") or required.absent(
            "chromium is not installed: apt-get install chromium"
        )
        self._aiohttp = required.library("aiohttp")
        self._loop = asyncio.new_event_loop()
        self._log = profile.with_suffix(".log").open("wb")
        command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += [
            "--disable-dev-shm-usage",
            "--remote-debugging-port=0",
            "--window-size=1000,800",
        ]
        command += [f"--user-data-dir={profile}", "about:blank"]
        self._url = file.as_uri()
        self._process = subprocess.Popen(command, stderr=self._log, stdout=subprocess.DEVNULL)
        self._number = 0
        # Of the page: what it logs, and what it asks the network for.
        self.messages: list[dict] = []

    def __enter__(self):
        try:
            self._loop.run_until_complete(self._connect())
            for domain in ("Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
            # The empty document before the file is "complete" too, so the address is asked for.
            self.send("Page.navigate", url=self._url)
            loaded = f"location.href === {json.dumps(self._url)}"
            self.wait_for(f"{loaded} && document.readyState === 'complete'")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        with contextlib.suppress(AttributeError):
            self._loop.run_until_complete(self._session.close())
        self._loop.close()
        self._process.terminate()
        self._process.wait(timeout=30)
        self._log.close()

    async def _connect(self):
        self._session = self._aiohttp.ClientSession()
        address = await self._until(self._address)
        targets = await self._until(lambda: self._targets(address))
        self._socket = await self._session.ws_connect(targets[0], max_msg_size=0)

    async def _address(self) -> str | None:
        found = re.search(
            r"DevTools listening on ws://([\w.:]+)/", Path(self._log.name).read_text()
        )
        return found and found[1]

    async def _targets(self, address: str) -> list[str]:
        async with self._session.get(f"http://{address}/json/list") as reply:
            targets = await reply.json()
        return [t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page"]

    async def _until(self, ask, *, seconds: float = 60):
        deadline = time.monotonic() + seconds
        while not (found := await ask()):
            assert time.monotonic() < deadline, Path(self._log.name).read_text()
            assert self._process.poll() is None, Path(self._log.name).read_text()
            await asyncio.sleep(0.1)
        return found

    def send(self, method: str, **params) -> dict:
        """Calls a method of the protocol and returns its result."""
        return self._loop.run_until_complete(self._send(method, params))

    async def _send(self, method: str, params: dict) -> dict:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = json.loads((await self._socket.receive(timeout=60)).data)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self.messages.append(message)

    def value(self, expression: str):
        """Returns the value of a JavaScript expression."""
        reply = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def wait_for(self, expression: str, *, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < deadline, expression
            time.sleep(0.05)

    def _point(self, selector: str) -> dict:
        x, y = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return {"x": x, "y": y}

    def hover(self, selector: str) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **self._point(selector))

    def click(self, selector: str) -> None:
        """Clicks with the mouse in the middle of an element."""
        where = self._point(selector) | {"button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **where)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key)
