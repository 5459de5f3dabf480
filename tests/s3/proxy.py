"""A proxy on loopback between an S3 client and an S3 server. It injects faults by a plan and notes every request."""

import contextlib
import http.client
import http.server
import random
import re
import threading
import time
import urllib.parse
from typing import NamedTuple

BODIES = {
    500: ("InternalError", "We encountered an internal error. Please try again."),
    503: ("SlowDown", "Please reduce your request rate."),
    403: ("AccessDenied", "Access Denied"),
    400: ("ExpiredToken", "The provided token has expired."),
    409: ("ConditionalRequestConflict", "A conflicting operation occurred."),
}
FAULTS = (500, 503, "cut", "lost", "cut answer", "cut request", "delay")
"""Answers of the server; no answer; done but no answer; half an answer; half a request taken; a late answer."""


class Request(NamedTuple):
    """What is asked: kind, bucket, key, the query, and which attempt at this very thing it is; by whom, in which call.

    A call is one attempt of botocore; the client below it may send it again by itself.
    """

    kind: str
    bucket: str
    key: str
    query: str
    attempt: int
    access_key: str
    call: str


class Entry(NamedTuple):
    """What happened: when a request came, what it was, what was done to it, and the status that was sent."""

    at: float
    request: Request
    fault: object
    status: int | None


def kind_of(method, key, query, headers):
    """The operation by its name in the S3 interface, so far as these tests tell them apart."""
    if method == "POST":
        for name, kind in (("delete", "DELETE"), ("uploads", "CREATE"), ("uploadId", "COMPLETE")):
            if name in query:
                return kind
    if method == "PUT":
        return "PART" if "partNumber" in query else "CONDITIONAL" if "If-None-Match" in headers else "PUT"
    if method == "GET" and not key:
        return "UPLOADS" if "uploads" in query else "LIST" if "list-type" in query else f"GET {sorted(query)}"
    if method == "DELETE":
        return "ABORT" if "uploadId" in query else "DELETE"
    return method


class SeededPlan:
    """Faults for a share of all requests, at most `most` in a row for the same one; the same whatever the order."""

    def __init__(self, seed, share, faults=FAULTS, most=2):
        self.seed, self.share, self.faults, self.most = seed, share, faults, most

    def __call__(self, request):
        dice = random.Random(f"{self.seed} {request[:5]}")
        if request.attempt >= self.most or dice.random() >= self.share:
            return None
        return dice.choice([fault for fault in self.faults if fits(fault, request.kind)])


def fits(fault, kind):
    """Whether a fault makes sense for a kind: an empty answer has no middle, nor has an empty request."""
    if fault == "cut request":
        return kind in ("PUT", "CONDITIONAL", "PART", "COMPLETE", "DELETE")
    return fault != "cut answer" or kind in ("GET", "LIST", "CREATE", "COMPLETE")


class Proxy:
    """The proxy. `plan` maps a Request to None, a fault, (status, body) or a callable that gives one of these."""

    def __init__(self, target, delay=0.05):
        self.delay = delay
        self.target = urllib.parse.urlsplit(target)
        self.plan = lambda _: None
        self.log = []
        self._attempts = {}
        self._lock = threading.Lock()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                proxy.handle(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *_):
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_):
                pass  # clients that are killed leave in the middle of things

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def reset(self, plan=lambda _: None):
        """Another plan, and an empty log."""
        with self._lock:
            self.plan, self.log, self._attempts = plan, [], {}

    def entries(self, **wanted):
        """What was noted of the requests whose fields are as wanted."""
        return [e for e in list(self.log) if all(getattr(e.request, name) == value for name, value in wanted.items())]

    def handle(self, handler):
        at = time.monotonic()
        request = self._request(handler)
        fault = self.plan(request)
        if callable(fault):
            fault = fault()
        entry = Entry(at, request, fault, None)
        try:
            entry = entry._replace(status=self._answer(handler, request, fault))
        finally:
            self.log.append(entry)

    def _request(self, handler):
        split = urllib.parse.urlsplit(handler.path)
        query = urllib.parse.parse_qs(split.query, keep_blank_values=True)
        bucket, _, key = urllib.parse.unquote(split.path).lstrip("/").partition("/")
        kind = kind_of(handler.command, key, query, handler.headers)
        access_key = re.search(r"Credential=([^/]+)/", handler.headers.get("Authorization", ""))
        # an upload's number is random
        shown = re.sub(r"uploadId=[^&]*", "uploadId", split.query) + handler.headers.get("Range", "")
        with self._lock:
            attempt = self._attempts.get((kind, bucket, key, shown), 0)
            self._attempts[kind, bucket, key, shown] = attempt + 1
        call = "".join(handler.headers.get(f"amz-sdk-{name}", "") for name in ("invocation-id", "request"))
        return Request(kind, bucket, key, shown, attempt, access_key.group(1) if access_key else "", call)

    def _answer(self, handler, request, fault):
        length = int(handler.headers.get("Content-Length", 0))
        if fault == "cut request":
            handler.rfile.read(length // 2)
            return self._cut(handler)
        body = handler.rfile.read(length)
        assert len(body) == length, "the client left"
        if fault == "delay":
            time.sleep(self.delay)
        if fault == "cut":
            return self._cut(handler)
        if isinstance(fault, tuple):
            (status, content), sent = fault, [("Content-Type", "application/xml")]
        elif isinstance(fault, int):
            status, (code, message) = fault, BODIES[fault]
            content = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
            sent = [("Content-Type", "application/xml")]
        else:
            status, sent, content = self._forward(handler, body)
        if fault == "lost":
            return self._cut(handler)
        handler.send_response_only(status)
        declared = "0"
        for name, value in sent:
            if name.lower() == "content-length":
                declared = value
            elif name.lower() not in ("transfer-encoding", "connection"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", declared if handler.command == "HEAD" else str(len(content)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content[: len(content) // 2] if fault == "cut answer" else content)
        handler.wfile.flush()
        return self._cut(handler) if fault == "cut answer" else status

    def _forward(self, handler, body):
        connection = http.client.HTTPConnection(self.target.hostname, self.target.port, timeout=60)
        with contextlib.closing(connection):
            headers = {name: value for name, value in handler.headers.items() if name.lower() != "expect"}
            connection.request(handler.command, handler.path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    @staticmethod
    def _cut(handler):
        handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.connection.shutdown(2)
