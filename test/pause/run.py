"""Runs the scenarios of pause_test.go with the Python client."""

import asyncio
import json
import os
import re
import time
import urllib.error
import urllib.request

from e2b import (
    NotFoundException,
    PtySize,
    SandboxException,
    SandboxNotFoundException,
    SandboxQuery,
    SandboxState,
)

from frame import MODE, Box, do, fails, main, same, scenario, until

NAME = f"kept-{MODE}-{os.getpid()}"
TIMEOUT = 300


def fetch(box, port, path):
    q = urllib.request.Request(
        os.environ["E2B_SANDBOX_URL"] + path,
        headers={"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": str(port)},
    )
    try:
        with urllib.request.urlopen(q, timeout=30) as r:
            return r.status, r.read().decode()
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode()


async def page(port, path="/", box=None):
    return await asyncio.to_thread(fetch, box or S, port, path)


async def state_of(port):
    status, body = await page(port, "/state")
    same(status, 200)
    return json.loads(body)


async def well():
    """Asks both guests how they are: nothing is lost."""
    for port, pid in [(8000, PID), (3000, NODE)]:
        s = await state_of(port)
        same((s["whole"], s["pid"], s["errors"]), (True, int(pid), []))


class Terminal:
    """A shell on a terminal, and what it has shown."""

    def __init__(self):
        self.out = b""

    async def open(self):
        if MODE == "sync":
            self.follow(await do(S.pty.create, PtySize(rows=24, cols=80), timeout=0))
        else:
            self.follow(await S.pty.create(PtySize(rows=24, cols=80), on_data=self.take, timeout=0))

    async def connect(self):
        self.out = b""
        if MODE == "sync":
            self.follow(await do(S.pty.connect, self.pid, timeout=0))
        else:
            self.follow(await S.pty.connect(self.pid, on_data=self.take, timeout=0))

    def take(self, data):
        self.out += bytes(data)

    def follow(self, handle):
        self.pid = handle.pid
        wait = do(handle.wait, on_pty=self.take) if MODE == "sync" else handle.wait()
        asyncio.ensure_future(wait).add_done_callback(lambda f: f.cancelled() or f.exception())

    async def says(self, what, text):
        await do(S.pty.send_stdin, self.pid, what.encode())

        async def said():
            return text.encode() in self.out

        await until(f"the terminal says {text!r}", said)


INTEGRITY = (
    "python3 -c \"import sqlite3; db = sqlite3.connect('/home/user/db', timeout=60); "
    "print(db.execute('pragma integrity_check').fetchone()[0], db.execute('select count(*) = max(n) from t').fetchone()[0])\""
)


async def out(command):
    return (await do(S.commands.run, command)).stdout


S = None
T = Terminal()
PID = NODE = None


async def state(box):
    return (await do(Box.get_info, box.sandbox_id)).state


async def first(paginator):
    return await do(paginator.next_items)


@scenario("guests")
async def guests():
    global S, PID, NODE
    S = await do(Box.create, timeout=TIMEOUT, metadata={"k": "v"}, envs={"GREETING": "hello"})
    for name in ["guest.py", "guest.js"]:
        with open("guest/" + name, "rb") as f:
            await do(S.files.write, name, f.read())
    await do(S.commands.run, "python3 guest.py 32 0.5", background=True, timeout=0)
    await do(S.commands.run, "node guest.js", background=True, timeout=0)
    await T.open()
    await T.says('KEPT=in-this-shell; echo rea""dy\n', "ready")

    async def served():
        return re.match(r"^True (\d+)$", (await page(8000))[1])

    async def node():
        return re.match(r"^node (\d+) 1$", (await page(3000))[1])

    PID = (await until("the array is served", served))[1]
    NODE = (await until("the port is open", node))[1]


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
    same(await page(3000), (200, f"node {NODE} 2"))
    await well()
    before = (await state_of(8000))["done"]

    async def goes():
        return all(n > before[what] for what, n in (await state_of(8000))["done"].items())

    await until("everything in the guest goes on", goes)
    began = time.time()
    clock = float(await out("date +%s.%N"))
    assert began - 0.1 < clock < time.time() + 0.1, f"the guest's clock is {clock - began} s off"
    same(await out(INTEGRITY), "ok 1\n")
    same(await out("echo $GREETING"), "hello\n")
    # The terminal has its shell; a client takes it up again.
    await T.connect()
    await T.says('echo "<$KEPT>"\n', "<in-this-shell>")


@scenario("ten pauses")
async def ten():
    for i in range(1, 11):
        same(await do(S.pause), True)
        await do(S.connect, timeout=TIMEOUT)
        if i == 5:
            await do(S.files.write, "fifth", "after the fifth resume")
    same(await do(S.files.read, "fifth"), "after the fifth resume")
    await well()
    same(await out(INTEGRITY), "ok 1\n")


@scenario("by ID alone")
async def by_id():
    global S
    id = S.sandbox_id
    same(await do(Box.pause, id), True)
    same(await do(Box.pause, id), False)
    await fails(SandboxException, Box.set_timeout, id, 100)
    S = await do(Box.connect, id, timeout=100)

    async def left():
        end = (await do(Box.get_info, id)).end_at
        return end.timestamp() - time.time()

    assert 80 < await left() < 120
    # It is never shortened by who connects, and is extended by him.
    await do(S.connect, timeout=10)
    assert await left() > 60
    await do(Box.connect, id, timeout=TIMEOUT)
    assert await left() > 200
    same(await do(Box.beta_pause, id), True)
    # Twice at once is one resume.
    both = await asyncio.gather(do(Box.connect, id, timeout=TIMEOUT, on_resume="restore"), do(Box.connect, id, timeout=TIMEOUT))
    for b in both:
        same(await do(b.is_running), True)
    await well()
    # It is asked first whether the guest answers.
    same(await do(S.pause, strict=True), True)
    await do(S.connect, timeout=TIMEOUT)
    for call in [Box.pause, Box.connect, Box.create_snapshot, Box.fork]:
        await fails(SandboxNotFoundException, call, "i00000000000000000000")


@scenario("without memory")
async def without_memory():
    same(await do(S.pause, mode="filesystem"), True)
    await do(S.connect, timeout=TIMEOUT)
    same(await do(S.files.read, "fifth"), "after the fifth resume")
    same((await page(8000))[0], 502)
    same(await out(INTEGRITY), "ok 1\n")
    same(await out("echo $GREETING"), "hello\n")
    # Asked for at the resume.
    await do(S.commands.run, "sleep 1000", background=True, timeout=0)
    same(await do(S.pause, keep_memory=True), True)
    await do(S.connect, timeout=TIMEOUT, on_resume="reboot")
    same(await do(S.commands.list), [])
    same(await do(S.pause, keep_memory=False), True)
    await do(S.connect, timeout=TIMEOUT)


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
    # Page by page, and by name.
    paged, pages = [], Box.list_snapshots(sandbox_id=S.sandbox_id, limit=1)
    while pages.has_next:
        paged += await first(pages)
    same(paged, listed)
    same(await first(Box.list_snapshots(name=NAME)), [two])
    same(await first(S.list_snapshots(name=NAME + ":other")), [])
    # The name moves to the next one.
    same(await do(Box.create_snapshot, S.sandbox_id, name=NAME), two)
    await do(S.commands.run, "sleep 1000", background=True, timeout=0)
    disk = await do(S.create_snapshot, mode="filesystem")
    made = await do(Box.create, disk.snapshot_id, timeout=TIMEOUT)
    same(await do(made.files.read, "/home/user/state"), "two")
    same(await do(made.commands.list), [])
    await do(made.kill)
    same(len(await do(S.commands.list)), 1)
    every = await first(S.list_snapshots())
    same(len(every), 4)
    for s in every:
        same(await do(Box.delete_snapshot, s.snapshot_id), True)
    same(await do(Box.delete_snapshot, one.snapshot_id), False)
    same(await first(S.list_snapshots()), [])


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
    ids = [(await do(b.commands.run, "cat /etc/machine-id; python3 -c 'import uuid; print(uuid.uuid4())'")).stdout for b in [S, *made]]
    ids = "".join(ids).split()
    same(len(ids), 8)
    same(len(set(ids)), 8)
    for f in made:
        await do(f.kill)
    # One is what is made when nobody says how many, and it is the same guest.
    only, *none = await do(Box.fork, S.sandbox_id)
    same(none, [])
    same((await do(only.get_info)).metadata, {"k": "v"})
    same((await do(only.commands.run, "cat /home/user/state; echo $GREETING")).stdout, "sourcehello\n")
    await do(only.kill)
    same(await do(S.is_running), True)


@scenario("pause at the end")
async def at_the_end():
    box = await do(Box.create, timeout=4, lifecycle={"on_timeout": "pause", "auto_resume": True})
    await do(box.files.write, "here", "still")

    async def paused():
        return (await state(box)) == SandboxState.PAUSED

    await until("it is paused at its end", paused)

    # It is called paused from when the pause begins, so that the first read may
    # still meet the guest that is being paused.
    async def woken():
        same(await do(box.files.read, "here"), "still")
        return (await state(box)) == SandboxState.RUNNING

    await until("a read wakes it", woken)
    await do(box.kill)

    box = await do(Box.create, timeout=2, lifecycle={"on_timeout": {"action": "pause", "mode": "filesystem"}})
    await do(box.files.write, "here", "still")
    await until("it is paused at its end", paused)

    async def gone():
        return not await do(box.is_running)

    await until("nothing wakes it", gone)
    same(await state(box), SandboxState.PAUSED)
    again = await do(box.connect, timeout=TIMEOUT)
    same(await do(again.files.read, "here"), "still")
    await do(again.kill)


@scenario("traffic wakes it")
async def wakes():
    box = await do(Box.create, timeout=TIMEOUT, lifecycle={"on_timeout": "pause", "auto_resume": True})
    with open("guest/guest.js", "rb") as f:
        await do(box.files.write, "guest.js", f.read())
    await do(box.commands.run, "node guest.js", background=True, timeout=0)

    async def node():
        return re.match(r"^node (\d+) 1$", (await page(3000, box=box))[1])

    who = (await until("the port is open", node))[1]

    # A request to a port, a command, a file: each of them wakes it.
    async def port():
        same(await page(3000, box=box), (200, f"node {who} 2"))

    async def command():
        same((await do(box.commands.run, "echo $((6*7))")).stdout, "42\n")

    async def file():
        assert "guest.js" in [f.name for f in await do(box.files.list, "/home/user")]

    for wake in [port, command, file]:
        same(await do(box.pause), True)
        same(await state(box), SandboxState.PAUSED)
        await wake()
        same(await state(box), SandboxState.RUNNING)
    await do(box.kill)
    # Nobody said that it may be woken.
    box = await do(Box.create, timeout=TIMEOUT, lifecycle={"on_timeout": "pause"})
    same(await do(box.pause), True)
    await fails(Exception, box.commands.run, "true")
    same(await state(box), SandboxState.PAUSED)
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


main()
