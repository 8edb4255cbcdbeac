"""Index the reports of all studies and serve them on this machine.

Writes index.html into the folder of studies, then serves that folder on 127.0.0.1, at the port that PORT in the environment
names (8000; when taken, the next free one). The index is made anew at each visit. Ctrl-C ends it.
"""

import argparse
import errno
import os
import signal
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

from lib import atomic
from lib.errors import UserError, reported
from lib.paths import ROOT, shown
from lib.report.index import collect, render

HOST = "127.0.0.1"  # reports are for the person at this machine; nothing else is ever bound
DEFAULT_PORT, FURTHER_PORTS = 8000, 20


class Handler(SimpleHTTPRequestHandler):
    """Files of one folder and nothing outside it; `/` is the index as of now."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        suffix: "text/plain; charset=utf-8" for suffix in (".log", ".jsonl", ".md", ".config", ".mk", ".csv")}

    def send_head(self) -> Any:
        name = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        if name not in (HOST, "localhost"):  # a page elsewhere must not read results by a name that it points at this machine
            return self.send_error(HTTPStatus.FORBIDDEN, "This server answers to 127.0.0.1 and localhost")
        root, path = Path(self.directory).resolve(), Path(self.translate_path(self.path)).resolve()
        served = [path, path / "index.html", path / "index.htm"]  # of a folder, its own index would be sent
        if not all(p.resolve().is_relative_to(root) for p in served):
            return self.send_error(HTTPStatus.NOT_FOUND)
        if path in (root, root / "index.html"):
            return self.send_index()
        return super().send_head()

    def send_index(self) -> Any:
        body = index(Path(self.directory)).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return BytesIO(body)

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def log_request(self, *args: Any) -> None:
        pass  # errors are still printed


def index(folder: Path) -> str:
    try:
        return render(collect(folder))
    except ModuleNotFoundError as error:
        raise UserError(f"the index needs {error.name}, which is not installed.",
                        f"python -m pip install {error.name}.") from None


def wanted_port(text: str) -> int:
    if not text:
        return DEFAULT_PORT
    if not (text.isdecimal() and text.isascii() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise UserError(f"PORT='{text}' is not a port from 1 to 65535.", "make browse PORT=8000.")
    return int(text)


def listening(folder: Path, port: int) -> ThreadingHTTPServer:
    """A server at `port`, or at the next one that is free."""
    last = min(port + FURTHER_PORTS, 65535)
    for candidate in range(port, last + 1):
        try:
            server = ThreadingHTTPServer((HOST, candidate), partial(Handler, directory=str(folder)))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            raise UserError(f"port {candidate} cannot be used: {error.strerror}.", "make browse PORT=8000.") from None
        if candidate != port:
            print(f"port {port} is taken, so this is {candidate}", flush=True)
        return server
    raise UserError(f"ports {port} to {last} are all taken.", "make browse PORT=... with a port that is free.")


def write_index(folder: Path) -> None:
    try:
        atomic.write_text(folder / "index.html", index(folder))
    except OSError as error:
        raise UserError(f"{shown(folder)} cannot be written: {error.strerror}.",
                        "make browse as someone who may write there.") from None
    print(f"written to {shown(folder / 'index.html')}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.browse", description=__doc__)
    parser.add_argument("folder", nargs="?", default=ROOT / "test_matrix_results", type=Path, help="the folder of studies")
    parser.add_argument("--no-serve", action="store_true", help="only write the index")
    args = parser.parse_args()
    port = wanted_port(os.environ.get("PORT", ""))
    if not args.folder.is_dir():
        raise UserError(f"there is no folder {shown(args.folder)}.", "make runs a study and creates it.")
    write_index(args.folder)
    if args.no_serve:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that started this in the background had it ignored
    try:
        with listening(args.folder, port) as server:
            print(f"http://{HOST}:{server.server_port}/ shows it; Ctrl-C ends", flush=True)
            server.serve_forever()
    except KeyboardInterrupt:
        print(flush=True)


if __name__ == "__main__":
    with reported():
        main()
