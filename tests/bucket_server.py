"""Stand-in for an object store: the part of the JSON API of Cloud Storage that gcsfs and TensorStore speak.

Objects live in memory; `gs://<any bucket>/...` leads here while `served` is entered.
"""

import contextlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

BUCKET = "bucket"


class Bucket:
    """Objects by name, with a generation that every write renews."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.lock = threading.RLock()
        self.requests: list[str] = []
        self._generation = 1_700_000_000_000_000

    def write(self, name: str, content: bytes, match: str | None = None) -> int | None:
        """Write an object; None where it has another generation than `match`, of which "0" stands for no object."""
        with self.lock:
            _, generation = self.objects.get(name, (b"", 0))
            if match is not None and int(match) != generation:
                return None
            self._generation += 1
            self.objects[name] = content, self._generation
            return self._generation

    def describe(self, name: str) -> dict[str, Any]:
        content, generation = self.objects[name]
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(generation / 1e6))
        return {
            "kind": "storage#object", "name": name, "bucket": BUCKET, "size": str(len(content)), "etag": str(generation),
            "generation": str(generation), "metageneration": "1", "timeCreated": now, "updated": now,
        }  # fmt: skip

    def list(self, prefix: str, delimiter: str) -> dict[str, Any]:
        names = sorted(name for name in self.objects if name.startswith(prefix))
        if not delimiter:
            return {"kind": "storage#objects", "items": [self.describe(name) for name in names]}
        rests = {name: name[len(prefix) :].partition(delimiter) for name in names}
        prefixes = sorted({f"{prefix}{head}{delimiter}" for head, cut, _ in rests.values() if cut})
        items = [self.describe(name) for name, (_, cut, _) in rests.items() if not cut]
        return {"kind": "storage#objects", "items": items, "prefixes": prefixes}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _reply(self, code: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _asked(self) -> tuple[str, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        self.server.bucket.requests.append(f"{self.command} {self.path}")
        return url.path, dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))

    def _written(self, name: str, content: bytes, match: str | None) -> None:
        if self.server.bucket.write(name, content, match) is None:
            self._reply(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        else:
            self._reply(200, self.server.bucket.describe(name))

    def do_GET(self) -> None:
        path, query = self._asked()
        with self.server.bucket.lock:
            if found := re.fullmatch(r"(?:/download)?/storage/v1/b/[^/]+/o/(.+)", path):
                return self._get(urllib.parse.unquote(found[1]), query)
            if re.fullmatch("/storage/v1/b/[^/]+/o", path):
                return self._reply(200, self.server.bucket.list(query.get("prefix", ""), query.get("delimiter", "")))
            if re.fullmatch("/storage/v1/b/[^/]+", path):
                return self._reply(200, {"kind": "storage#bucket", "name": path.rpartition("/")[2]})
            return self._reply(404, {"error": {"code": 404, "message": path}})

    def _get(self, name: str, query: dict[str, str]) -> None:
        if name not in self.server.bucket.objects:
            return self._reply(404, {"error": {"code": 404, "message": f"no object {name}"}})
        if query.get("alt") != "media":
            return self._reply(200, self.server.bucket.describe(name))
        content, generation = self.server.bucket.objects[name]
        headers = {"x_goog_generation": str(generation), "Content_Type": "application/octet-stream"}
        if str(generation) == query.get("ifGenerationNotMatch"):
            return self._reply(304, b"", **headers)
        if query.get("ifGenerationMatch") not in (None, str(generation)):
            return self._reply(412, {"error": {"code": 412, "message": "conditionNotMet"}})
        if found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(found[1]) if found[1] else max(len(content) - int(found[2]), 0)
            end = min(int(found[2]) + 1, len(content)) if found[1] and found[2] else len(content)
            if first >= len(content):
                return self._reply(416, {"error": {"code": 416, "message": "no such range"}})
            headers["Content_Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            return self._reply(206, content[first:end], **headers)
        return self._reply(200, content, **headers)

    def do_POST(self) -> None:
        (path, query), body = self._asked(), self._read()
        if "upload_id" in query:
            return self._received(*self.server.sessions[query["upload_id"]], body)
        if found := re.search("/o/([^/]+)/(rewriteTo|copyTo|moveTo)/(?:b/[^/]+/)?o/([^/]+)", path):
            return self._copied(urllib.parse.unquote(found[1]), urllib.parse.unquote(found[3]), found[2])
        match = query.get("ifGenerationMatch")
        if query.get("uploadType") == "media":
            return self._written(query["name"], body, match)
        if query.get("uploadType") == "multipart":
            boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, meta, content, _ = re.split(b"\r?\n?--" + re.escape(boundary), body, maxsplit=3)
            name = json.loads(re.split(b"\r?\n\r?\n", meta, maxsplit=1)[1])["name"]
            return self._written(name, re.split(b"\r?\n\r?\n", content, maxsplit=1)[1], match)
        if query.get("uploadType") == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            session = str(len(self.server.sessions))
            self.server.sessions[session] = name, match, bytearray()
            host = self.headers["Host"]
            return self._reply(200, {}, Location=f"http://{host}/upload/session?upload_id={session}")
        return self._reply(404, {"error": {"code": 404, "message": path}})

    def _copied(self, source: str, target: str, how: str) -> None:
        with self.server.bucket.lock:
            if source not in self.server.bucket.objects:
                return self._reply(404, {"error": {"code": 404, "message": f"no object {source}"}})
            self.server.bucket.write(target, self.server.bucket.objects[source][0])
            if how == "moveTo":
                del self.server.bucket.objects[source]
            described = self.server.bucket.describe(target)
        if how == "rewriteTo":
            described = {"kind": "storage#rewriteResponse", "done": True, "resource": described}
        return self._reply(200, described)

    def do_PUT(self) -> None:
        (_, query), body = self._asked(), self._read()
        self._received(*self.server.sessions[query["upload_id"]], body)

    def _received(self, name: str, match: str | None, received: bytearray, body: bytes) -> None:
        """Go on with an upload in chunks; the last one names the size."""
        received += body
        if self.headers.get("Content-Range", "").endswith("/*"):
            return self._reply(308, b"", Range=f"bytes=0-{len(received) - 1}")
        return self._written(name, bytes(received), match)

    def do_DELETE(self) -> None:
        path, query = self._asked()
        name = urllib.parse.unquote(path.partition("/o/")[2])
        with self.server.bucket.lock:
            there = self.server.bucket.objects.get(name)
            if there is None or query.get("ifGenerationMatch") not in (None, str(there[1])):
                return self._reply(404, {"error": {"code": 404, "message": f"no object {name}"}})
            del self.server.bucket.objects[name]
        return self._reply(204)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, bucket: Bucket):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bucket = bucket
        self.sessions: dict[str, tuple[str, str | None, bytearray]] = {}  # uploads in chunks, by id

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client may hang up before it has read the answer."""


@contextlib.contextmanager
def served() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """A bucket, and the environment variables by which gcsfs and TensorStore find it."""
    bucket = Bucket()
    server = _Server(bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield (
            bucket,
            {
                "STORAGE_EMULATOR_HOST": address,
                "TENSORSTORE_GCS_HTTP_URL": address,
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
                "FSSPEC_GCS_TOKEN": "anon",
            },
        )
    finally:
        server.shutdown()
        server.server_close()
