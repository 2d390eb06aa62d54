// Runs the scenarios of pause_test.go with the JavaScript client.
import assert from 'node:assert/strict'
import fs from 'node:fs'
import { client, go, until } from '../sdk/frame.mjs'

const { Sandbox, SandboxNotFoundError } = client()
const opts = { timeoutMs: 300_000 }
const proxy = process.env.E2B_SANDBOX_URL

// fetch from a port of a sandbox, past the client.
const page = async (id, port, p = '/') => {
  const r = await fetch(proxy + p, { headers: { 'E2b-Sandbox-Id': id, 'E2b-Sandbox-Port': String(port), Connection: 'close' } })
  return { status: r.status, body: await r.text() }
}

const guest = fs.readFileSync('guest/guest.py')
const web = fs.readFileSync('guest/guest.js')

// well asks both guests how they are: nothing is lost.
const well = async (id) => {
  for (const [port, pid] of [[8000, Number(guestPid)], [3000, Number(nodePid)]]) {
    const { status, body } = await page(id, port, '/state')
    assert.equal(status, 200, body)
    const s = JSON.parse(body)
    assert.deepEqual([s.whole, s.pid, s.errors], [true, pid, []])
  }
}

// integrity: the database is whole, and has no gaps.
const integrity = `python3 -c "import sqlite3; db = sqlite3.connect('/home/user/db', timeout=60); print(db.execute('pragma integrity_check').fetchone()[0], db.execute('select count(*) = max(n) from t').fetchone()[0])"`

let sbx, pty, screen = '', guestPid, nodePid
const decoder = new TextDecoder()

const scenarios = {
  'guests': async () => {
    sbx = await Sandbox.create({ ...opts, metadata: { k: 'v' }, envs: { GREETING: 'hello' } })
    await sbx.files.write([{ path: 'guest.py', data: new Blob([guest]) }, { path: 'guest.js', data: new Blob([web]) }])
    await sbx.commands.run('python3 guest.py 32 0.5', { background: true, timeoutMs: 0 })
    await sbx.commands.run('node guest.js', { background: true, timeoutMs: 0 })
    pty = await sbx.pty.create({ cols: 80, rows: 24, timeoutMs: 0, onData: (d) => { screen += decoder.decode(d) } })
    await sbx.pty.sendInput(pty.pid, new TextEncoder().encode('KEPT=in-this-shell; echo rea""dy\n'))
    await until('the terminal answers', () => screen.includes('ready'))
    guestPid = (await until('the array is served', async () => (await page(sbx.sandboxId, 8000)).body.match(/^True (\d+)$/)))[1]
    nodePid = (await until('the port is open', async () => (await page(sbx.sandboxId, 3000)).body.match(/^node (\d+) 1$/)))[1]
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
    assert.deepEqual(await page(sbx.sandboxId, 8000), { status: 200, body: `True ${guestPid}` })
    assert.deepEqual(await page(sbx.sandboxId, 3000), { status: 200, body: `node ${nodePid} 2` })
    const count = async () => (await sbx.files.read('/tmp/count')).split(' ').map(Number)
    const [n, who] = await count()
    assert.equal(who, Number(guestPid))
    await until('the counter goes on', async () => (await count())[0] > n)
    // The wall clock, within what asking takes.
    const t0 = Date.now()
    const guestClock = Number((await sbx.commands.run('date +%s%3N')).stdout)
    assert.ok(guestClock > t0 - 100 && guestClock < Date.now() + 100, `the guest's clock is ${guestClock - t0} ms off`)
    assert.equal((await sbx.commands.run(integrity)).stdout, 'ok 1\n')
    await well(sbx.sandboxId)
    assert.equal((await sbx.commands.run('echo $GREETING')).stdout, 'hello\n')
    // The terminal has its shell; a client takes it up again.
    screen = ''
    const again = await sbx.pty.connect(pty.pid, { onData: (d) => { screen += decoder.decode(d) }, timeoutMs: 0 })
    await sbx.pty.sendInput(again.pid, new TextEncoder().encode('echo "<$KEPT>"\n'))
    await until('the shell has its variable', () => screen.includes('<in-this-shell>'))
    await again.disconnect?.()
  },
  'ten pauses': async () => {
    for (let i = 1; i <= 10; i++) {
      assert.equal(await sbx.pause(), true)
      sbx = await Sandbox.connect(sbx.sandboxId, opts)
      if (i === 5) await sbx.files.write('fifth', 'after the fifth resume')
    }
    assert.equal(await sbx.files.read('fifth'), 'after the fifth resume')
    await well(sbx.sandboxId)
    assert.equal((await sbx.commands.run(integrity)).stdout, 'ok 1\n')
  },
  'by ID alone': async () => {
    const id = sbx.sandboxId
    assert.equal(await Sandbox.pause(id), true)
    assert.equal(await Sandbox.pause(id), false)
    await assert.rejects(Sandbox.setTimeout(id, 100_000), /409|paused|not running/, 'a paused sandbox has no end')
    sbx = await Sandbox.connect(id, { timeoutMs: 100_000 })
    const inSeconds = async () => ((await Sandbox.getInfo(id)).endAt - Date.now()) / 1000
    assert.ok(Math.abs(await inSeconds() - 100) < 20)
    // It is never shortened by who connects, and is extended by him.
    assert.equal((await sbx.connect({ timeoutMs: 10_000 })).sandboxId, id)
    assert.ok(await inSeconds() > 60)
    await Sandbox.connect(id, opts)
    assert.ok(await inSeconds() > 200)
    assert.equal(await Sandbox.betaPause(id), true)
    // Twice at once is one resume.
    const both = await Promise.all([Sandbox.connect(id, { ...opts, onResume: 'restore' }), Sandbox.connect(id, opts)])
    for (const b of both) assert.equal(await b.isRunning(), true)
    await well(id)
    for (const call of ['pause', 'connect', 'createSnapshot', 'fork']) {
      await assert.rejects(Sandbox[call]('i00000000000000000000'), SandboxNotFoundError, call)
    }
  },
  'without memory': async () => {
    assert.equal(await sbx.pause({ keepMemory: false }), true)
    sbx = await Sandbox.connect(sbx.sandboxId, opts)
    assert.equal(await sbx.files.read('fifth'), 'after the fifth resume')
    assert.equal((await page(sbx.sandboxId, 8000)).status, 502)
    assert.equal((await sbx.commands.run(integrity)).stdout, 'ok 1\n')
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
    // Page by page, and by name.
    const pages = Sandbox.listSnapshots({ sandboxId: sbx.sandboxId, limit: 1 })
    const paged = []
    while (pages.hasNext) paged.push(...(await pages.nextItems()))
    assert.deepEqual(paged, listed)
    const byName = async (name) => (await Sandbox.listSnapshots({ name }).nextItems()).map((s) => s.snapshotId)
    assert.deepEqual(await byName(`kept-${process.pid}`), [named.snapshotId])
    assert.deepEqual(await byName(`kept-${process.pid}:other`), [])
    // The name moves to the next one.
    const again = await Sandbox.createSnapshot(sbx.sandboxId, { name: `kept-${process.pid}` })
    assert.deepEqual(again, named)
    const all = await sbx.listSnapshots().nextItems()
    assert.equal(all.length, 3)
    for (const s of all) assert.equal(await Sandbox.deleteSnapshot(s.snapshotId), true)
    assert.equal(await Sandbox.deleteSnapshot(snap.snapshotId), false)
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
    assert.ok(took < 60_000, `three forks took ${took} ms`)
    // One is what is made when nobody says how many, and it is the same guest.
    const [only, ...none] = await Sandbox.fork(sbx.sandboxId)
    assert.deepEqual(none, [])
    assert.equal((await only.getInfo()).metadata.k, 'v')
    assert.equal((await only.commands.run('cat /home/user/state; echo $GREETING')).stdout, 'sourcehello\n')
    await only.kill()
  },
  'pause at the end': async () => {
    const s = await Sandbox.create({ timeoutMs: 4000, lifecycle: { onTimeout: 'pause', autoResume: true } })
    await s.files.write('here', 'still')
    const info = await s.getInfo()
    assert.deepEqual(info.lifecycle, { onTimeout: 'pause', autoResume: true })
    await until('it is paused at its end', async () => (await Sandbox.getInfo(s.sandboxId)).state === 'paused')
    // This is what wakes it. It is called paused from when the pause begins, so
    // that the first read may still meet the guest that is being paused.
    await until('a read wakes it', async () =>
      (await s.files.read('here')) === 'still' && (await s.getInfo()).state === 'running')
    await s.kill()
    const t = await Sandbox.create({ timeoutMs: 2000, lifecycle: { onTimeout: { action: 'pause', keepMemory: false } } })
    await t.files.write('here', 'still')
    await until('it is paused at its end', async () => (await Sandbox.getInfo(t.sandboxId)).state === 'paused')
    // It is called paused from when the pause begins.
    await until('nothing wakes it', async () => !(await t.isRunning()))
    assert.equal((await Sandbox.getInfo(t.sandboxId)).state, 'paused')
    const again = await t.connect(opts)
    assert.equal(await again.files.read('here'), 'still')
    await again.kill()
  },
  'traffic wakes it': async () => {
    const s = await Sandbox.create({ ...opts, lifecycle: { onTimeout: 'pause', autoResume: true } })
    await s.files.write('guest.js', new Blob([web]))
    await s.commands.run('node guest.js', { background: true, timeoutMs: 0 })
    const who = (await until('the port is open', async () => (await page(s.sandboxId, 3000)).body.match(/^node (\d+) 1$/)))[1]
    // A request to a port, a command, a file, a terminal: each of them wakes it.
    const wakes = {
      port: async () => assert.deepEqual(await page(s.sandboxId, 3000), { status: 200, body: `node ${who} 2` }),
      command: async () => assert.equal((await s.commands.run('echo $((6*7))')).stdout, '42\n'),
      file: async () => assert.equal((await s.files.list('/home/user')).some((f) => f.name === 'guest.js'), true),
      terminal: async () => { await (await s.pty.create({ cols: 80, rows: 24, onData: () => {} })).kill() },
    }
    for (const [what, wake] of Object.entries(wakes)) {
      assert.equal(await s.pause(), true)
      assert.equal((await s.getInfo()).state, 'paused', what)
      await wake()
      assert.equal((await s.getInfo()).state, 'running', what)
    }
    await s.kill()
    // Nobody said that it may be woken.
    const t = await Sandbox.create({ ...opts, lifecycle: { onTimeout: 'pause' } })
    assert.equal(await t.pause(), true)
    await assert.rejects(t.commands.run('true'))
    assert.equal((await t.getInfo()).state, 'paused')
    await t.kill()
  },
  'kill a paused one': async () => {
    assert.equal(await sbx.pause(), true)
    assert.equal(await sbx.kill(), true)
    assert.equal(await Sandbox.kill(sbx.sandboxId), false)
    await assert.rejects(Sandbox.connect(sbx.sandboxId, opts), SandboxNotFoundError)
  },
}

await go(scenarios, () => sbx.kill())
