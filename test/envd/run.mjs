// Runs the scenarios of sdk_test.go with the JavaScript client.
import assert from 'node:assert/strict'
import http from 'node:http'
import { createHash, randomBytes } from 'node:crypto'
import { client, fails, go, until } from '../sdk/frame.mjs'

const { Sandbox } = client()
const sum = (b) => createHash('sha256').update(b).digest('hex')
const text = new TextEncoder()
// A stream of n copies of a piece.
const stream = (piece, n) => new ReadableStream({ pull(c) { if (n-- > 0) c.enqueue(piece); else c.close() } })
const drain = async (s) => {
  const parts = []
  for await (const p of s) parts.push(p)
  return Buffer.concat(parts)
}
// A request to the proxy with a Host of its own, as a browser would send it
// that finds the wildcard domain there.
const ask = (host, target, init = {}) => new Promise((resolve, reject) => {
  const to = new URL(process.env.E2B_SANDBOX_URL)
  const req = http.request({ host: to.hostname, port: to.port, path: target, ...init, headers: { host, ...init.headers } }, (res) => {
    drain(res).then((b) => resolve({ status: res.statusCode, headers: res.headers, text: b.toString() }), reject)
  })
  req.on('error', reject)
  req.end(init.body)
})

const sbx = await Sandbox.create({ timeoutMs: 900_000, envs: { GREETING: 'hello there' } })
const run = (cmd, opts) => sbx.commands.run(cmd, opts)

// A terminal whose output is collected.
const terminal = async (opts = {}) => {
  const t = { out: '' }
  const decoder = new TextDecoder()
  t.take = (d) => { t.out += decoder.decode(d, { stream: true }) }
  t.handle = await sbx.pty.create({ cols: 80, rows: 24, timeoutMs: 600_000, ...opts, onData: t.take })
  t.pid = t.handle.pid
  t.type = (s) => sbx.pty.sendInput(t.pid, text.encode(s))
  t.says = (s) => until(() => `the terminal says ${JSON.stringify(s)}, but ${JSON.stringify(t.out)}`, () => t.out.includes(s))
  return t
}

const scenarios = {
  'close stdin': async () => {
    const h = await run('wc -c; echo done', { background: true, stdin: true })
    await sbx.commands.sendStdin(h.pid, 'x'.repeat(100_000))
    await sbx.commands.sendStdin(h.pid, text.encode('bytes ✓'))
    await sbx.commands.closeStdin(h.pid)
    assert.equal((await h.wait()).stdout, '100009\ndone\n')
  },
  'no stdin': async () => {
    const h = await run('sleep 20', { background: true })
    await fails(sbx.commands.sendStdin(h.pid, 'x'), 'SandboxError')
    await h.kill()
    await fails(sbx.commands.sendStdin(999_999, 'x'), 'NotFoundError')
    await fails(sbx.commands.connect(999_999), 'NotFoundError')
  },
  'several readers': async () => {
    const h = await run('read go; seq 1 20000', { background: true, stdin: true })
    const others = await Promise.all([1, 2, 3].map(() => sbx.commands.connect(h.pid)))
    await sbx.commands.sendStdin(h.pid, '\n')
    const want = sum((await h.wait()).stdout)
    for (const o of others) assert.equal(sum((await o.wait()).stdout), want)
    // An ended one still answers, with its end.
    assert.equal((await (await sbx.commands.connect(h.pid)).wait()).exitCode, 0)
  },
  'split characters': async () => {
    const r = await run(`python3 -c "import sys; sys.stdout.write('✓é\\U0001F600' * 30000)"`)
    assert.equal(r.stdout, '✓é\u{1F600}'.repeat(30_000))
  },
  'a tree is killed': async () => {
    const h = await run('sleep 3001 & (setsid sleep 3002; true) & bash -c "sleep 3003 & wait" & wait', { background: true })
    await until('all run', async () => (await run('pgrep -fc "^sleep 300[13]" || true')).stdout === '2\n')
    assert.equal(await h.kill(), true)
    await fails(h.wait(), 'CommandExitError')
    assert.equal((await run('pgrep -fc "^sleep 300[13]" || true')).stdout, '0\n')
    await run('pkill -f "^sleep 3002"')
  },
  'environment of commands': async () => {
    const r = await run('env -0 | tr "\\0" "\\n" | cut -d= -f1 | sort | tr "\\n" " "; echo; nice; cat /proc/self/oom_score_adj; id -Gn | grep -c user')
    const [names, nice, oom] = r.stdout.split('\n')
    for (const n of ['E2B_SANDBOX', 'E2B_SANDBOX_ID', 'E2B_TEMPLATE_ID', 'GREETING', 'HOME', 'LOGNAME', 'PATH', 'USER']) {
      assert.ok(names.split(' ').includes(n), `${n} is missing in ${names}`)
    }
    assert.doesNotMatch(names, /CAY|TOKEN/)
    assert.deepEqual([nice, oom], ['0', '100'])
  },
  'pty': async () => {
    const t = await terminal({ envs: { MINE: 'mine' }, cwd: '/tmp' })
    await t.type('stty size; tty; echo "$TERM $MINE $PWD $LANG"; test -t 0 && echo is-"terminal"\n')
    await t.says('is-terminal')
    assert.match(t.out, /24 80\r\n\/dev\/pts\/\d+\r\nxterm-256color mine \/tmp C\.UTF-8\r\n/)
    await t.type('exit 7\n')
    const err = await fails(t.handle.wait(), 'CommandExitError')
    assert.equal(err.exitCode, 7)
  },
  'pty resize': async () => {
    const t = await terminal()
    await t.type(`trap 'echo "now $(stty size)"' WINCH; echo re"ady"\n`)
    await t.says('ready')
    await sbx.pty.resize(t.pid, { cols: 132, rows: 43 })
    await t.type('\n')
    await t.says('now 43 132')
    assert.equal(await sbx.pty.kill(t.pid), true)
    assert.equal(await sbx.pty.kill(999_999), false)
    await fails(sbx.pty.resize(999_999, { cols: 1, rows: 1 }), 'NotFoundError')
    await fails(sbx.pty.sendInput(999_999, text.encode('x')), 'NotFoundError')
  },
  'pty jobs': async () => {
    const t = await terminal()
    await t.type('cat\n')
    await t.says('\x1b[?2004l') // bash has given the terminal to cat
    await t.type('through-cat\n')
    await t.says('through-cat\r\nthrough-cat')
    await t.type('\x03')
    await t.type('sleep 3004\n')
    await until('it runs', async () => (await run('pgrep -fc "^sleep 3004" || true')).stdout === '1\n')
    await t.type('\x1a')
    await t.says('Stopped')
    await t.type('jobs; kill %1; echo go"ne"\n')
    await t.says('gone')
    await t.type('printf "\\033[31mred\\033[0m ✓\\n"; ls --color=always -d /tmp\n')
    await t.says('\x1b[31mred\x1b[0m ✓')
    await t.type('exit 0\n')
    await t.handle.wait().catch(() => {})
  },
  'pty connect': async () => {
    const t = await terminal()
    await t.handle.disconnect()
    let out = ''
    const again = await sbx.pty.connect(t.pid, { onData: (d) => { out += Buffer.from(d) } })
    await t.type('echo "a""gain"\n')
    await until('the output comes', () => out.includes('again'))
    assert.equal(await again.kill(), true)
    await again.wait().then(() => assert.fail('no error'), (err) => assert.ok(err.exitCode !== 0))
  },
  'formats': async () => {
    const bytes = randomBytes(300_000)
    await sbx.files.write('/tmp/f/blob', new Blob([bytes]))
    for (const format of ['bytes', 'blob', 'stream']) {
      const got = await sbx.files.read('/tmp/f/blob', { format })
      const b = format === 'bytes' ? Buffer.from(got) : format === 'blob' ? Buffer.from(await got.arrayBuffer()) : await drain(got)
      assert.equal(sum(b), sum(bytes), format)
    }
    assert.equal(sum(await drain(await sbx.files.read('/tmp/f/blob', { format: 'stream', gzip: true }))), sum(bytes))
    assert.equal(await sbx.files.read('/tmp/f/blob', { format: 'text' }), new TextDecoder().decode(bytes))
  },
  'upload a stream': async () => {
    const piece = randomBytes(1 << 16)
    const want = sum(Buffer.concat(Array(160).fill(piece)))
    for (const opts of [{}, { gzip: true }, { useOctetStream: true }]) {
      const info = await sbx.files.write('/tmp/f/stream', stream(piece, 160), opts)
      assert.equal(info.path, '/tmp/f/stream')
      assert.equal((await run('sha256sum < /tmp/f/stream')).stdout.slice(0, 64), want, JSON.stringify(opts))
    }
  },
  'gzip': async () => {
    const s = 'compressible ✓ '.repeat(20_000)
    await sbx.files.write('/tmp/f/gz', s, { gzip: true })
    assert.equal(await sbx.files.read('/tmp/f/gz', { gzip: true }), s)
    assert.equal((await run('wc -c < /tmp/f/gz')).stdout.trim(), String(Buffer.byteLength(s)))
  },
  'metadata': async () => {
    const metadata = { author: 'me', 'x-long': 'v'.repeat(200) }
    const info = await sbx.files.write('/tmp/f/meta', 'x', { metadata })
    assert.deepEqual(info.metadata, metadata)
    assert.deepEqual((await sbx.files.getInfo('/tmp/f/meta')).metadata, metadata)
    assert.equal((await sbx.files.list('/tmp/f')).find((e) => e.name === 'meta').metadata.author, 'me')
    await sbx.files.rename('/tmp/f/meta', '/tmp/f/meta2')
    assert.deepEqual((await sbx.files.getInfo('/tmp/f/meta2')).metadata, metadata)
    await sbx.files.write('/tmp/f/meta2', 'y', { metadata: { other: 'z' } })
    assert.deepEqual((await sbx.files.getInfo('/tmp/f/meta2')).metadata, { other: 'z' })
    await sbx.files.write('/tmp/f/meta2', 'y')
    assert.deepEqual((await sbx.files.getInfo('/tmp/f/meta2')).metadata ?? {}, {})
  },
  'hundreds of files in one write': async () => {
    const files = Array.from({ length: 300 }, (_, i) => ({ path: `/tmp/lots/${i % 10}/n ${i} ✓.txt`, data: `content ${i}` }))
    const infos = await sbx.files.writeFiles(files)
    assert.deepEqual(infos.map((i) => i.path), files.map((f) => f.path))
    assert.equal((await run('find /tmp/lots -type f | wc -l; cat /tmp/lots/*/* | wc -c')).stdout,
      `300\n${files.reduce((n, f) => n + f.data.length, 0)}\n`)
    assert.deepEqual(await sbx.files.writeFiles([]), [])
    const mixed = await sbx.files.write([{ path: 'm/a', data: text.encode('bytes').buffer }, { path: 'm/b', data: new Blob(['blob']) }])
    assert.deepEqual(mixed.map((i) => i.path), ['/home/user/m/a', '/home/user/m/b'])
  },
  'files of another user': async () => {
    await sbx.files.write('/root/secret', 'root only', { user: 'root' })
    assert.equal(await sbx.files.read('/root/secret', { user: 'root' }), 'root only')
    assert.equal(await sbx.files.read('secret', { user: 'root' }), 'root only')
    await fails(sbx.files.read('/root/secret'), 'Error')
    await fails(sbx.files.write('/root/mine', 'x'), 'Error')
    await fails(sbx.files.remove('/root/secret'), 'Error')
    assert.equal((await sbx.files.getInfo('/root/secret', { user: 'root' })).owner, 'root')
    await fails(sbx.files.list('/', { user: 'nobody-knows' }), 'AuthenticationError')
  },
  'wrong uses of files': async () => {
    await fails(sbx.files.read('/tmp'), 'InvalidArgumentError')
    await fails(sbx.files.write('/tmp', 'x'), 'InvalidArgumentError')
    await fails(sbx.files.list('/etc/passwd'), 'InvalidArgumentError')
    await fails(sbx.files.makeDir('/etc/passwd'), 'InvalidArgumentError')
    await fails(sbx.files.getInfo('/no/such'), 'NotFoundError')
    await fails(sbx.files.list('/tmp', { depth: 0 }), 'InvalidArgumentError')
    await sbx.files.remove('/no/such')
    await run('ln -s loop /tmp/loop; ln -s /nowhere /tmp/dangling; ln -s /tmp/f /tmp/todir')
    const names = (await sbx.files.list('/tmp')).map((e) => e.name)
    assert.ok(names.includes('todir') && !names.includes('dangling'), names.join(' '))
    assert.ok((await sbx.files.list('/tmp/todir')).every((e) => e.path.startsWith('/tmp/todir/')))
    await fails(sbx.files.list('/tmp/loop'), 'Error')
  },
  'a full disk': async () => {
    await run('mkdir -p /tmp/small && mount -t tmpfs -o size=1m,mode=777 none /tmp/small', { user: 'root' })
    await fails(sbx.files.write('/tmp/small/big', 'x'.repeat(3 << 20)), 'NotEnoughSpaceError')
    assert.equal((await run('ls -A /tmp/small')).stdout, '')
    await sbx.files.write('/tmp/small/fits', 'x'.repeat(1 << 19))
  },
  'watch': async () => {
    await sbx.files.makeDir('/tmp/w')
    const seen = []
    const h = await sbx.files.watchDir('/tmp/w', (e) => { seen.push(e) }, { timeoutMs: 0, includeEntry: true })
    const has = (type, name) => until(() => `${type} ${name}, but ${JSON.stringify(seen)}`, () => seen.find((e) => e.type === type && e.name === name))
    await sbx.files.write('/tmp/w/a', 'x')
    assert.equal((await has('create', 'a')).entry?.path, '/tmp/w/a')
    assert.equal((await has('write', 'a')).entry?.size, 1)
    await run('chmod 600 /tmp/w/a; mv /tmp/w/a /tmp/w/b; rm /tmp/w/b')
    await has('chmod', 'a')
    assert.equal((await has('rename', 'a')).entry, undefined)
    await has('create', 'b')
    assert.equal((await has('remove', 'b')).entry, undefined)
    await run('mkdir /tmp/w/sub; echo x > /tmp/w/sub/deep')
    await has('create', 'sub')
    assert.ok(!seen.some((e) => e.name.includes('deep')), 'it is not recursive')
    await h.stop()
    const n = seen.length
    await run('touch /tmp/w/after')
    assert.equal(seen.length, n)
    await fails(sbx.files.watchDir('/no/such', () => {}), 'NotFoundError')
    await fails(sbx.files.watchDir('/etc/passwd', () => {}), 'InvalidArgumentError')
  },
  'watch recursively': async () => {
    await sbx.files.makeDir('/tmp/wr/old')
    const seen = new Set()
    let exit = 'none'
    const h = await sbx.files.watchDir('/tmp/wr', (e) => { seen.add(`${e.type} ${e.name}`) }, { recursive: true, timeoutMs: 0, onExit: (e) => { exit = e } })
    await run('mkdir -p /tmp/wr/new/er/est && touch /tmp/wr/new/er/est/leaf /tmp/wr/old/leaf && mv /tmp/wr/new /tmp/wr/moved && touch /tmp/wr/moved/er/later')
    // What is in a new directory is reported by the name that it has when envd
    // comes to look: by the old or by the new one, and once.
    const leaf = () => ['new', 'moved'].filter((d) => seen.has(`create ${d}/er/est/leaf`)).length
    for (const e of ['create new', 'create old/leaf', 'rename new', 'create moved']) {
      await until(() => `${e}, but ${[...seen]}`, () => seen.has(e))
    }
    await until(() => `the leaf, but ${[...seen]}`, () => leaf() > 0)
    await until(() => `the later file, but ${[...seen]}`, () => seen.has('create moved/er/later') || seen.has('create new/er/later'))
    assert.equal(leaf(), 1, [...seen].join())
    assert.equal(exit, 'none')
    await h.stop()
    await until('the exit is told', () => exit !== 'none')
  },
  'git': async () => {
    const g = sbx.git
    await g.configureUser('Me', 'me@example.com')
    assert.equal(await g.getConfig('user.name'), 'Me')
    assert.equal(await g.getConfig('no.such'), undefined)
    await g.init('/tmp/g/origin', { bare: true, initialBranch: 'main' })
    await g.init('/tmp/g/a', { initialBranch: 'main' })
    await sbx.files.write('/tmp/g/a/file', 'one\n')
    let s = await g.status('/tmp/g/a')
    assert.deepEqual([s.currentBranch, s.fileStatus.map((f) => [f.name, f.status, f.staged])], ['main', [['file', 'untracked', false]]])
    await g.add('/tmp/g/a')
    await g.commit('/tmp/g/a', 'first', { authorName: 'You', authorEmail: 'you@example.com' })
    assert.equal((await run('git log -1 --format="%an %ae %s"', { cwd: '/tmp/g/a' })).stdout, 'You you@example.com first\n')
    await g.remoteAdd('/tmp/g/a', 'origin', '/tmp/g/origin')
    assert.equal(await g.remoteGet('/tmp/g/a', 'origin'), '/tmp/g/origin')
    assert.equal(await g.remoteGet('/tmp/g/a', 'other'), undefined)
    await g.push('/tmp/g/a', { remote: 'origin', branch: 'main', setUpstream: true })
    await g.clone('/tmp/g/origin', { path: '/tmp/g/b', branch: 'main' })
    assert.equal(await sbx.files.read('/tmp/g/b/file'), 'one\n')
    await g.createBranch('/tmp/g/a', 'topic')
    await g.checkoutBranch('/tmp/g/a', 'main')
    const b = await g.branches('/tmp/g/a')
    assert.deepEqual([b.currentBranch, b.branches.sort()], ['main', ['main', 'topic']])
    await g.deleteBranch('/tmp/g/a', 'topic')
    await sbx.files.write('/tmp/g/a/file', 'two\n')
    await g.add('/tmp/g/a', { files: ['file'] })
    await g.restore('/tmp/g/a', { paths: ['file'], staged: true, worktree: true })
    assert.equal(await sbx.files.read('/tmp/g/a/file'), 'one\n')
    await g.commit('/tmp/g/a', 'second', { allowEmpty: true })
    s = await g.status('/tmp/g/a')
    assert.deepEqual([s.ahead, s.behind, s.upstream], [1, 0, 'origin/main'])
    await g.push('/tmp/g/a')
    await g.pull('/tmp/g/b')
    assert.equal((await run('git log --oneline | wc -l', { cwd: '/tmp/g/b' })).stdout.trim(), '2')
    await g.reset('/tmp/g/b', { mode: 'hard', target: 'HEAD~1' })
    assert.equal((await g.status('/tmp/g/b')).behind, 1)
    await g.setConfig('my.key', 'v', { scope: 'local', path: '/tmp/g/b' })
    assert.equal(await g.getConfig('my.key', { scope: 'local', path: '/tmp/g/b' }), 'v')
    await g.dangerouslyAuthenticate({ username: 'u', password: 'p', host: 'git.example' })
    assert.match((await run('cat ~/.git-credentials')).stdout, /u:p@git\.example/)
    await fails(g.clone('/tmp/g/none', { path: '/tmp/g/c' }), 'Error')
    await fails(g.commit('/tmp/g/b', 'empty'), 'Error')
  },
  'signed urls': async () => {
    await sbx.files.write('/tmp/s/a b✓.txt', 'signed')
    const down = await sbx.downloadUrl('/tmp/s/a b✓.txt')
    const r = await fetch(down)
    assert.deepEqual([r.status, await r.text()], [200, 'signed'])
    assert.equal((await fetch(down, { headers: { range: 'bytes=1-3' } })).status, 206)
    assert.equal((await fetch(down.replace('/tmp/s/a', '/tmp/s/b').replace('a%20b', 'b').replace('a+b', 'b'))).ok, false)
    const timed = await sbx.downloadUrl('/root/.bashrc', { user: 'root', useSignatureExpiration: 60 })
    assert.match(timed, /signature_expiration=\d+/)
    assert.equal((await fetch(timed)).status, 200)
    const old = await fetch(await sbx.downloadUrl('/tmp/s/a b✓.txt', { useSignatureExpiration: -10 }))
    assert.deepEqual([old.status, await old.json()], [401, { code: 401, message: 'signature is already expired' }])
    const form = new FormData()
    form.append('file', new Blob(['by url']), 'named.txt')
    const up = await fetch(await sbx.uploadUrl('/tmp/s/up.txt', { useSignatureExpiration: 60 }), { method: 'POST', body: form })
    assert.equal(up.status, 200)
    assert.equal((await up.json())[0].path, '/tmp/s/up.txt')
    assert.equal(await sbx.files.read('/tmp/s/up.txt'), 'by url')
    // Without a path it is for the default directory.
    const loose = await fetch(await sbx.uploadUrl(), { method: 'POST', body: form })
    assert.equal((await loose.json())[0].path, '/home/user/named.txt')
    // A signature to read does not write.
    assert.equal((await fetch(down, { method: 'POST', body: form })).ok, false)
    assert.equal((await fetch(down.replace(/signature=[^&]*/, `signature=v1_${'A'.repeat(43)}`))).ok, false)
  },
  'hosts': async () => {
    const host = sbx.getHost(3000)
    assert.equal(host, `3000-${sbx.sandboxId}.${process.env.TEST_DOMAIN}`)
    assert.equal((await ask(host, '/')).status, 502)
    const h = await run(`python3 -c "
import http.server
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write((self.headers['Host'] + ' ' + self.path).encode())
http.server.HTTPServer(('127.0.0.1', 3000), H).serve_forever()"`, { background: true, timeoutMs: 0 })
    const answer = await until('the service on localhost answers', async () => { const r = await ask(host, '/a%2Fb?q=1'); return r.status === 200 && r })
    assert.equal(answer.text, `${host} /a%2Fb?q=1`)
    await h.kill()
    // envd and its signatures, in the same form.
    const url = new URL(await sbx.downloadUrl('/tmp/s/a b✓.txt'))
    assert.equal((await ask(sbx.getHost(49983), url.pathname + url.search)).text, 'signed')
    assert.equal((await ask(sbx.getHost(49983), '/files?path=/tmp/s/up.txt')).status, 401)
    assert.equal((await ask(sbx.getHost(49983), '/init', { method: 'POST' })).status, 404)
  },
  'running and metrics': async () => {
    assert.equal(await sbx.isRunning(), true)
    const metrics = await sbx.getMetrics()
    assert.ok(metrics.length > 0)
    const last = metrics.at(-1)
    assert.ok(last.cpuCount >= 1 && last.memUsed > 0 && last.memTotal >= last.memUsed && last.diskTotal > last.diskUsed, JSON.stringify(last))
    await sbx.kill()
    assert.equal(await sbx.isRunning(), false)
  },
}

await go(scenarios, () => sbx.kill())
