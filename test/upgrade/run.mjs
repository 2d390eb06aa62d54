// Runs the scenarios of envd_test.go with the JavaScript client.
import assert from 'node:assert/strict'
import { client, fails, go, kind, until } from '../sdk/frame.mjs'

const { Sandbox } = client()
const text = new TextEncoder()

// upgrade has the operator give a sandbox the server's envd.
const upgrade = async (sbx) => {
  const r = await fetch(`${process.env.E2B_API_URL}/operator/v1/sandboxes/${sbx.sandboxId}/upgrade`,
    { method: 'POST', headers: { 'X-Admin-Token': process.env.TEST_ADMIN } })
  return { status: r.status, ...(await r.json()) }
}

// What a stream ends with that the daemon ends: the client takes `unavailable` for
// a sandbox whose time is over.
const cut = 'TimeoutError'

let sbx

const scenarios = {
  'all goes on': async () => {
    sbx = await Sandbox.create({ timeoutMs: 600_000 })
    // A process with output.
    const lines = 400
    let out = ''
    const onStdout = (s) => { out += s }
    const counter = await sbx.commands.run(`for i in $(seq ${lines}); do echo $i; sleep 0.01; done; exit 7`, { background: true, timeoutMs: 0, onStdout })
    // A terminal, with a variable in its shell.
    let screen = ''
    const decoder = new TextDecoder()
    const onData = (d) => { screen += decoder.decode(d, { stream: true }) }
    const pty = await sbx.pty.create({ cols: 80, rows: 24, timeoutMs: 0, onData })
    await sbx.pty.sendInput(pty.pid, text.encode('kept=42; echo is-$kept\n'))
    await until('the terminal answers', () => screen.includes('is-42'))
    // A stream of events, of files that are made all the while.
    const seen = []
    let ended
    await sbx.files.makeDir('/tmp/w')
    await sbx.files.watchDir('/tmp/w', (e) => { if (e.type === 'create') seen.push(e.name) }, { timeoutMs: 0, onExit: (err) => { ended = err ?? true } })
    const maker = await sbx.commands.run('i=0; while :; do i=$((i+1)); mkdir /tmp/w/$i; sleep 0.01; done', { background: true, timeoutMs: 0 })
    const making = maker.wait().catch((err) => err)
    // An upload in the place of a file.
    const piece = text.encode('x'.repeat(64 << 10))
    await sbx.files.write('/tmp/file', 'old')
    let finish
    const finished = new Promise((resolve) => { finish = resolve })
    let pieces = 0
    const upload = sbx.files.write('/tmp/file', new ReadableStream({
      async pull(c) {
        if (pieces === 20) await finished
        if (pieces++ < 40) c.enqueue(piece); else c.close()
      },
    }), { useOctetStream: true }).then(() => 'whole', (err) => `broken: ${kind(err)}`)
    await until('all is under way', () => out.length > 0 && seen.length > 10)

    // Who connects again when a stream ends misses nothing.
    const again = fails(counter.wait(), cut).then(async (err) => {
      assert.match(err.message, /timeout|unavailable/i)
      const connect = () => sbx.commands.connect(counter.pid, { timeoutMs: 0, onStdout })
      return await connect().catch((err) => {
        // A call that meets the end of a kept connection is not repeated by the
        // proxy, which cannot know whether it was carried out: a 502.
        assert.equal(kind(err), 'SandboxNotFoundError')
        console.error('a call met the end of a connection')
        return connect()
      })
    })
    again.catch(() => {}) // it is awaited below
    const upgrading = upgrade(sbx)
    await until('half of the upload is sent', () => pieces >= 20)
    await new Promise((r) => setTimeout(r, 300)) // so that it is likely under way
    finish()
    const done = await upgrading
    assert.equal(done.status, 200, JSON.stringify(done))
    assert.deepEqual([done.changed, done.digest !== done.fromDigest], [true, true], JSON.stringify(done))

    // The upload is whole, or the old file is there.
    const how = await upload
    const now = await sbx.files.read('/tmp/file')
    assert.ok(how === 'whole' ? now === 'x'.repeat(40 * (64 << 10)) : now === 'old', `${how}; the file has ${now.length} bytes`)
    assert.equal((await sbx.commands.run('ls -A /tmp | grep -c "^[.]envd-" || true')).stdout, '0\n')

    const exit = await fails((await again).wait(), 'CommandExitError')
    assert.equal(exit.exitCode, 7)
    const want = Array.from({ length: lines }, (_, i) => `${i + 1}\n`).join('')
    assert.ok(out === want, `the process wrote ${out.length} characters of ${want.length}`)
    await fails(pty.wait(), cut)
    const terminal = await sbx.pty.connect(pty.pid, { timeoutMs: 0, onData })
    await sbx.pty.sendInput(pty.pid, text.encode('echo still-$kept; exit 3\n'))
    assert.equal((await fails(terminal.wait(), 'CommandExitError')).exitCode, 3)
    assert.ok(screen.includes('still-42'), screen)
    // Up to its end the watch has told of everything, in order.
    await until('the watch ends', () => ended)
    assert.deepEqual(seen, seen.map((_, i) => `${i + 1}`))
    assert.ok((await making) instanceof Error)
    assert.equal(await sbx.commands.kill(maker.pid), true)
    // And all works as before.
    assert.equal((await sbx.commands.run('echo $0 fine')).stdout, '/bin/bash fine\n')
  },
  'twice': async () => {
    const again = await upgrade(sbx)
    assert.deepEqual([again.status, again.changed], [200, false])
  },
  'over a pause': async () => {
    const fresh = await Sandbox.create({ timeoutMs: 600_000 })
    const h = await fresh.commands.run('echo begun; read line; echo "got $line"', { background: true, stdin: true, timeoutMs: 0 })
    await until('it has begun', () => h.stdout.includes('begun'))
    assert.equal((await upgrade(fresh)).changed, true)
    await fails(h.wait(), cut)
    // Right away, when it is not known yet whether the other envd stays.
    for (let i = 0; i < 2; i++) {
      await fresh.pause()
      await fresh.connect({ timeoutMs: 600_000 })
      assert.equal((await upgrade(fresh)).changed, false)
    }
    await fresh.commands.sendStdin(h.pid, 'a word\n')
    const later = await fresh.commands.connect(h.pid, { timeoutMs: 0 })
    assert.equal((await later.wait()).stdout.trim(), 'got a word')
    await fresh.kill()
  },
}

await go(scenarios, () => sbx.kill())
