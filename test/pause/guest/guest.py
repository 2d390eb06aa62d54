"""The guest of the tests of pauses: everything in it goes on over a pause, and
it notices what is lost. Port 8000 answers whether the array is whole and which
process answers; /state tells the rest, as JSON.

Arguments: MiB of the array; MiB that are written to the disk in a second.
"""

import hashlib
import http.server
import json
import os
import random
import socket
import sqlite3
import sys
import threading
import time

size, rate = int(sys.argv[1]), float(sys.argv[2])
home = os.path.expanduser("~")
data = bytearray(os.urandom(1 << 20) * size)
want = hashlib.sha256(data).hexdigest()
done = {"count": 0, "rows": 0, "echoes": 0, "files": 0}
errors = []


def forever(step, rest):
    """Runs step over and over; the first thing wrong is told, and ends it."""

    def run():
        n = 0
        try:
            while True:
                n += 1
                step(n)
                time.sleep(rest)
        except BaseException as err:
            errors.append(f"{step.__name__} {n}: {err!r}")

    threading.Thread(target=run, daemon=True).start()


def count(n):
    done["count"] = n
    with open("/tmp/count.new", "w") as f:
        f.write(f"{n} {os.getpid()}")
    os.rename("/tmp/count.new", "/tmp/count")


db = sqlite3.connect(home + "/db", check_same_thread=False)
db.execute("create table if not exists t (n integer)")
db.commit()


def rows(n):
    db.execute("insert into t values (?)", (n,))
    db.commit()
    done["rows"] = n


listener = socket.create_server(("127.0.0.1", 0))
near = socket.create_connection(listener.getsockname())
far = listener.accept()[0]


def reply(n):
    got = far.recv(8, socket.MSG_WAITALL)
    assert got == n.to_bytes(8, "big"), f"the peer received {got!r}"
    far.sendall(got)


def echoes(n):
    near.sendall(n.to_bytes(8, "big"))
    got = near.recv(8, socket.MSG_WAITALL)
    assert got == n.to_bytes(8, "big"), f"received {got!r}"
    done["echoes"] = n


sums = {}
os.makedirs(home + "/load", exist_ok=True)


def files(n):
    name, block = f"{home}/load/{n % 16}", random.randbytes(1 << 18)
    with open(name, "wb") as f:
        f.write(block)
        os.fsync(f.fileno())
    sums[name] = hashlib.sha256(block).digest()
    name = random.choice(list(sums))
    with open(name, "rb") as f:
        assert hashlib.sha256(f.read()).digest() == sums[name], f"{name} has another content"
    done["files"] = n


forever(count, 0.02)
forever(rows, 0.02)
forever(reply, 0)
forever(echoes, 0.01)
if rate:
    forever(files, 0.25 / rate)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        whole = hashlib.sha256(data).hexdigest() == want
        body = f"{whole} {os.getpid()}"
        if self.path == "/state":
            body = json.dumps({"whole": whole, "pid": os.getpid(), "done": done, "errors": errors})
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128


Server(("0.0.0.0", 8000), Handler).serve_forever()
