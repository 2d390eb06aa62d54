"""Runs the scenarios of sdk_test.go with the Python client. Where the two clients
differ, terminals and watches, small classes make them alike."""

import asyncio
import hashlib
import io
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request

from e2b import (
    AuthenticationException,
    CommandExitException,
    InvalidArgumentException,
    NotEnoughSpaceException,
    NotFoundException,
    PtySize,
    SandboxException,
)

from frame import MODE, PATIENCE, Box, do, fails, main, same, scenario, until

S = None


async def run(cmd, **kwargs):
    return await do(S.commands.run, cmd, **kwargs)


async def out(cmd, **kwargs):
    return (await run(cmd, **kwargs)).stdout


def sha(b):
    return hashlib.sha256(b).hexdigest()


class Terminal:
    """A terminal whose output is collected."""

    @classmethod
    async def open(cls, **kwargs):
        t = cls()
        t.out = b""
        size = PtySize(rows=24, cols=80)
        if MODE == "sync":
            t.handle = await do(S.pty.create, size, **kwargs)
        else:
            t.handle = await S.pty.create(size, on_data=t.take, **kwargs)
        t.pid = t.handle.pid
        t.follow(t.handle)
        return t

    def take(self, data):
        self.out += bytes(data)

    def follow(self, handle):
        if MODE == "sync":
            self.end = asyncio.create_task(do(handle.wait, on_pty=self.take))
        else:
            self.end = asyncio.create_task(handle.wait())
        # Whether the end is looked at is each scenario's choice.
        self.end.add_done_callback(lambda f: f.cancelled() or f.exception())

    async def type(self, text):
        await do(S.pty.send_stdin, self.pid, text.encode())

    async def says(self, text):
        await until(lambda: f"the terminal says {text!r}, but {self.out!r}", lambda: text.encode() in self.out)


class Watch:
    """A watch whose events are collected: those that a poll gave, or those that
    were streamed."""

    @classmethod
    async def open(cls, path, **kwargs):
        w = cls()
        w.events = []
        if MODE == "sync":
            w.handle = await do(S.files.watch_dir, path, **kwargs)
        else:
            w.handle = await S.files.watch_dir(path, on_event=w.events.append, timeout=0, **kwargs)
        return w

    async def poll(self):
        if MODE == "sync":
            self.events += await do(self.handle.get_new_events)
        return self.events

    async def has(self, kind, name):
        async def look():
            return next((e for e in await self.poll() if e.type.value == kind and e.name == name), None)

        return await until(lambda: f"{kind} {name}, but {self.events}", look)


@scenario("close stdin")
async def close_stdin():
    h = await run("wc -c; echo done", background=True, stdin=True)
    await do(S.commands.send_stdin, h.pid, "x" * 100_000)
    await do(S.commands.send_stdin, h.pid, "bytes ✓".encode())
    await do(S.commands.close_stdin, h.pid)
    same((await do(h.wait)).stdout, "100009\ndone\n")
    # A stream of input, with one message for each piece.
    h = await run("wc -c", background=True, stdin=True)
    if MODE == "sync":
        await do(S.commands.stream_input, h.pid, ("y" * 1000 for _ in range(50)))
    else:
        async with S.commands.stream_input(h.pid) as stream:
            for _ in range(50):
                await stream.send("y" * 1000)
    await do(S.commands.close_stdin, h.pid)
    same((await do(h.wait)).stdout, "50000\n")


@scenario("no stdin")
async def no_stdin():
    h = await run("sleep 20", background=True)
    await fails(SandboxException, S.commands.send_stdin, h.pid, "x")
    await do(h.kill)
    await fails(NotFoundException, S.commands.send_stdin, 999_999, "x")
    await fails(NotFoundException, S.commands.connect, 999_999)


@scenario("several readers")
async def several_readers():
    h = await run("read go; seq 1 20000", background=True, stdin=True)
    others = [await do(S.commands.connect, h.pid) for _ in range(3)]
    ends = [asyncio.create_task(do(o.wait)) for o in [h, *others]]
    await do(S.commands.send_stdin, h.pid, "\n")
    same({sha((await e).stdout.encode()) for e in ends}, {sha("".join(f"{n}\n" for n in range(1, 20001)).encode())})
    # An ended one still answers, with its end.
    same((await do((await do(S.commands.connect, h.pid)).wait)).exit_code, 0)


@scenario("split characters")
async def split_characters():
    same(await out("""python3 -c "import sys; sys.stdout.write('✓é\\U0001F600' * 30000)" """), "✓é\U0001f600" * 30000)


@scenario("a tree is killed")
async def a_tree_is_killed():
    h = await run('sleep 3001 & (setsid sleep 3002; true) & bash -c "sleep 3003 & wait" & wait', background=True)

    async def count(n):
        return await out('pgrep -fc "^sleep 300[13]" || true') == f"{n}\n"

    await until("all run", lambda: count(2))
    same(await do(h.kill), True)
    await fails(CommandExitException, h.wait)
    assert await count(0)
    await run('pkill -f "^sleep 3002"')


@scenario("environment of commands")
async def environment_of_commands():
    names, nice, oom = (await out('env | cut -d= -f1 | sort | tr "\\n" " "; echo; nice; cat /proc/self/oom_score_adj')).splitlines()
    want = {"E2B_SANDBOX", "E2B_SANDBOX_ID", "E2B_TEMPLATE_ID", "GREETING", "HOME", "LOGNAME", "PATH", "USER"}
    assert want <= set(names.split()), names
    assert not re.search("CAY|TOKEN", names), names
    same((nice, oom), ("0", "100"))


@scenario("pty")
async def pty():
    t = await Terminal.open(envs={"MINE": "mine"}, cwd="/tmp")
    await t.type('stty size; tty; echo "$TERM $MINE $PWD $LANG"; test -t 0 && echo is-"terminal"\n')
    await t.says("is-terminal")
    assert re.search(rb"24 80\r\n/dev/pts/\d+\r\nxterm-256color mine /tmp C\.UTF-8\r\n", t.out), t.out
    await t.type("exit 7\n")
    try:
        await t.end
        raise AssertionError("no error")
    except CommandExitException as err:
        same(err.exit_code, 7)


@scenario("pty resize")
async def pty_resize():
    t = await Terminal.open()
    await t.type("""trap 'echo "now $(stty size)"' WINCH; echo re"ady"\n""")
    await t.says("ready")
    await do(S.pty.resize, t.pid, PtySize(rows=43, cols=132))
    await t.type("\n")
    await t.says("now 43 132")
    same(await do(S.pty.kill, t.pid), True)
    same(await do(S.pty.kill, 999_999), False)
    await fails(NotFoundException, S.pty.resize, 999_999, PtySize(rows=1, cols=1))
    await fails(NotFoundException, S.pty.send_stdin, 999_999, b"x")


@scenario("pty jobs")
async def pty_jobs():
    t = await Terminal.open()
    await t.type("cat\n")
    await t.says("\x1b[?2004l")  # bash has given the terminal to cat
    await t.type("through-cat\n")
    await t.says("through-cat\r\nthrough-cat")
    await t.type("\x03")
    await t.type("sleep 3004\n")

    async def runs():
        return await out('pgrep -fc "^sleep 3004" || true') == "1\n"

    await until("it runs", runs)
    await t.type("\x1a")
    await t.says("Stopped")
    await t.type('jobs; kill %1; echo go"ne"\n')
    await t.says("gone")
    await t.type('printf "\\033[31mred\\033[0m ✓\\n"; ls --color=always -d /tmp\n')
    await t.says("\x1b[31mred\x1b[0m ✓")
    await t.type("exit 0\n")
    await asyncio.wait([t.end], timeout=PATIENCE)
    assert t.end.done(), "the shell has not ended"


@scenario("pty connect")
async def pty_connect():
    t = await Terminal.open()
    await do(t.handle.disconnect)
    again = Terminal()
    again.out, again.pid = b"", t.pid
    again.handle = await (do(S.pty.connect, t.pid) if MODE == "sync" else S.pty.connect(t.pid, on_data=again.take))
    again.follow(again.handle)
    await again.type('echo "a""gain"\n')
    await again.says("again")
    same(await do(again.handle.kill), True)
    await asyncio.wait([again.end], timeout=PATIENCE)
    assert isinstance(again.end.exception(), CommandExitException)


async def drain(stream):
    if MODE == "sync":
        return await asyncio.to_thread(lambda: b"".join(stream))
    return b"".join([p async for p in stream])


@scenario("formats")
async def formats():
    data = os.urandom(300_000)
    await do(S.files.write, "/tmp/f/blob", data)
    same(sha(bytes(await do(S.files.read, "/tmp/f/blob", format="bytes"))), sha(data))
    same(sha(await drain(await do(S.files.read, "/tmp/f/blob", format="stream"))), sha(data))
    same(sha(await drain(await do(S.files.read, "/tmp/f/blob", format="stream", gzip=True))), sha(data))
    await do(S.files.write, "/tmp/f/text", "zwölf ✓")
    same(await do(S.files.read, "/tmp/f/text", format="text"), "zwölf ✓")


@scenario("upload a stream")
async def upload_a_stream():
    data = os.urandom(1 << 16) * 160
    for kwargs in ({}, {"gzip": True}, {"use_octet_stream": True}):
        info = await do(S.files.write, "/tmp/f/stream", io.BytesIO(data), **kwargs)
        same(info.path, "/tmp/f/stream")
        same((await out("sha256sum < /tmp/f/stream"))[:64], sha(data))


@scenario("gzip")
async def gzip():
    s = "compressible ✓ " * 20_000
    await do(S.files.write, "/tmp/f/gz", s, gzip=True)
    same(await do(S.files.read, "/tmp/f/gz", gzip=True), s)
    same((await out("wc -c < /tmp/f/gz")).strip(), str(len(s.encode())))


@scenario("metadata")
async def metadata():
    meta = {"author": "me", "x-long": "v" * 200}
    info = await do(S.files.write, "/tmp/f/meta", "x", metadata=meta)
    same(info.metadata, meta)
    same((await do(S.files.get_info, "/tmp/f/meta")).metadata, meta)
    same([e.metadata["author"] for e in await do(S.files.list, "/tmp/f") if e.name == "meta"], ["me"])
    await do(S.files.rename, "/tmp/f/meta", "/tmp/f/meta2")
    same((await do(S.files.get_info, "/tmp/f/meta2")).metadata, meta)
    await do(S.files.write, "/tmp/f/meta2", "y", metadata={"other": "z"})
    same((await do(S.files.get_info, "/tmp/f/meta2")).metadata, {"other": "z"})
    await do(S.files.write, "/tmp/f/meta2", "y")
    same((await do(S.files.get_info, "/tmp/f/meta2")).metadata or {}, {})


@scenario("hundreds of files in one write")
async def hundreds_of_files():
    files = [{"path": f"/tmp/lots/{i % 10}/n {i} ✓.txt", "data": f"content {i}"} for i in range(300)]
    infos = await do(S.files.write_files, files)
    same([i.path for i in infos], [f["path"] for f in files])
    size = sum(len(f["data"]) for f in files)
    same(await out("find /tmp/lots -type f | wc -l; cat /tmp/lots/*/* | wc -c"), f"300\n{size}\n")
    same(await do(S.files.write_files, []), [])
    mixed = await do(S.files.write_files, [{"path": "m/a", "data": b"bytes"}, {"path": "m/b", "data": io.BytesIO(b"io")}])
    same([i.path for i in mixed], ["/home/user/m/a", "/home/user/m/b"])


@scenario("files of another user")
async def files_of_another_user():
    await do(S.files.write, "/root/secret", "root only", user="root")
    same(await do(S.files.read, "/root/secret", user="root"), "root only")
    same(await do(S.files.read, "secret", user="root"), "root only")
    await fails(Exception, S.files.read, "/root/secret")
    await fails(Exception, S.files.write, "/root/mine", "x")
    await fails(Exception, S.files.remove, "/root/secret")
    same((await do(S.files.get_info, "/root/secret", user="root")).owner, "root")
    await fails(AuthenticationException, S.files.list, "/", user="nobody-knows")


@scenario("wrong uses of files")
async def wrong_uses_of_files():
    await fails(InvalidArgumentException, S.files.read, "/tmp")
    await fails(InvalidArgumentException, S.files.write, "/tmp", "x")
    await fails(InvalidArgumentException, S.files.list, "/etc/passwd")
    await fails(InvalidArgumentException, S.files.make_dir, "/etc/passwd")
    await fails(NotFoundException, S.files.get_info, "/no/such")
    await fails(InvalidArgumentException, S.files.list, "/tmp", depth=0)
    await do(S.files.remove, "/no/such")
    await run("ln -s loop /tmp/loop; ln -s /nowhere /tmp/dangling; ln -s /tmp/f /tmp/todir")
    names = [e.name for e in await do(S.files.list, "/tmp")]
    assert "todir" in names and "dangling" not in names, names
    assert all(e.path.startswith("/tmp/todir/") for e in await do(S.files.list, "/tmp/todir"))
    await fails(SandboxException, S.files.list, "/tmp/loop")


@scenario("a full disk")
async def a_full_disk():
    await run("mkdir -p /tmp/small && mount -t tmpfs -o size=1m,mode=777 none /tmp/small", user="root")
    await fails(NotEnoughSpaceException, S.files.write, "/tmp/small/big", "x" * (3 << 20))
    same(await out("ls -A /tmp/small"), "")
    await do(S.files.write, "/tmp/small/fits", "x" * (1 << 19))


@scenario("watch")
async def watch():
    await do(S.files.make_dir, "/tmp/w")
    w = await Watch.open("/tmp/w", include_entry=True)
    await do(S.files.write, "/tmp/w/a", "x")
    same((await w.has("create", "a")).entry.path, "/tmp/w/a")
    assert (await w.has("write", "a")).entry is not None
    await run("chmod 600 /tmp/w/a; mv /tmp/w/a /tmp/w/b; rm /tmp/w/b")
    await w.has("chmod", "a")
    same((await w.has("rename", "a")).entry, None)
    await w.has("create", "b")
    same((await w.has("remove", "b")).entry, None)
    await run("mkdir /tmp/w/sub; echo x > /tmp/w/sub/deep")
    await w.has("create", "sub")
    assert not any("deep" in e.name for e in await w.poll()), "it is not recursive"
    await do(w.handle.stop)
    if MODE == "sync":
        await fails(SandboxException, w.handle.get_new_events)
    for kind, path in ((NotFoundException, "/no/such"), (InvalidArgumentException, "/etc/passwd")):
        try:
            await Watch.open(path)
            raise AssertionError(f"{path} is watched")
        except kind:
            pass


@scenario("watch recursively")
async def watch_recursively():
    await do(S.files.make_dir, "/tmp/wr/old")
    w = await Watch.open("/tmp/wr", recursive=True)
    await run(
        "mkdir -p /tmp/wr/new/er/est && touch /tmp/wr/new/er/est/leaf /tmp/wr/old/leaf && mv /tmp/wr/new /tmp/wr/moved && touch /tmp/wr/moved/er/later"
    )
    for e in ("create new", "create old/leaf", "rename new", "create moved"):
        await w.has(*e.split(" "))
    # What is in a new directory is reported by the name that it has when envd
    # comes to look: by the old or by the new one, and once.
    for name in ("er", "er/est", "er/est/leaf", "er/later"):

        async def found():
            return [e.name for e in await w.poll() if e.type.value == "create" and e.name in ("new/" + name, "moved/" + name)]

        await until(lambda: f"{name}, but {w.events}", found)
        same(len(await found()), 1)
    await do(w.handle.stop)


@scenario("git")
async def git():
    g = S.git
    await do(g.configure_user, "Me", "me@example.com")
    same(await do(g.get_config, "user.name"), "Me")
    same(await do(g.get_config, "no.such"), None)
    await do(g.init, "/tmp/g/origin", bare=True, initial_branch="main")
    await do(g.init, "/tmp/g/a", initial_branch="main")
    await do(S.files.write, "/tmp/g/a/file", "one\n")
    s = await do(g.status, "/tmp/g/a")
    same((s.current_branch, [(f.name, f.status, f.staged) for f in s.file_status]), ("main", [("file", "untracked", False)]))
    await do(g.add, "/tmp/g/a")
    await do(g.commit, "/tmp/g/a", "first", author_name="You", author_email="you@example.com")
    same(await out('git log -1 --format="%an %ae %s"', cwd="/tmp/g/a"), "You you@example.com first\n")
    await do(g.remote_add, "/tmp/g/a", "origin", "/tmp/g/origin")
    same(await do(g.remote_get, "/tmp/g/a", "origin"), "/tmp/g/origin")
    same(await do(g.remote_get, "/tmp/g/a", "other"), None)
    await do(g.push, "/tmp/g/a", remote="origin", branch="main", set_upstream=True)
    await do(g.clone, "/tmp/g/origin", path="/tmp/g/b", branch="main")
    same(await do(S.files.read, "/tmp/g/b/file"), "one\n")
    await do(g.create_branch, "/tmp/g/a", "topic")
    await do(g.checkout_branch, "/tmp/g/a", "main")
    b = await do(g.branches, "/tmp/g/a")
    same((b.current_branch, sorted(b.branches)), ("main", ["main", "topic"]))
    await do(g.delete_branch, "/tmp/g/a", "topic")
    await do(S.files.write, "/tmp/g/a/file", "two\n")
    await do(g.add, "/tmp/g/a", files=["file"])
    await do(g.restore, "/tmp/g/a", paths=["file"], staged=True, worktree=True)
    same(await do(S.files.read, "/tmp/g/a/file"), "one\n")
    await do(g.commit, "/tmp/g/a", "second", allow_empty=True)
    s = await do(g.status, "/tmp/g/a")
    same((s.ahead, s.behind, s.upstream), (1, 0, "origin/main"))
    await do(g.push, "/tmp/g/a")
    await do(g.pull, "/tmp/g/b")
    same((await out("git log --oneline | wc -l", cwd="/tmp/g/b")).strip(), "2")
    await do(g.reset, "/tmp/g/b", mode="hard", target="HEAD~1")
    same((await do(g.status, "/tmp/g/b")).behind, 1)
    await do(g.set_config, "my.key", "v", scope="local", path="/tmp/g/b")
    same(await do(g.get_config, "my.key", scope="local", path="/tmp/g/b"), "v")
    await do(g.dangerously_authenticate, "u", "p", host="git.example")
    assert "u:p@git.example" in await out("cat ~/.git-credentials")
    await fails(Exception, g.clone, "/tmp/g/none", path="/tmp/g/c")
    await fails(Exception, g.commit, "/tmp/g/b", "empty")


def http_ask(url, data=None, headers={}, method=None):
    req = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(req, timeout=PATIENCE) as r:
            return r.status, r.read()
    except urllib.error.HTTPError as err:
        return err.code, err.read()


async def ask(*args, **kwargs):
    return await asyncio.to_thread(http_ask, *args, **kwargs)


FORM = {"Content-Type": "multipart/form-data; boundary=b"}
BODY = b'--b\r\nContent-Disposition: form-data; name="file"; filename="named.txt"\r\n\r\nby url\r\n--b--\r\n'


@scenario("signed urls")
async def signed_urls():
    await do(S.files.write, "/tmp/s/a b✓.txt", "signed")
    down = S.download_url("/tmp/s/a b✓.txt")
    same(await ask(down), (200, b"signed"))
    same((await ask(down, headers={"Range": "bytes=1-3"})), (206, b"ign"))
    timed = S.download_url("/root/.bashrc", user="root", use_signature_expiration=60)
    assert "signature_expiration=" in timed, timed
    same((await ask(timed))[0], 200)
    code, body = await ask(S.download_url("/tmp/s/a b✓.txt", use_signature_expiration=-10))
    same((code, json.loads(body)), (401, {"code": 401, "message": "signature is already expired"}))
    code, body = await ask(S.upload_url("/tmp/s/up.txt", use_signature_expiration=60), data=BODY, headers=FORM)
    same((code, json.loads(body)[0]["path"]), (200, "/tmp/s/up.txt"))
    same(await do(S.files.read, "/tmp/s/up.txt"), "by url")
    # A signature to read does not write.
    assert (await ask(down, data=BODY, headers=FORM))[0] >= 400
    assert (await ask(re.sub("signature=[^&]*", "signature=v1_" + "A" * 43, down)))[0] >= 400


@scenario("hosts")
async def hosts():
    host = S.get_host(3000)
    same(host, f"3000-{S.sandbox_id}.{os.environ['TEST_DOMAIN']}")
    proxy = os.environ["E2B_SANDBOX_URL"]
    same((await ask(proxy, headers={"Host": host}))[0], 502)
    h = await run("cd /tmp && exec python3 -m http.server --bind 127.0.0.1 3000", background=True, timeout=0)

    async def answers():
        return (await ask(proxy + "/s/up.txt", headers={"Host": host})) == (200, b"by url")

    await until("the service on localhost answers", answers)
    await do(h.kill)
    # envd and its signatures, in the same form.
    url = urllib.parse.urlsplit(S.download_url("/tmp/s/up.txt"))
    envd = {"Host": S.get_host(49983)}
    same(await ask(f"{proxy}{url.path}?{url.query}", headers=envd), (200, b"by url"))
    same((await ask(proxy + "/files?path=/tmp/s/up.txt", headers=envd))[0], 401)
    same((await ask(proxy + "/init", headers=envd, method="POST"))[0], 404)


@scenario("running and metrics")
async def running_and_metrics():
    same(await do(S.is_running), True)
    last = (await do(S.get_metrics))[-1]
    assert last.cpu_count >= 1 and 0 < last.mem_used <= last.mem_total and last.disk_used < last.disk_total, last
    await do(S.kill)
    same(await do(S.is_running), False)


async def begin():
    global S
    S = await do(Box.create, timeout=900, envs={"GREETING": "hello there"})


main(begin, lambda: do(S.kill))
