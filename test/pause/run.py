"""Runs the scenarios of pause_test.go with the Python client, as a user's
program would: `run.py sync` with Sandbox, `run.py async` with AsyncSandbox. It
prints a line of JSON for each: {"name", "ok", "error", "ms"}.
"""

import asyncio
import inspect
import json
import os
import re
import sys
import time
import traceback
import urllib.error
import urllib.request

from e2b import AsyncSandbox, NotFoundException, Sandbox, SandboxQuery, SandboxState

MODE = sys.argv[1]
Box = {"sync": Sandbox, "async": AsyncSandbox}[MODE]
NAME = f"kept-{MODE}-{os.getpid()}"
TIMEOUT = 300


async def do(call, *args, **kwargs):
    """Calls either client: the synchronous one in a thread."""
    if MODE == "sync":
        return await asyncio.to_thread(call, *args, **kwargs)
    out = call(*args, **kwargs)
    return await out if inspect.isawaitable(out) else out


def same(got, want):
    assert got == want, f"got {got!r}, want {want!r}"


async def until(what, seconds, f):
    end = time.monotonic() + seconds
    while not (v := await f()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.05)
    return v


def fetch(port):
    q = urllib.request.Request(
        os.environ["E2B_SANDBOX_URL"] + "/",
        headers={"E2b-Sandbox-Id": S.sandbox_id, "E2b-Sandbox-Port": str(port)},
    )
    try:
        with urllib.request.urlopen(q, timeout=30) as r:
            return r.status, r.read().decode()
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode()


async def page(port):
    return await asyncio.to_thread(fetch, port)


GUEST = """
import hashlib, http.server, os
data = bytearray(os.urandom(1 << 20) * 64)
want = hashlib.sha256(data).hexdigest()
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = ('%s %d' % (hashlib.sha256(data).hexdigest() == want, os.getpid())).encode()
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *a): pass
http.server.HTTPServer(('0.0.0.0', 8000), H).serve_forever()
"""

S = None
PID = None
SCENARIOS = []


def scenario(name):
    def add(f):
        SCENARIOS.append((name, f))
        return f

    return add


async def state(box):
    return (await do(Box.get_info, box.sandbox_id)).state


async def first(paginator):
    return await do(paginator.next_items)


@scenario("guests")
async def guests():
    global S, PID
    S = await do(Box.create, timeout=TIMEOUT, metadata={"k": "v"}, envs={"GREETING": "hello"})
    await do(S.files.write, "guest.py", GUEST)
    await do(S.commands.run, "python3 guest.py", background=True, timeout=0)

    async def served():
        return re.match(r"^True (\d+)$", (await page(8000))[1])

    PID = (await until("the array is served", 20, served))[1]


@scenario("pause")
async def pause():
    same(await do(S.pause), True)
    same((await page(8000))[0], 502)
    same(await do(S.is_running), False)
    same(await do(S.pause), False)
    info = await do(Box.get_info, S.sandbox_id)
    same((info.state, info.metadata["k"]), (SandboxState.PAUSED, "v"))
    paused = await first(Box.list(query=SandboxQuery(state=[SandboxState.PAUSED])))
    assert S.sandbox_id in [p.sandbox_id for p in paused]


@scenario("everything goes on")
async def goes_on():
    same((await do(S.connect, timeout=TIMEOUT)).sandbox_id, S.sandbox_id)
    same(await page(8000), (200, f"True {PID}"))
    same((await do(S.commands.run, "echo $GREETING")).stdout, "hello\n")


@scenario("ten pauses")
async def ten():
    for i in range(1, 11):
        same(await do(S.pause), True)
        await do(S.connect, timeout=TIMEOUT)
        if i == 5:
            await do(S.files.write, "fifth", "after the fifth resume")
    same(await do(S.files.read, "fifth"), "after the fifth resume")
    same(await page(8000), (200, f"True {PID}"))


@scenario("without memory")
async def without_memory():
    same(await do(S.pause, keep_memory=False), True)
    await do(S.connect, timeout=TIMEOUT)
    same(await do(S.files.read, "fifth"), "after the fifth resume")
    same((await page(8000))[0], 502)
    same((await do(S.commands.run, "echo $GREETING")).stdout, "hello\n")


@scenario("snapshots")
async def snapshots():
    await do(S.files.write, "state", "one")
    one = await do(S.create_snapshot)
    await do(S.files.write, "state", "two")
    two = await do(S.create_snapshot, name=NAME)
    assert two.snapshot_id.endswith(f"/{NAME}:default"), two
    listed = await first(S.list_snapshots())
    same([s.snapshot_id for s in listed], [two.snapshot_id, one.snapshot_id])
    for ref, want in [(one.snapshot_id, "one"), (two.snapshot_id, "two"), (NAME, "two")]:
        made = await do(Box.create, ref, timeout=TIMEOUT)
        same(await do(made.files.read, "/home/user/state"), want)
        await do(made.kill)
    same(await do(Box.delete_snapshot, one.snapshot_id), True)
    same(await do(Box.delete_snapshot, one.snapshot_id), False)
    same(await do(Box.delete_snapshot, two.snapshot_id), True)


@scenario("forks")
async def forks():
    await do(S.files.write, "state", "before")
    made = await do(S.fork, count=3, timeout=120)
    for f in made:
        assert not isinstance(f, Exception), f
    await do(S.files.write, "state", "source")
    await do(made[0].files.write, "state", "first")
    same(await do(made[1].files.read, "state"), "before")
    same(await do(S.files.read, "state"), "source")
    ids = [(await do(b.commands.run, "cat /etc/machine-id")).stdout for b in [S, *made]]
    same(len(set(ids)), 4)
    for f in made:
        await do(f.kill)


@scenario("pause at the end")
async def at_the_end():
    box = await do(Box.create, timeout=4, lifecycle={"on_timeout": "pause", "auto_resume": True})
    await do(box.files.write, "here", "still")

    async def paused():
        return (await state(box)) == SandboxState.PAUSED

    await until("it is paused at its end", 15, paused)

    # It is called paused from when the pause begins, so that the first read may
    # still meet the guest that is being paused.
    async def woken():
        same(await do(box.files.read, "here"), "still")
        return (await state(box)) == SandboxState.RUNNING

    await until("a read wakes it", 15, woken)
    await do(box.kill)


@scenario("kill a paused one")
async def kill_paused():
    same(await do(S.pause), True)
    same(await do(S.kill), True)
    same(await do(Box.kill, S.sandbox_id), False)
    try:
        await do(Box.connect, S.sandbox_id, timeout=TIMEOUT)
    except NotFoundException:
        return
    raise AssertionError("connecting to a sandbox that was killed works")


async def main():
    for name, run in SCENARIOS:
        began = time.monotonic()
        result = {"name": name, "ok": True}
        try:
            await run()
        except BaseException:
            result.update(ok=False, error=traceback.format_exc())
        print(json.dumps(result | {"ms": round((time.monotonic() - began) * 1000)}), flush=True)


asyncio.run(main())
os._exit(0)
