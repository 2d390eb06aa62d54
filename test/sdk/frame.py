"""What the runners of the tests share: run.py here and in the directories beside.

A runner goes through scenarios with the Python client, as a user's program
would: `run.py sync` with Sandbox, `run.py async` with AsyncSandbox. It prints a
line of JSON for each: {"name", "ok", "error", "ms"}.

The scenarios are written once. The two clients have the same calls, of which
one's block and the other's are awaited.
"""

import asyncio
import inspect
import json
import os
import sys
import time
import traceback

from e2b import AsyncSandbox, Sandbox

MODE = sys.argv[1]
Box = {"sync": Sandbox, "async": AsyncSandbox}[MODE]

# How long to wait for what must come. It says nothing about how fast that is:
# the machine may do other things.
PATIENCE = 60


async def settled(v):
    return await v if inspect.isawaitable(v) else v


async def do(call, *args, **kwargs):
    """Calls either client: the synchronous one in a thread, so that a call
    that hangs does not stop the others."""
    if MODE == "sync":
        return await asyncio.to_thread(call, *args, **kwargs)
    return await settled(call(*args, **kwargs))


async def fails(kind, call, *args, **kwargs):
    try:
        await do(call, *args, **kwargs)
    except kind as err:
        return err
    except Exception as err:
        raise AssertionError(f"want a {kind.__name__}, got {type(err).__name__}: {err}") from err
    raise AssertionError(f"want a {kind.__name__}, got no error")


async def until(what, f):
    """Polls f, which may be awaited, and returns its first true value. What it
    waits for is a text, or a function that returns one."""
    end = time.monotonic() + PATIENCE
    while not (v := await settled(f())):
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what() if callable(what) else what}"
        await asyncio.sleep(0.03)
    return v


def same(got, want):
    assert got == want, f"got {got!r}, want {want!r}"


SCENARIOS = []


def scenario(name):
    def add(f):
        SCENARIOS.append((name, f))
        return f

    return add


async def go(begin, end):
    if begin:
        await begin()
    for name, f in SCENARIOS:
        began = time.monotonic()
        result = {"name": name, "ok": True}
        try:
            await settled(f())
        except BaseException:
            result.update(ok=False, error=traceback.format_exc())
        print(json.dumps({**result, "ms": round((time.monotonic() - began) * 1000)}), flush=True)
    try:
        if end:
            await end()
    except Exception:
        pass  # a scenario has ended it, or failed to begin it


def main(begin=None, end=None):
    """Goes through the scenarios as they are written. begin makes what they
    share, end removes it as far as it is there."""
    asyncio.run(go(begin, end))
    sys.stdout.flush()
    os._exit(0)  # a thread that waits for a stream would keep the process
