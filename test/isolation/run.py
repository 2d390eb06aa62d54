"""Runs the scenarios of egress_test.go with the Python client."""

import os

from e2b import ALL_TRAFFIC, AsyncSecret, NotFoundException, SandboxException, Secret

from frame import MODE, Box, do, fails, main, same, scenario

Keep = {"sync": Secret, "async": AsyncSecret}[MODE]
PUBLIC, OTHER, PORT = (os.environ[n] for n in ("PUBLIC", "OTHER", "PORT"))

PROBE = """python3 -c '
import socket
try:
    print(socket.create_connection(("%s", %s), 5).recv(100).decode())
except OSError as e:
    print("refused")'"""


S = None


async def reaches(opened, shut):
    for host, want in [(h, "this is the world\n") for h in opened] + [(h, "refused\n") for h in shut]:
        got = (await do(S.commands.run, PROBE % (host, PORT))).stdout
        assert got == want, f"{host}: {got!r}, want {want!r}"


async def policy():
    network = (await do(S.get_info)).network
    return network.get("allow_out"), network["deny_out"]


@scenario("create with a policy")
async def create():
    global S
    S = await do(Box.create, timeout=600, network={"deny_out": [ALL_TRAFFIC], "allow_out": [PUBLIC]})
    await reaches([PUBLIC], [OTHER])
    same(await policy(), ([PUBLIC], [ALL_TRAFFIC]))


@scenario("update")
async def update():
    await do(S.update_network, {"deny_out": [PUBLIC + "/32"]})
    await reaches([OTHER], [PUBLIC])
    same(await policy(), (None, [PUBLIC + "/32"]))
    await do(Box.update_network, S.sandbox_id, {})
    await reaches([OTHER, PUBLIC], [])


@scenario("no internet")
async def no_internet():
    global S
    await do(S.update_network, {"allow_internet_access": False})
    await reaches([], [OTHER, PUBLIC])
    await do(S.kill)
    S = await do(Box.create, timeout=600, allow_internet_access=False, network={"allow_out": [OTHER]})
    await reaches([OTHER], [PUBLIC])


@scenario("what is refused")
async def refused():
    for network in ({"deny_out": ["example.com"]}, {"allow_out": ["example.com"]}, {"deny_out": ["10.0.0.0/33"]}):
        await fails(SandboxException, Box.create, timeout=600, network=network)
        await fails(SandboxException, S.update_network, network)
    await do(S.kill)
    await fails(NotFoundException, S.update_network, {})


@scenario("secrets")
async def secrets():
    name = f"From-Python-{MODE}"
    made = await do(Keep.create, name, "one", metadata={"a": "b"})
    same((made.name, made.version, made.metadata), (name.lower(), 1, {"a": "b"}))
    same((await do(Keep.update, name, "two")).version, 2)
    same((await do(Keep.get_info, made.secret_id)).version, 2)
    assert await do(Keep.exists, name)
    names, pages = [], Keep.list(limit=1)
    while pages.has_next:
        names += [s.name for s in await do(pages.next_items)]
    assert name.lower() in names, names
    await fails(Exception, Keep.create, name, "x")
    same(Keep.fill("a"), "${e2b.secrets.a}")
    assert await do(Keep.destroy, name)
    assert not await do(Keep.destroy, name)
    assert not await do(Keep.exists, name)


main(end=lambda: do(S.kill))
