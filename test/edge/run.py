"""Uses the URLs that the Python client gives, as a user's program would, and
prints a line of JSON for each scenario: {"name", "ok", "error", "ms"}."""

import json
import os
import time
import traceback
import urllib.error
import urllib.request

DOMAIN = os.environ["EDGE_MODE"] == "domain"
if DOMAIN:
    del os.environ["E2B_API_URL"], os.environ["E2B_SANDBOX_URL"]
SCHEME = "https" if DOMAIN else "http"

from e2b import Sandbox  # noqa: E402: it reads the environment

PATIENCE = 60
sbx = None


def get(url, data=None, kind=None):
    req = urllib.request.Request(url, data=data)
    if kind:
        req.add_header("Content-Type", kind)
    try:
        with urllib.request.urlopen(req) as res:
            return res.status, res.read().decode()
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode()


def use():
    global sbx
    sbx = Sandbox.create(timeout=600, secure=True)
    assert sbx.commands.run("echo $((40+2))").stdout == "42\n"
    sbx.files.write("/home/user/a b.txt", "written")
    assert sbx.files.read("/home/user/a b.txt") == "written"
    assert sbx.is_running()


def host():
    sbx.commands.run("python3 -m http.server 8000 --bind 127.0.0.1", background=True)
    end = time.monotonic() + PATIENCE
    while True:
        status, text = get(f"{SCHEME}://{sbx.get_host(8000)}/")
        if status == 200:
            break
        assert time.monotonic() < end, (status, text)
        time.sleep(0.05)
    assert "a%20b.txt" in text, text


def download():
    assert get(sbx.download_url("/home/user/a b.txt", use_signature_expiration=60)) == (200, "written")
    status, _ = get(sbx.download_url("/home/user/a b.txt", use_signature_expiration=-10))
    assert status == 401, status


def upload():
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="up.txt"\r\n\r\nuploaded\r\n--x--\r\n'
    status, text = get(sbx.upload_url("/home/user/up.txt"), body, "multipart/form-data; boundary=x")
    assert status == 200, (status, text)
    assert sbx.files.read("/home/user/up.txt") == "uploaded"


def end():
    assert sbx.kill()


for name, run in {"use a sandbox": use, "getHost": host, "downloadUrl": download, "uploadUrl": upload, "end": end}.items():
    began = time.monotonic()
    error = ""
    try:
        run()
    except Exception:
        error = traceback.format_exc()
    print(json.dumps({"name": name, "ok": error == "", "error": error, "ms": int((time.monotonic() - began) * 1000)}), flush=True)
