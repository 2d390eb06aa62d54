"""Runs the scenarios of egress_test.go with the Python client: `run.py sync` with
Sandbox, `run.py async` with AsyncSandbox. It prints a line of JSON for each."""

import asyncio
import inspect
import json
import os
import sys
import time
import traceback

from e2b import ALL_TRAFFIC, AsyncSandbox, AsyncSecret, NotFoundException, Sandbox, SandboxException, Secret

MODE = sys.argv[1]
Box = {"sync": Sandbox, "async": AsyncSandbox}[MODE]
Keep = {"sync": Secret, "async": AsyncSecret}[MODE]
PUBLIC, OTHER, PORT = (os.environ[n] for n in ("PUBLIC", "OTHER", "PORT"))

PROBE = """python3 -c '
import socket
try:
    print(socket.create_connection(("%s", %s), 5).recv(100).decode())
except OSError as e:
    print("refused")'"""


async def do(call, *args, **kwargs):
    if MODE == "sync":
        return await asyncio.to_thread(call, *args, **kwargs)
    out = call(*args, **kwargs)
    return await out if inspect.isawaitable(out) else out


async def fails(kind, call, *args, **kwargs):
    try:
        await do(call, *args, **kwargs)
    except kind:
        return
    raise AssertionError(f"want a {kind.__name__}, got no error")


class Run:
    sbx = None

    async def reaches(self, opened, shut):
        for host, want in [(h, "this is the world\n") for h in opened] + [(h, "refused\n") for h in shut]:
            got = (await do(self.sbx.commands.run, PROBE % (host, PORT))).stdout
            assert got == want, f"{host}: {got!r}, want {want!r}"

    async def create_with_a_policy(self):
        network = {"deny_out": [ALL_TRAFFIC], "allow_out": [PUBLIC]}
        self.sbx = await do(Box.create, timeout=600, network=network)
        await self.reaches([PUBLIC], [OTHER])
        info = await do(self.sbx.get_info)
        assert info.network["allow_out"] == [PUBLIC] and info.network["deny_out"] == [ALL_TRAFFIC], info.network

    async def update(self):
        await do(self.sbx.update_network, {"deny_out": [PUBLIC + "/32"]})
        await self.reaches([OTHER], [PUBLIC])
        info = await do(self.sbx.get_info)
        assert info.network.get("allow_out") is None and info.network["deny_out"] == [PUBLIC + "/32"], info.network
        await do(Box.update_network, self.sbx.sandbox_id, {})
        await self.reaches([OTHER, PUBLIC], [])

    async def no_internet(self):
        await do(self.sbx.update_network, {"allow_internet_access": False})
        await self.reaches([], [OTHER, PUBLIC])
        await do(self.sbx.kill)
        self.sbx = await do(Box.create, timeout=600, allow_internet_access=False, network={"allow_out": [OTHER]})
        await self.reaches([OTHER], [PUBLIC])

    async def what_is_refused(self):
        for network in ({"deny_out": ["example.com"]}, {"allow_out": ["example.com"]}, {"deny_out": ["10.0.0.0/33"]}):
            await fails(SandboxException, Box.create, timeout=600, network=network)
            await fails(SandboxException, self.sbx.update_network, network)
        await do(self.sbx.kill)
        await fails(NotFoundException, self.sbx.update_network, {})

    async def secrets(self):
        name = f"From-Python-{MODE}"
        made = await do(Keep.create, name, "one", metadata={"a": "b"})
        assert (made.name, made.version, made.metadata) == (name.lower(), 1, {"a": "b"}), made
        assert (await do(Keep.update, name, "two")).version == 2
        assert (await do(Keep.get_info, made.secret_id)).version == 2
        assert await do(Keep.exists, name)
        names, pages = [], Keep.list(limit=1)
        while pages.has_next:
            names += [s.name for s in await do(pages.next_items)]
        assert name.lower() in names, names
        await fails(Exception, Keep.create, name, "x")
        assert Keep.fill("a") == "${e2b.secrets.a}"
        assert await do(Keep.destroy, name)
        assert not await do(Keep.destroy, name)
        assert not await do(Keep.exists, name)


async def main():
    run = Run()
    for name in ("create with a policy", "update", "no internet", "what is refused", "secrets"):
        began = time.monotonic()
        result = {"name": name, "ok": True}
        try:
            await getattr(run, name.replace(" ", "_"))()
        except Exception:
            result |= {"ok": False, "error": traceback.format_exc()}
        print(json.dumps({**result, "ms": int((time.monotonic() - began) * 1000)}), flush=True)
    if run.sbx:
        await do(run.sbx.kill)


asyncio.run(main())
