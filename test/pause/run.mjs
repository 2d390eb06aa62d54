// Runs the scenarios of pause_test.go with the JavaScript client that is
// installed in the directory given, as a user's program would, and prints a
// line of JSON for each: {"name", "ok", "error", "ms"}.
import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import path from 'node:path'

const require = createRequire(path.join(path.resolve(process.argv[2]), 'package.json'))
const { Sandbox, SandboxNotFoundError } = require('e2b')

const until = async (what, ms, f) => {
  const end = Date.now() + ms
  for (;;) {
    const v = await f()
    if (v) return v
    assert.ok(Date.now() < end, `not within ${ms} ms: ${what}`)
    await new Promise((r) => setTimeout(r, 50))
  }
}
const opts = { timeoutMs: 300_000 }
const proxy = process.env.E2B_SANDBOX_URL

// fetch from a port of a sandbox, past the client.
const page = async (id, port, p = '/') => {
  const r = await fetch(proxy + p, { headers: { 'E2b-Sandbox-Id': id, 'E2b-Sandbox-Port': String(port), Connection: 'close' } })
  return { status: r.status, body: await r.text() }
}

// The guest: an array in memory that a request sums, with a count of requests;
// a counter that writes a file and remembers its longest rest; a database that
// is written all the time.
const guest = `
import hashlib, http.server, os, sqlite3, threading, time
data = bytearray(os.urandom(1 << 20) * 64)
want = hashlib.sha256(data).hexdigest()
def count():
    n = 0
    while True:
        n += 1
        with open('/tmp/count.new', 'w') as f: f.write('%d %d' % (n, os.getpid()))
        os.rename('/tmp/count.new', '/tmp/count')
        time.sleep(0.02)
def base():
    db = sqlite3.connect('/home/user/db')
    db.execute('create table if not exists t (n integer)')
    n = 0
    while True:
        n += 1
        db.execute('insert into t values (?)', (n,))
        db.commit()
        time.sleep(0.01)
for f in (count, base): threading.Thread(target=f, daemon=True).start()
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ok = hashlib.sha256(data).hexdigest() == want
        body = ('%s %d' % (ok, os.getpid())).encode()
        self.send_response(200); self.send_header('Content-Length', str(len(body))); self.end_headers(); self.wfile.write(body)
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(('0.0.0.0', 8000), H).serve_forever()
`
const web = `
let n = 0
require('http').createServer((q, r) => { r.end('node ' + process.pid + ' ' + ++n) }).listen(3000, '127.0.0.1')
`

let sbx, pty, screen = '', pid, nodePid
const decoder = new TextDecoder()

const scenarios = {
  'guests': async () => {
    sbx = await Sandbox.create({ ...opts, metadata: { k: 'v' }, envs: { GREETING: 'hello' } })
    await sbx.files.write([{ path: 'guest.py', data: guest }, { path: 'web.js', data: web }])
    await sbx.commands.run('python3 guest.py', { background: true, timeoutMs: 0 })
    await sbx.commands.run('node web.js', { background: true, timeoutMs: 0 })
    pty = await sbx.pty.create({ cols: 80, rows: 24, timeoutMs: 0, onData: (d) => { screen += decoder.decode(d) } })
    await sbx.pty.sendInput(pty.pid, new TextEncoder().encode('KEPT=in-this-shell; echo rea""dy\n'))
    await until('the terminal answers', 10_000, () => screen.includes('ready'))
    pid = (await until('the array is served', 20_000, async () => (await page(sbx.sandboxId, 8000)).body.match(/^True (\d+)$/)))[1]
    nodePid = (await until('the port is open', 20_000, async () => (await page(sbx.sandboxId, 3000)).body.match(/^node (\d+) 1$/)))[1]
  },
  'pause': async () => {
    assert.equal(await sbx.pause(), true)
    const r = await page(sbx.sandboxId, 8000)
    assert.equal(r.status, 502, 'a paused sandbox is reached')
    assert.equal(await sbx.isRunning(), false)
    assert.equal(await sbx.pause(), false)
    const info = await Sandbox.getInfo(sbx.sandboxId)
    assert.equal(info.state, 'paused')
    assert.equal(info.metadata.k, 'v')
    assert.ok(Math.abs(info.endAt - Date.now()) < 10_000)
    const paused = await Sandbox.list({ query: { state: ['paused'] } }).nextItems()
    assert.ok(paused.some((s) => s.sandboxId === sbx.sandboxId && s.state === 'paused'))
  },
  'everything goes on': async () => {
    await new Promise((r) => setTimeout(r, 1500)) // the clock must notice
    const before = sbx
    sbx = await Sandbox.connect(sbx.sandboxId, opts)
    assert.equal(sbx.sandboxId, before.sandboxId)
    assert.equal(await before.isRunning(), true) // its token is the same
    assert.deepEqual(await page(sbx.sandboxId, 8000), { status: 200, body: `True ${pid}` })
    assert.deepEqual(await page(sbx.sandboxId, 3000), { status: 200, body: `node ${nodePid} 2` })
    const count = async () => (await sbx.files.read('/tmp/count')).split(' ').map(Number)
    const [n, who] = await count()
    assert.equal(who, Number(pid))
    await until('the counter goes on', 5000, async () => (await count())[0] > n)
    // The wall clock, within what asking takes.
    const t0 = Date.now()
    const guestClock = Number((await sbx.commands.run('date +%s%3N')).stdout)
    assert.ok(guestClock > t0 - 100 && guestClock < Date.now() + 100, `the guest's clock is ${guestClock - t0} ms off`)
    assert.equal((await sbx.commands.run('python3 -c "import sqlite3; print(sqlite3.connect(\'/home/user/db\').execute(\'pragma integrity_check\').fetchone()[0])"')).stdout, 'ok\n')
    assert.equal((await sbx.commands.run('echo $GREETING')).stdout, 'hello\n')
    // The terminal has its shell; a client takes it up again.
    screen = ''
    const again = await sbx.pty.connect(pty.pid, { onData: (d) => { screen += decoder.decode(d) }, timeoutMs: 0 })
    await sbx.pty.sendInput(again.pid, new TextEncoder().encode('echo "<$KEPT>"\n'))
    await until('the shell has its variable', 10_000, () => screen.includes('<in-this-shell>'))
    await again.disconnect?.()
  },
  'ten pauses': async () => {
    for (let i = 1; i <= 10; i++) {
      assert.equal(await sbx.pause(), true)
      sbx = await Sandbox.connect(sbx.sandboxId, opts)
      if (i === 5) await sbx.files.write('fifth', 'after the fifth resume')
    }
    assert.equal(await sbx.files.read('fifth'), 'after the fifth resume')
    assert.deepEqual(await page(sbx.sandboxId, 8000), { status: 200, body: `True ${pid}` })
  },
  'without memory': async () => {
    assert.equal(await sbx.pause({ keepMemory: false }), true)
    sbx = await Sandbox.connect(sbx.sandboxId, opts)
    assert.equal(await sbx.files.read('fifth'), 'after the fifth resume')
    assert.equal((await page(sbx.sandboxId, 8000)).status, 502)
    assert.equal((await sbx.commands.run('python3 -c "import sqlite3; print(sqlite3.connect(\'/home/user/db\').execute(\'pragma integrity_check\').fetchone()[0])"')).stdout, 'ok\n')
    assert.equal((await sbx.commands.run('echo $GREETING')).stdout, 'hello\n')
    // Asked for at the resume.
    await sbx.commands.run('sleep 1000', { background: true, timeoutMs: 0 })
    assert.equal(await sbx.pause(), true)
    sbx = await Sandbox.connect(sbx.sandboxId, { ...opts, onResume: 'reboot' })
    assert.deepEqual(await sbx.commands.list(), [])
  },
  'snapshots': async () => {
    await sbx.files.write('state', 'one')
    const snap = await sbx.createSnapshot()
    await sbx.files.write('state', 'two')
    const named = await sbx.createSnapshot({ name: `kept-${process.pid}` })
    assert.match(named.snapshotId, new RegExp(`/kept-${process.pid}:default$`))
    const listed = await sbx.listSnapshots().nextItems()
    assert.deepEqual(listed.map((s) => s.snapshotId), [named.snapshotId, snap.snapshotId])
    assert.equal(await sbx.isRunning(), true)
    for (const [ref, want] of [[snap.snapshotId, 'one'], [named.snapshotId, 'two'], [`kept-${process.pid}`, 'two']]) {
      const made = await Sandbox.create(ref, opts)
      assert.notEqual(made.sandboxId, sbx.sandboxId)
      assert.equal(await made.files.read('/home/user/state'), want)
      await made.kill()
    }
    assert.equal(await Sandbox.deleteSnapshot(snap.snapshotId), true)
    assert.equal(await Sandbox.deleteSnapshot(snap.snapshotId), false)
    assert.equal(await Sandbox.deleteSnapshot(named.snapshotId), true)
    assert.deepEqual(await sbx.listSnapshots().nextItems(), [])
  },
  'forks': async () => {
    const identity = 'cat /etc/machine-id /run/cay/generation /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | base64; python3 -c "import uuid; print(uuid.uuid4())"; hostname'
    await sbx.files.write('state', 'before')
    const began = Date.now()
    const forks = await sbx.fork({ count: 3, timeoutMs: 120_000 })
    const took = Date.now() - began
    for (const f of forks) assert.ok(!(f instanceof Error), String(f))
    const all = [sbx, ...forks]
    assert.equal(new Set(all.map((s) => s.sandboxId)).size, 4)
    await sbx.files.write('state', 'source')
    await forks[0].files.write('state', 'first')
    const seen = new Set()
    let lines = 0
    for (const s of all) {
      for (const l of (await s.commands.run(identity)).stdout.trim().split('\n')) {
        seen.add(l)
        lines++
      }
    }
    assert.equal(lines, 24)
    assert.equal(seen.size, lines, 'something of their identity is shared')
    assert.equal(await forks[1].files.read('state'), 'before')
    assert.equal(await sbx.files.read('state'), 'source')
    await Promise.all(forks.map((f) => f.kill()))
    assert.equal(await sbx.isRunning(), true)
    assert.ok(took < 30_000, `three forks took ${took} ms`)
  },
  'pause at the end': async () => {
    const s = await Sandbox.create({ timeoutMs: 4000, lifecycle: { onTimeout: 'pause', autoResume: true } })
    await s.files.write('here', 'still')
    const info = await s.getInfo()
    assert.deepEqual(info.lifecycle, { onTimeout: 'pause', autoResume: true })
    await until('it is paused at its end', 15_000, async () => (await Sandbox.getInfo(s.sandboxId)).state === 'paused')
    // This is what wakes it. It is called paused from when the pause begins, so
    // that the first read may still meet the guest that is being paused.
    await until('a read wakes it', 15_000, async () =>
      (await s.files.read('here')) === 'still' && (await s.getInfo()).state === 'running')
    await s.kill()
    const t = await Sandbox.create({ timeoutMs: 2000, lifecycle: { onTimeout: { action: 'pause', keepMemory: false } } })
    await t.files.write('here', 'still')
    await until('it is paused at its end', 15_000, async () => (await Sandbox.getInfo(t.sandboxId)).state === 'paused')
    // It is called paused from when the pause begins.
    await until('nothing wakes it', 5000, async () => !(await t.isRunning()))
    assert.equal((await Sandbox.getInfo(t.sandboxId)).state, 'paused')
    const again = await t.connect(opts)
    assert.equal(await again.files.read('here'), 'still')
    await again.kill()
  },
  'kill a paused one': async () => {
    assert.equal(await sbx.pause(), true)
    assert.equal(await sbx.kill(), true)
    assert.equal(await Sandbox.kill(sbx.sandboxId), false)
    await assert.rejects(Sandbox.connect(sbx.sandboxId, opts), SandboxNotFoundError)
  },
}

for (const [name, run] of Object.entries(scenarios)) {
  const began = Date.now()
  const result = { name, ok: true }
  try {
    await run()
  } catch (err) {
    result.ok = false
    result.error = err.stack ?? String(err)
  }
  console.log(JSON.stringify({ ...result, ms: Date.now() - began }))
}
if (sbx) await sbx.kill().catch(() => {})
process.exit(0) // idle connections would keep the process
