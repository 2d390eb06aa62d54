"""Runs the scenarios of envd_test.go with the Python client."""

import json
import os
import sys
import urllib.request

from frame import Box, MODE, asyncio, do, go, same, scenario, until
from e2b import CommandExitException, SandboxException

sbx = None


def post_upgrade():
    req = urllib.request.Request(
        f"{os.environ['E2B_API_URL']}/operator/v1/sandboxes/{sbx.sandbox_id}/upgrade",
        method="POST", headers={"X-Admin-Token": os.environ["TEST_ADMIN"]})
    with urllib.request.urlopen(req, timeout=180) as r:
        return json.load(r)


@scenario("watcher")
async def watcher():
    """Directories are made all the while; a watcher that is polled tells of
    each, once, though envd is replaced under it."""
    global sbx
    sbx = await do(Box.create, timeout=600)
    await do(sbx.files.make_dir, "/tmp/w")
    got = []
    if MODE == "sync":
        w = await do(sbx.files.watch_dir, "/tmp/w", recursive=True)
    else:
        w = None  # its watches are streams, as in JavaScript
    maker = await do(sbx.commands.run,
                     "i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); mkdir -p /tmp/w/$i/a; sleep 0.01; done; echo $i >/tmp/made",
                     background=True, timeout=0)

    async def look():
        if w:
            got.extend(e.name for e in await do(w.get_new_events) if e.type.value == "create")

    async def made():
        return int((await do(sbx.commands.run, "ls /tmp/w | wc -l")).stdout)

    async def more(n):
        await look()
        return await made() > n

    await until("directories are made", lambda: more(20))
    upgrading = asyncio.create_task(asyncio.to_thread(post_upgrade))
    while not upgrading.done():
        try:
            await look()
        except SandboxException as err:  # it met a connection that was being closed, and took nothing
            print("a look during the replacement:", err, file=sys.stderr)
        await asyncio.sleep(0.01)
    same((await upgrading)["changed"], True)
    n = await made()
    await until("more directories are made", lambda: more(n + 20))
    await do(sbx.files.write, "/tmp/stop", "")
    await until("they are all made", lambda: do(sbx.files.exists, "/tmp/made"))
    n = int(await do(sbx.files.read, "/tmp/made"))
    await look()
    if w:
        want = sorted([f"{i}" for i in range(1, n + 1)] + [f"{i}/a" for i in range(1, n + 1)])
        same(sorted(got), want)
        await do(w.stop)
    # The process has ended meanwhile, and its end is told.
    h = await do(sbx.commands.connect, maker.pid)
    same((await do(h.wait)).exit_code, 0)


@scenario("ended")
async def ended():
    """Who has ended before a replacement is answered for after it."""
    h = await do(sbx.commands.run, "exit 9", background=True)
    try:
        await do(h.wait)
    except CommandExitException as e:
        same(e.exit_code, 9)
    same((await asyncio.to_thread(post_upgrade))["changed"], False)
    again = await do(sbx.commands.connect, h.pid)
    try:
        await do(again.wait)
    except CommandExitException as e:
        same(e.exit_code, 9)


async def end():
    await do(sbx.kill)


asyncio.run(go(None, end))
