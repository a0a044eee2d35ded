"""`halfpass report RUN --live`: the report of a run that goes on, as a page on this machine that keeps up with it.

The page is drawn again whenever a run's files change. It is served on 127.0.0.1 alone, at a free port, until Ctrl-C, or
STAY_SECONDS after all runs are finished. Tests: tests/test_live_report.py.
"""

import dataclasses
import html
import json
import re
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from halfpass.errors import InputError
from halfpass.report.page import render
from halfpass.report.runs import Run, read_run
from halfpass.run.live import seconds_said

LOOK_SECONDS = 1.0  # from one look at the files to the next
STAY_SECONDS = 60.0  # for the last page to be seen, once all runs are finished
FILES = ("config.yaml", "metrics.jsonl", "result.json")
SCRIPT = """<script>
(() => {
  const page = "halfpass-live", version = VERSION, banner = document.getElementById("halfpass-live");
  const kept = JSON.parse(sessionStorage.getItem(page) || "null");
  if (kept) {
    document.querySelectorAll("details").forEach((one, i) => { one.open = kept.open[i] ?? one.open; });
    scrollTo(0, kept.y);
  }
  const again = () => {
    const open = [...document.querySelectorAll("details")].map((one) => one.open);
    sessionStorage.setItem(page, JSON.stringify({ y: scrollY, open }));
    location.reload();
  };
  const look = async () => {
    try {
      const said = await (await fetch("/state", { cache: "no-store" })).json();
      if (said.version !== version) return again();
      banner.textContent = said.banner;
      if (said.finished) return;
    } catch {
      banner.textContent = "No longer live: halfpass report has ended. This is what it showed last.";
      return;
    }
    setTimeout(look, 1000);
  };
  setTimeout(look, 1000);
})();
</script>"""
BANNER = (
    '<p id="halfpass-live" role="status" style="position:sticky;top:0;z-index:9;margin:0;padding:.5rem 1.25rem;'
    'background:#1f2933;color:#fff;font:15px/1.4 system-ui,sans-serif">{}</p>'
)


@dataclasses.dataclass
class _Page:
    """What is served."""

    version: int = 0  # of the page, which is loaded again where it is another
    body: str = ""
    banner: str = ""
    finished: bool = False

    def whole(self) -> bytes:
        """With the banner on top, and the script that keeps up."""
        banner = BANNER.format(html.escape(self.banner))
        begun = re.sub(r"<body[^>]*>", lambda found: found[0] + banner, self.body, count=1)
        return begun.replace("</body>", SCRIPT.replace("VERSION", str(self.version)) + "</body>").encode()

    def state(self) -> bytes:
        said = {"version": self.version, "banner": self.banner, "finished": self.finished}
        return json.dumps(said).encode()


def show_live(runs: Callable[[], Sequence[Path]], announce: Callable[[str], None]) -> bool:
    """Serves the page of what `runs` names, which is asked for anew each time; `announce` is told its address. Returns
    whether all runs are finished; Ctrl-C ends it before."""
    page = _Page()
    seen = _look(page, runs(), None)
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(page)) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            announce(f"http://127.0.0.1:{server.server_port}/")
            _keep_up(page, runs, seen)
        except KeyboardInterrupt:
            pass
        finally:
            server.shutdown()
    return page.finished


def _keep_up(page: _Page, runs: Callable[[], Sequence[Path]], seen: object) -> None:
    until = time.monotonic() + STAY_SECONDS if page.finished else None
    while until is None or time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
        seen = _look(page, runs(), seen)
        if not page.finished:
            until = None
        elif until is None:
            until = time.monotonic() + STAY_SECONDS


def _signature(folders: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Changes where one of the runs' files does."""
    files = [folder / name for folder in folders for name in FILES]
    return [(str(file), (said := file.stat()).st_mtime_ns, said.st_size) for file in files if file.is_file()]


def _look(page: _Page, folders: Sequence[Path], seen: object) -> list[tuple[str, int, int]]:
    """Draws the page again, where the files are not as they were `seen`."""
    now = _signature(folders)
    begun = [folder for folder in folders if (folder / "config.yaml").is_file()]
    try:
        found = [read_run(folder) for folder in begun]
    except InputError as error:  # it is being written, or is broken
        page.banner = str(error)
        return now
    page.banner = "; ".join(map(_said, found)) or f"Waiting for a run in {', '.join(map(str, folders))}"
    finished = bool(found) and len(begun) == len(folders) and all(run.result is not None for run in found)
    if now != seen or not page.body:
        page.body = render([_quiet(run) for run in found]) if found else _empty(page.banner)
        page.version += 1
    page.finished = finished
    return now


def _quiet(run: Run) -> Run:
    """Without the notes that an unfinished run is unfinished, and has no row yet: the banner says how far it is."""
    return run if run.result is not None else dataclasses.replace(run, notes=())


def _said(run: Run) -> str:
    """Of a run: how far it is."""
    name, epochs = run.path.resolve().name, run.settings.get("train.epochs")
    if run.result is not None:
        return f"{name}: finished, {epochs} epochs"
    seconds: dict[int, float] = {}
    for row in run.metrics:
        took = (row.get("busy_seconds") or 0.0) + (row.get("waiting_seconds") or 0.0)
        seconds[row["epoch"]] = max(seconds.get(row["epoch"], 0.0), took)
    if not seconds or not isinstance(epochs, int):
        return f"{name}: running, epoch 1 of {epochs}, no epoch is done yet"
    done, last = max(seconds), (run.path / "metrics.jsonl").stat().st_mtime
    ago = max(0.0, time.time() - last)
    left = max(0.0, (epochs - done) * sum(seconds.values()) / len(seconds) - ago)
    going = f"epoch {min(done + 1, epochs)} of {epochs}, about {seconds_said(left)} left"
    return f"{name}: running, {going}; the last epoch ended {seconds_said(ago)} ago"


def _empty(text: str) -> str:
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>halfpass report</title></head>'
        f"<body><p>{html.escape(text)}</p></body></html>"
    )


def _handler(page: _Page) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0

        def do_GET(self) -> None:
            host = self.headers.get("Host", "").partition(":")[0]
            if host not in ("127.0.0.1", "localhost"):  # another page's name for this address
                return self.send_error(HTTPStatus.FORBIDDEN)
            if self.path == "/":
                return self._answer(page.whole(), "text/html; charset=utf-8")
            if self.path == "/state":
                return self._answer(page.state(), "application/json")
            return self.send_error(HTTPStatus.NOT_FOUND)

        def _answer(self, body: bytes, kind: str) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Nothing: nobody wants to read of each look."""

    return Handler
