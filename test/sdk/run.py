"""Runs the scenarios of sdk_test.go with the Python client."""

import asyncio
import datetime
import os
import re
import time

from e2b import (
    AuthenticationException,
    CommandExitException,
    InvalidArgumentException,
    NotFoundException,
    SandboxException,
    SandboxQuery,
    SandboxState,
    TimeoutException,
)

from frame import MODE, PATIENCE, Box, do, fails, main, same, scenario, until

TAG = f"python-{MODE}-{os.getpid()}"
TIMEOUT = 600


def now():
    return datetime.datetime.now(datetime.timezone.utc)


async def run(cmd, **kwargs):
    return await do(S.commands.run, cmd, **kwargs)


S = None  # shared by the scenarios of commands and files


@scenario("create")
async def create():
    global S
    S = await do(Box.create, timeout=TIMEOUT, metadata={"run": TAG, "a b": "c&d=e"}, envs={"GREETING": "hello there"})
    assert re.fullmatch("i[a-z0-9]{20}", S.sandbox_id), S.sandbox_id
    same(await do(S.is_running), True)


@scenario("stdout and stderr")
async def stdout_and_stderr():
    r = await run('echo out; echo err >&2; printf "no newline ✓"')
    same((r.stdout, r.stderr, r.exit_code), ("out\nno newline ✓", "err\n", 0))


@scenario("output as it comes")
async def output_as_it_comes():
    seen = []
    wait = "until [ -e /tmp/go-on ]; do sleep 0.05; done"
    command = asyncio.create_task(run(f"echo one; {wait}; echo two; sleep 0.2; echo three >&2", on_stdout=seen.append, on_stderr=seen.append))

    async def one():
        return seen == ["one\n"]

    await until("the first line comes while the command waits", one)
    await do(S.files.write, "/tmp/go-on", "")
    await command
    same("".join(seen), "one\ntwo\nthree\n")


@scenario("much output")
async def much_output():
    r = await run("seq 1 200000")
    same(len(r.stdout), 1288895)
    assert r.stdout.endswith("199999\n200000\n")


@scenario("exit code")
async def exit_code():
    err = await fails(CommandExitException, S.commands.run, "echo before; echo why >&2; exit 42")
    same((err.exit_code, err.stdout, err.stderr), (42, "before\n", "why\n"))


@scenario("exit by signal")
async def exit_by_signal():
    err = await fails(CommandExitException, S.commands.run, "kill -9 $$")
    assert err.exit_code != 0


@scenario("unknown command")
async def unknown_command():
    err = await fails(CommandExitException, S.commands.run, "no-such-program-here")
    same(err.exit_code, 127)
    assert "no-such-program-here: command not found" in err.stderr, err.stderr


@scenario("background")
async def background():
    h = await run("sleep 0.3; echo done", background=True)
    assert h.pid > 0
    r = await do(h.wait)
    same((r.stdout, r.exit_code), ("done\n", 0))


@scenario("list commands")
async def list_commands():
    h = await run("sleep 77", background=True)
    found = [p for p in await do(S.commands.list) if p.pid == h.pid]
    same([(p.cmd, list(p.args)) for p in found], [("/bin/bash", ["-l", "-c", "sleep 77"])])
    await do(h.kill)

    async def gone():
        return all(p.pid != h.pid for p in await do(S.commands.list))

    await until("the command is not listed any more", gone)


@scenario("kill a command")
async def kill_a_command():
    h = await run("sleep 600", background=True)
    same(await do(h.kill), True)
    await fails(CommandExitException, h.wait)
    same(await do(S.commands.kill, 999999), False)


@scenario("connect to a command")
async def connect_to_a_command():
    h = await run("until [ -e /tmp/say-it ]; do sleep 0.05; done; echo later", background=True)
    await do(h.disconnect)
    again = await do(S.commands.connect, h.pid)
    await do(S.files.write, "/tmp/say-it", "")
    same((await do(again.wait)).stdout, "later\n")


@scenario("stdin")
async def stdin():
    h = await run('read line; echo "got $line"', background=True, stdin=True)
    await do(S.commands.send_stdin, h.pid, "a line\n")
    same((await do(h.wait)).stdout, "got a line\n")


@scenario("environment")
async def environment():
    r = await run('echo "$GREETING|$MINE|$E2B_SANDBOX|$E2B_SANDBOX_ID|$HOME|$USER"', envs={"MINE": "x y"})
    same(r.stdout, f"hello there|x y|true|{S.sandbox_id}|/home/user|user\n")
    same((await run("echo $GREETING", envs={"GREETING": "other"})).stdout, "other\n")


@scenario("working directory")
async def working_directory():
    same((await run("pwd")).stdout, "/home/user\n")
    same((await run("pwd", cwd="/usr/lib")).stdout, "/usr/lib\n")
    await fails(InvalidArgumentException, S.commands.run, "pwd", cwd="/no/such/place")


@scenario("user")
async def user():
    same((await run("id -un; id -u")).stdout, "user\n1000\n")
    same((await run("id -un; pwd", user="root")).stdout, "root\n/root\n")
    same((await run("sudo -n id -u")).stdout, "0\n")
    await fails(AuthenticationException, S.commands.run, "true", user="nobody-knows")


@scenario("command timeout")
async def command_timeout():
    began = time.monotonic()
    await fails(TimeoutException, S.commands.run, "echo $$ > /tmp/slow.pid; sleep 600", timeout=0.7)
    assert time.monotonic() - began < PATIENCE, "the timeout came late"

    async def gone():
        r = await run("kill -0 $(cat /tmp/slow.pid) 2>/dev/null && echo alive || echo gone")
        return r.stdout == "gone\n"

    await until("the command is gone", gone)  # ended, not only let go of


@scenario("python and node")
async def python_and_node():
    r = await run("python3 -c 'print(6*7)'; node -e 'console.log(6*7)'; git --version; curl --version | head -1")
    assert re.match(r"42\n42\ngit version .*\ncurl ", r.stdout), r.stdout


@scenario("write and read")
async def write_and_read():
    info = await do(S.files.write, "/home/user/deep/er/a.txt", "text ✓")
    same(info.path, "/home/user/deep/er/a.txt")
    same(await do(S.files.read, "/home/user/deep/er/a.txt"), "text ✓")
    same(await do(S.files.read, "deep/er/a.txt"), "text ✓")  # below the home directory
    same((await run("stat -c %U:%G deep/er/a.txt")).stdout, "user:user\n")
    await do(S.files.write, "deep/er/a.txt", "shorter")
    same(await do(S.files.read, "deep/er/a.txt"), "shorter")
    await do(S.files.write, "empty", "")
    same(await do(S.files.read, "empty"), "")


@scenario("bytes")
async def bytes_():
    every = bytes(i * 31 % 256 for i in range(1 << 20))
    await do(S.files.write, "/tmp/bytes", every)
    assert bytes(await do(S.files.read, "/tmp/bytes", format="bytes")) == every, "other bytes came back"


@scenario("many files")
async def many_files():
    infos = await do(S.files.write_files, [{"path": "/tmp/many/1", "data": "one"}, {"path": "/tmp/many/sub/2", "data": "two"}])
    same(sorted(i.path for i in infos), ["/tmp/many/1", "/tmp/many/sub/2"])
    same(await do(S.files.read, "/tmp/many/sub/2"), "two")


@scenario("list files")
async def list_files():
    flat = await do(S.files.list, "/tmp/many")
    same([(e.name, e.type.value, e.path) for e in flat], [("1", "file", "/tmp/many/1"), ("sub", "dir", "/tmp/many/sub")])
    deep = await do(S.files.list, "/tmp/many", depth=2)
    same([e.path for e in deep], ["/tmp/many/1", "/tmp/many/sub", "/tmp/many/sub/2"])
    same(flat[0].size, 3)


@scenario("file info")
async def file_info():
    await run("chmod 640 /tmp/many/1 && ln -s /tmp/many/1 /tmp/many/link")
    i = await do(S.files.get_info, "/tmp/many/1")
    same((i.name, i.type.value, i.size, i.mode, i.permissions, i.owner, i.group), ("1", "file", 3, 0o640, "-rw-r-----", "user", "user"))
    same((await do(S.files.get_info, "/tmp/many/link")).symlink_target, "/tmp/many/1")


@scenario("move")
async def move():
    await do(S.files.write, "/tmp/from", "moving")
    same((await do(S.files.rename, "/tmp/from", "/tmp/new/place/to")).path, "/tmp/new/place/to")
    same(await do(S.files.exists, "/tmp/from"), False)
    same(await do(S.files.read, "/tmp/new/place/to"), "moving")
    await fails(NotFoundException, S.files.rename, "/tmp/from", "/tmp/x")


@scenario("remove")
async def remove():
    same(await do(S.files.make_dir, "/tmp/dir/of"), True)
    same(await do(S.files.make_dir, "/tmp/dir/of"), False)
    await do(S.files.write, "/tmp/dir/of/file", "x")
    await do(S.files.remove, "/tmp/dir")
    same(await do(S.files.exists, "/tmp/dir"), False)
    await fails(NotFoundException, S.files.read, "/tmp/dir/of/file")
    await fails(NotFoundException, S.files.list, "/tmp/dir")


@scenario("info")
async def info():
    i = await do(S.get_info)
    same((i.sandbox_id, i.state, i.metadata), (S.sandbox_id, SandboxState.RUNNING, {"run": TAG, "a b": "c&d=e"}))
    assert i.cpu_count > 0 and i.memory_mb > 0 and i.envd_version
    span = (i.end_at - i.started_at).total_seconds()
    assert abs(span - TIMEOUT) < PATIENCE, f"ends {span} s after its start"


@scenario("set timeout")
async def set_timeout():
    await do(S.set_timeout, 3000)
    left = ((await do(S.get_info)).end_at - now()).total_seconds()
    assert 3000 - PATIENCE < left < 3001, f"{left} s are left"
    await do(Box.set_timeout, S.sandbox_id, 300)  # also shortens
    left = ((await do(S.get_info)).end_at - now()).total_seconds()
    assert 300 - PATIENCE < left < 301, f"{left} s are left"


@scenario("list with metadata and pages")
async def list_with_metadata_and_pages():
    group = TAG + "-pages"
    made = [await do(Box.create, timeout=TIMEOUT, metadata={"group": group, "n": str(n), "a b": "c&d=e"}) for n in range(3)]
    ids = [s.sandbox_id for s in made]
    try:
        seen, pages = [], 0
        every = Box.list(query=SandboxQuery(metadata={"group": group, "a b": "c&d=e"}, state=[SandboxState.RUNNING]), limit=2)
        while every.has_next:
            items = await do(every.next_items)
            assert len(items) <= 2
            seen += items
            pages += 1
        same(pages, 2)
        same([s.sandbox_id for s in seen], ids[::-1])  # newest first
        same([s.metadata["n"] for s in seen], ["2", "1", "0"])
        one = await do(Box.list(query=SandboxQuery(metadata={"group": group, "n": "1"})).next_items)
        same([s.sandbox_id for s in one], [ids[1]])
        same(await do(Box.list(query=SandboxQuery(metadata={"group": group, "n": "7"})).next_items), [])
    finally:
        for s in made:
            await do(s.kill)


@scenario("connect")
async def connect():
    again = await do(Box.connect, S.sandbox_id)
    same(again.sandbox_id, S.sandbox_id)
    same((await do(again.commands.run, "cat deep/er/a.txt")).stdout, "shorter")


@scenario("kill")
async def kill():
    same(await do(S.kill), True)
    same(await do(Box.kill, S.sandbox_id), False)
    same(await do(S.is_running), False)
    await fails(NotFoundException, S.get_info)
    await fails(SandboxException, S.commands.run, "true")
    same(await do(Box.list(query=SandboxQuery(metadata={"run": TAG})).next_items), [])


@scenario("kill during a command")
async def kill_during_a_command():
    s = await do(Box.create, timeout=TIMEOUT)
    h = await do(s.commands.run, "sleep 600", background=True)
    ended = asyncio.create_task(fails(TimeoutException, h.wait))
    await asyncio.sleep(0.2)
    await do(s.kill)
    await asyncio.wait_for(ended, PATIENCE)


@scenario("the end comes")
async def the_end_comes():
    # A slow machine needs longer to look at a sandbox before its end.
    for life in (2, 20, PATIENCE):
        s = await do(Box.create, timeout=life)
        try:
            end = (await do(s.get_info)).end_at
        except NotFoundException:
            continue
        if await do(s.is_running):
            break
    else:
        raise AssertionError("no sandbox was there before its end")

    async def ended():
        return not await do(s.is_running)

    await until("the sandbox ends", ended)
    late = (now() - end).total_seconds()
    assert -0.2 < late < PATIENCE, f"it ended {late} s after its time"

    async def nothing_to_kill():
        return not await do(Box.kill, s.sandbox_id)

    await until("there is nothing left to kill", nothing_to_kill)


@scenario("wrong key")
async def wrong_key():
    await fails(AuthenticationException, Box.create, api_key="e2b_" + "0" * 40)


@scenario("unknown template")
async def unknown_template():
    err = await fails(Exception, Box.create, "no-such-template")
    assert "no-such-template" in str(err), str(err)


main(end=lambda: do(S.kill))
