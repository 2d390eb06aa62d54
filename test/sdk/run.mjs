// Runs the scenarios of sdk_test.go with the JavaScript client.
import assert from 'node:assert/strict'
import { client, fails, go, kind, kinds, patience, until, version } from './frame.mjs'

const { Sandbox } = client()
const tag = `js-${version()}-${process.pid}`
const opts = { timeoutMs: 600_000 }
let sbx // shared by the scenarios of commands and files

const scenarios = {
  'create': async () => {
    sbx = await Sandbox.create({ ...opts, metadata: { run: tag, 'a b': 'c&d=e' }, envs: { GREETING: 'hello there' } })
    assert.match(sbx.sandboxId, /^i[a-z0-9]{20}$/)
    assert.equal(await sbx.isRunning(), true)
  },
  'stdout and stderr': async () => {
    const r = await sbx.commands.run('echo out; echo err >&2; printf "no newline ✓"')
    assert.deepEqual([r.stdout, r.stderr, r.exitCode], ['out\nno newline ✓', 'err\n', 0])
  },
  'output as it comes': async () => {
    let seen = ''
    const take = (d) => { seen += d }
    const wait = 'until [ -e /tmp/go-on ]; do sleep 0.05; done'
    const command = sbx.commands.run(`echo one; ${wait}; echo two; sleep 0.2; echo three >&2`, { onStdout: take, onStderr: take })
    command.catch(() => {}) // it is awaited below
    await until('the first line comes while the command waits', () => seen === 'one\n')
    await sbx.files.write('/tmp/go-on', '')
    await command
    assert.equal(seen, 'one\ntwo\nthree\n')
  },
  'much output': async () => {
    const r = await sbx.commands.run('seq 1 200000')
    assert.equal(r.stdout.length, 1288895)
    assert.ok(r.stdout.endsWith('199999\n200000\n'))
  },
  'exit code': async () => {
    const err = await fails(sbx.commands.run('echo before; echo why >&2; exit 42'), 'CommandExitError')
    assert.deepEqual([err.exitCode, err.stdout, err.stderr], [42, 'before\n', 'why\n'])
  },
  'exit by signal': async () => {
    const err = await fails(sbx.commands.run('kill -9 $$'), 'CommandExitError')
    assert.notEqual(err.exitCode, 0)
  },
  'unknown command': async () => {
    const err = await fails(sbx.commands.run('no-such-program-here'), 'CommandExitError')
    assert.equal(err.exitCode, 127)
    assert.match(err.stderr, /no-such-program-here: command not found/)
  },
  'background': async () => {
    const h = await sbx.commands.run('sleep 0.3; echo done', { background: true })
    assert.ok(h.pid > 0)
    const r = await h.wait()
    assert.deepEqual([r.stdout, r.exitCode], ['done\n', 0])
  },
  'list commands': async () => {
    const h = await sbx.commands.run('sleep 77', { background: true })
    const p = (await sbx.commands.list()).find((p) => p.pid === h.pid)
    assert.ok(p, 'the command is not listed')
    assert.equal(p.cmd, '/bin/bash')
    assert.deepEqual(p.args, ['-l', '-c', 'sleep 77'])
    await h.kill()
    await until('the command is not listed any more', async () => !(await sbx.commands.list()).some((p) => p.pid === h.pid))
  },
  'kill a command': async () => {
    const h = await sbx.commands.run('sleep 600', { background: true })
    assert.equal(await h.kill(), true)
    await fails(h.wait(), 'CommandExitError')
    assert.equal(await sbx.commands.kill(999999), false)
  },
  'connect to a command': async () => {
    const h = await sbx.commands.run('until [ -e /tmp/say-it ]; do sleep 0.05; done; echo later', { background: true })
    await h.disconnect()
    const again = await sbx.commands.connect(h.pid)
    await sbx.files.write('/tmp/say-it', '')
    assert.equal((await again.wait()).stdout, 'later\n')
  },
  'stdin': async () => {
    const h = await sbx.commands.run('read line; echo "got $line"', { background: true, stdin: true })
    await sbx.commands.sendStdin(h.pid, 'a line\n')
    assert.equal((await h.wait()).stdout, 'got a line\n')
  },
  'environment': async () => {
    const r = await sbx.commands.run('echo "$GREETING|$MINE|$E2B_SANDBOX|$E2B_SANDBOX_ID|$HOME|$USER"', { envs: { MINE: 'x y' } })
    assert.equal(r.stdout, `hello there|x y|true|${sbx.sandboxId}|/home/user|user\n`)
    const over = await sbx.commands.run('echo $GREETING', { envs: { GREETING: 'other' } })
    assert.equal(over.stdout, 'other\n')
  },
  'working directory': async () => {
    assert.equal((await sbx.commands.run('pwd')).stdout, '/home/user\n')
    assert.equal((await sbx.commands.run('pwd', { cwd: '/usr/lib' })).stdout, '/usr/lib\n')
    await fails(sbx.commands.run('pwd', { cwd: '/no/such/place' }), 'InvalidArgumentError')
  },
  'user': async () => {
    assert.equal((await sbx.commands.run('id -un; id -u')).stdout, 'user\n1000\n')
    assert.equal((await sbx.commands.run('id -un; pwd', { user: 'root' })).stdout, 'root\n/root\n')
    assert.equal((await sbx.commands.run('sudo -n id -u')).stdout, '0\n')
    await fails(sbx.commands.run('true', { user: 'nobody-knows' }), 'AuthenticationError')
  },
  'command timeout': async () => {
    const began = Date.now()
    await fails(sbx.commands.run('echo $$ > /tmp/slow.pid; sleep 600', { timeoutMs: 700 }), 'TimeoutError')
    assert.ok(Date.now() - began < patience, 'the timeout came late')
    // The command is ended, not only let go of.
    await until('the command is gone', async () =>
      (await sbx.commands.run('kill -0 $(cat /tmp/slow.pid) 2>/dev/null && echo alive || echo gone')).stdout === 'gone\n')
  },
  'python and node': async () => {
    const r = await sbx.commands.run(`python3 -c 'print(6*7)'; node -e 'console.log(6*7)'; git --version; curl --version | head -1`)
    assert.match(r.stdout, /^42\n42\ngit version .*\ncurl /)
  },
  'write and read': async () => {
    const info = await sbx.files.write('/home/user/deep/er/a.txt', 'text ✓')
    assert.equal(info.path, '/home/user/deep/er/a.txt')
    assert.equal(await sbx.files.read('/home/user/deep/er/a.txt'), 'text ✓')
    assert.equal(await sbx.files.read('deep/er/a.txt'), 'text ✓') // below the home directory
    assert.equal((await sbx.commands.run('stat -c %U:%G deep/er/a.txt')).stdout, 'user:user\n')
    await sbx.files.write('deep/er/a.txt', 'shorter')
    assert.equal(await sbx.files.read('deep/er/a.txt'), 'shorter')
    await sbx.files.write('empty', '')
    assert.equal(await sbx.files.read('empty'), '')
  },
  'bytes': async () => {
    const all = new Uint8Array(1 << 20).map((_, i) => (i * 31) % 256)
    await sbx.files.write('/tmp/bytes', all.buffer)
    const back = await sbx.files.read('/tmp/bytes', { format: 'bytes' })
    assert.ok(Buffer.from(back).equals(Buffer.from(all)), 'other bytes came back')
  },
  'many files': async () => {
    const infos = await sbx.files.write([{ path: '/tmp/many/1', data: 'one' }, { path: '/tmp/many/sub/2', data: 'two' }])
    assert.deepEqual(infos.map((i) => i.path).sort(), ['/tmp/many/1', '/tmp/many/sub/2'])
    assert.equal(await sbx.files.read('/tmp/many/sub/2'), 'two')
  },
  'list files': async () => {
    const flat = await sbx.files.list('/tmp/many')
    assert.deepEqual(flat.map((e) => [e.name, e.type, e.path]), [['1', 'file', '/tmp/many/1'], ['sub', 'dir', '/tmp/many/sub']])
    const deep = await sbx.files.list('/tmp/many', { depth: 2 })
    assert.deepEqual(deep.map((e) => e.path), ['/tmp/many/1', '/tmp/many/sub', '/tmp/many/sub/2'])
    assert.equal(flat[0].size, 3)
  },
  'file info': async () => {
    await sbx.commands.run('chmod 640 /tmp/many/1 && ln -s /tmp/many/1 /tmp/many/link')
    const i = await sbx.files.getInfo('/tmp/many/1')
    assert.deepEqual([i.name, i.type, i.size, i.mode, i.permissions, i.owner, i.group], ['1', 'file', 3, 0o640, '-rw-r-----', 'user', 'user'])
    assert.equal((await sbx.files.getInfo('/tmp/many/link')).symlinkTarget, '/tmp/many/1')
  },
  'move': async () => {
    await sbx.files.write('/tmp/from', 'moving')
    const e = await sbx.files.rename('/tmp/from', '/tmp/new/place/to')
    assert.equal(e.path, '/tmp/new/place/to')
    assert.equal(await sbx.files.exists('/tmp/from'), false)
    assert.equal(await sbx.files.read('/tmp/new/place/to'), 'moving')
    await fails(sbx.files.rename('/tmp/from', '/tmp/x'), 'NotFoundError')
  },
  'remove': async () => {
    assert.equal(await sbx.files.makeDir('/tmp/dir/of'), true)
    assert.equal(await sbx.files.makeDir('/tmp/dir/of'), false)
    await sbx.files.write('/tmp/dir/of/file', 'x')
    await sbx.files.remove('/tmp/dir')
    assert.equal(await sbx.files.exists('/tmp/dir'), false)
    await fails(sbx.files.read('/tmp/dir/of/file'), 'NotFoundError')
    await fails(sbx.files.list('/tmp/dir'), 'NotFoundError')
  },
  'info': async () => {
    const i = await sbx.getInfo()
    assert.deepEqual([i.sandboxId, i.state, i.metadata], [sbx.sandboxId, 'running', { run: tag, 'a b': 'c&d=e' }])
    assert.ok(i.cpuCount > 0 && i.memoryMB > 0 && i.envdVersion)
    assert.ok(Math.abs(i.endAt - i.startedAt - opts.timeoutMs) < patience, `ends ${i.endAt - i.startedAt} ms after its start`)
  },
  'set timeout': async () => {
    await sbx.setTimeout(3_000_000)
    const left = (await sbx.getInfo()).endAt - Date.now()
    assert.ok(left > 3_000_000 - patience && left < 3_001_000, `${left} ms are left`)
    await Sandbox.setTimeout(sbx.sandboxId, 300_000) // also shortens
    const less = (await sbx.getInfo()).endAt - Date.now()
    assert.ok(less > 300_000 - patience && less < 301_000, `${less} ms are left`)
  },
  'list with metadata and pages': async () => {
    const group = `${tag}-pages`
    const made = []
    for (let i = 0; i < 3; i++) made.push(await Sandbox.create({ ...opts, metadata: { group, n: String(i), 'a b': 'c&d=e' } }))
    const ids = made.map((s) => s.sandboxId)
    try {
      const seen = []
      let pages = 0
      const all = Sandbox.list({ query: { metadata: { group, 'a b': 'c&d=e' }, state: ['running'] }, limit: 2 })
      while (all.hasNext) {
        const items = await all.nextItems()
        assert.ok(items.length <= 2)
        seen.push(...items)
        pages++
      }
      assert.equal(pages, 2)
      assert.deepEqual(seen.map((s) => s.sandboxId), ids.toReversed?.() ?? [...ids].reverse()) // newest first
      assert.deepEqual(seen.map((s) => s.metadata.n), ['2', '1', '0'])
      const one = await Sandbox.list({ query: { metadata: { group, n: '1' } } }).nextItems()
      assert.deepEqual(one.map((s) => s.sandboxId), [ids[1]])
      const none = await Sandbox.list({ query: { metadata: { group, n: '7' } } }).nextItems()
      assert.deepEqual(none, [])
    } finally {
      await Promise.all(made.map((s) => s.kill()))
    }
  },
  'connect': async () => {
    const again = await Sandbox.connect(sbx.sandboxId)
    assert.equal(again.sandboxId, sbx.sandboxId)
    assert.equal((await again.commands.run('cat deep/er/a.txt')).stdout, 'shorter')
  },
  'kill': async () => {
    const id = sbx.sandboxId
    assert.equal(await sbx.kill(), true)
    assert.equal(await Sandbox.kill(id), false)
    assert.equal(await sbx.isRunning(), false)
    await fails(sbx.getInfo(), 'NotFoundError')
    await fails(sbx.commands.run('true'), 'SandboxError')
    const left = await Sandbox.list({ query: { metadata: { run: tag } } }).nextItems()
    assert.deepEqual(left, [])
  },
  'kill during a command': async () => {
    const s = await Sandbox.create(opts)
    const h = await s.commands.run('sleep 600', { background: true })
    const ended = h.wait().then(() => 'no error', (err) => kind(err))
    await s.kill()
    const how = await Promise.race([ended, new Promise((r) => setTimeout(r, patience, 'nothing'))])
    assert.equal(how, 'TimeoutError')
  },
  'the end comes': async () => {
    // A slow machine needs longer to look at a sandbox before its end.
    let s, end
    for (const timeoutMs of [2000, 20_000, patience]) {
      s = await Sandbox.create({ timeoutMs })
      end = (await s.getInfo().catch((err) => assert.ok(kinds(err).includes('NotFoundError'), err)))?.endAt.getTime()
      if (end && await s.isRunning()) break
      end = undefined
    }
    assert.ok(end, 'no sandbox was there before its end')
    await until('the sandbox ends', async () => !(await s.isRunning()))
    const late = Date.now() - end
    assert.ok(late > -200 && late < patience, `it ended ${late} ms after its time`)
    await until('there is nothing left to kill', async () => !(await Sandbox.kill(s.sandboxId)))
  },
  'wrong key': async () => {
    await fails(Sandbox.create({ apiKey: 'e2b_' + '0'.repeat(40) }), 'AuthenticationError')
  },
  'unknown template': async () => {
    const err = await fails(Sandbox.create('no-such-template'), 'Error')
    assert.match(err.message, /no-such-template/)
  },
}

await go(scenarios, () => sbx.kill())
