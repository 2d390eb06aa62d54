"""Uses the URLs that the Python client gives, as a user's program would."""

import os
import urllib.error
import urllib.request

DOMAIN = os.environ["EDGE_MODE"] == "domain"
if DOMAIN:
    del os.environ["E2B_API_URL"], os.environ["E2B_SANDBOX_URL"]
SCHEME = "https" if DOMAIN else "http"

from frame import Box, main, same, scenario, until  # noqa: E402: the client reads the environment

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


@scenario("use a sandbox")
def use():
    global sbx
    sbx = Box.create(timeout=600, secure=True)
    assert sbx.commands.run("echo $((40+2))").stdout == "42\n"
    sbx.files.write("/home/user/a b.txt", "written")
    assert sbx.files.read("/home/user/a b.txt") == "written"
    assert sbx.is_running()


@scenario("getHost")
async def host():
    sbx.commands.run("python3 -m http.server 8000 --bind 127.0.0.1", background=True)
    url = f"{SCHEME}://{sbx.get_host(8000)}/"
    said = None

    def answers():
        nonlocal said
        said = get(url)
        return said[0] == 200

    await until(lambda: f"{url} answers, but {said}", answers)
    assert "a%20b.txt" in said[1], said


@scenario("downloadUrl")
def download():
    same(get(sbx.download_url("/home/user/a b.txt", use_signature_expiration=60)), (200, "written"))
    same(get(sbx.download_url("/home/user/a b.txt", use_signature_expiration=-10))[0], 401)


@scenario("uploadUrl")
def upload():
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="up.txt"\r\n\r\nuploaded\r\n--x--\r\n'
    status, text = get(sbx.upload_url("/home/user/up.txt"), body, "multipart/form-data; boundary=x")
    assert status == 200, (status, text)
    assert sbx.files.read("/home/user/up.txt") == "uploaded"


@scenario("end")
def end():
    assert sbx.kill()


main()
