"""A real browser without a window, driven over its DevTools pipe: no port of its own, no package beside it."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP evil.example 127.0.0.1",
    "--remote-debugging-pipe",
)
KEY_CODES = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, " ": 32}


class Browser:
    """One tab. `close` ends the browser and everything it started."""

    def __init__(self, profile: Path, *, width: int = 1280, height: int = 800) -> None:
        assert CHROMIUM
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The browser speaks on its descriptors 3 and 4; a shell puts ours there.
        shell = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        flags = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "browser", CHROMIUM, *flags],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_read)
        os.close(to_write)
        self._number, self._buffer, self.complaints = 0, b"", []
        targets = self._ask("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self._ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.tell(f"{domain}.enable")
        self.size(width, height)

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command to the tab."""
        return self._ask(method, session=self._session, **parameters)

    def size(self, width: int, height: int, *, mobile: bool = False) -> None:
        """The size of the view, in CSS pixels."""
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )

    def open(self, address: str) -> None:
        """Go to a page and wait until it is loaded."""
        self.tell("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        found = self.tell("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 20.0) -> None:
        """Until an expression of the page is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"waited for {script}; the page says {self.text()[:600]}"
            time.sleep(0.02)

    def text(self) -> str:
        """What a person reads."""
        return str(self.run("document.body ? document.body.innerText : ''"))

    def press(self, key: str, *, repeat: bool = False) -> None:
        """One key, down and up."""
        code = KEY_CODES.get(key, ord(key.upper()) if len(key) == 1 else 0)
        more: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code}
        typed = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        self.tell("Input.dispatchKeyEvent", type="keyDown", autoRepeat=repeat, **more, **typed)
        self.tell("Input.dispatchKeyEvent", type="keyUp", **more)

    def picture(self, path: Path) -> None:
        """What is seen, as a PNG."""
        path.write_bytes(base64.b64decode(self.tell("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)

    def _ask(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            if answer.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(answer["params"])[:400])

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + 60.0
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            block = os.read(self._read, 1 << 20) if ready else b""
            assert block, "the browser ended, or said nothing for a minute"
            self._buffer += block
        line, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(line))
