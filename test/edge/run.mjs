// Uses the URLs that the JavaScript client gives, as a user's program would.
import assert from 'node:assert/strict'
import { client, go, until } from '../sdk/frame.mjs'

const domain = process.env.EDGE_MODE === 'domain'
if (domain) {
  delete process.env.E2B_API_URL
  delete process.env.E2B_SANDBOX_URL
}
const scheme = domain ? 'https' : 'http'
const { Sandbox } = client() // it reads the environment
let sbx

const scenarios = {
  'use a sandbox': async () => {
    sbx = await Sandbox.create({ timeoutMs: 600_000, secure: true })
    assert.equal((await sbx.commands.run('echo $((40+2))')).stdout, '42\n')
    await sbx.files.write('/home/user/a b.txt', 'written')
    assert.equal(await sbx.files.read('/home/user/a b.txt'), 'written')
    assert.equal(await sbx.isRunning(), true)
  },
  'getHost': async () => {
    await sbx.commands.run('python3 -m http.server 8000 --bind 127.0.0.1', { background: true })
    const text = await until('the service answers', async () => {
      const res = await fetch(`${scheme}://${sbx.getHost(8000)}/`)
      return res.ok && res.text()
    })
    assert.match(text, /a%20b\.txt/)
  },
  'downloadUrl': async () => {
    const res = await fetch(await sbx.downloadUrl('/home/user/a b.txt', { useSignatureExpiration: 60 }))
    assert.deepEqual([res.status, await res.text()], [200, 'written'])
    const old = await fetch(await sbx.downloadUrl('/home/user/a b.txt', { useSignatureExpiration: -10 }))
    assert.equal(old.status, 401)
  },
  'uploadUrl': async () => {
    const form = new FormData()
    form.append('file', new Blob(['uploaded']), 'up.txt')
    const res = await fetch(await sbx.uploadUrl('/home/user/up.txt'), { method: 'POST', body: form })
    assert.equal(res.status, 200, await res.text())
    assert.equal(await sbx.files.read('/home/user/up.txt'), 'uploaded')
  },
  'end': async () => {
    await sbx.kill()
  },
}

await go(scenarios)
