// Runs the scenarios of egress_test.go with the JavaScript client.
import assert from 'node:assert/strict'
import { client, go } from '../sdk/frame.mjs'

const { Sandbox, ALL_TRAFFIC, SandboxError, Secret, SecretError, SecretNotFoundError } = client()
const { PUBLIC, OTHER, PORT } = process.env
const opts = { timeoutMs: 600_000 }
let sbx

const probe = (host) => `python3 -c '
import socket
try:
    print(socket.create_connection(("${host}", ${PORT}), 5).recv(100).decode())
except OSError as e:
    print("refused")'`
const reaches = async (open, shut) => {
  for (const host of open) assert.equal((await sbx.commands.run(probe(host))).stdout, 'this is the world\n', host)
  for (const host of shut) assert.equal((await sbx.commands.run(probe(host))).stdout, 'refused\n', host)
}

const scenarios = {
  'create with a policy': async () => {
    sbx = await Sandbox.create({ ...opts, network: { denyOut: [ALL_TRAFFIC], allowOut: [PUBLIC] } })
    await reaches([PUBLIC], [OTHER])
    const info = await sbx.getInfo()
    assert.deepEqual([info.network.allowOut, info.network.denyOut], [[PUBLIC], [ALL_TRAFFIC]])
  },
  'update': async () => {
    await sbx.updateNetwork({ denyOut: [`${PUBLIC}/32`] })
    await reaches([OTHER], [PUBLIC])
    const { network } = await sbx.getInfo()
    assert.deepEqual([network.allowOut, network.denyOut], [undefined, [`${PUBLIC}/32`]])
    await Sandbox.updateNetwork(sbx.sandboxId, {})
    await reaches([OTHER, PUBLIC], [])
  },
  'no internet': async () => {
    await sbx.updateNetwork({ allowInternetAccess: false })
    await reaches([], [OTHER, PUBLIC])
    await sbx.kill()
    sbx = await Sandbox.create({ ...opts, allowInternetAccess: false, network: { allowOut: [OTHER] } })
    await reaches([OTHER], [PUBLIC])
  },
  'what is refused': async () => {
    for (const network of [{ denyOut: ['example.com'] }, { allowOut: ['example.com'] }, { denyOut: ['10.0.0.0/33'] }]) {
      await assert.rejects(Sandbox.create({ ...opts, network }), SandboxError)
      await assert.rejects(sbx.updateNetwork(network), SandboxError)
    }
    await sbx.kill()
    await assert.rejects(sbx.updateNetwork({}), { name: /NotFound/ })
  },
  'secrets': async () => {
    if (!Secret) return // a client from before there were secrets
    const made = await Secret.create('From-JS', 'one', { metadata: { a: 'b' } })
    assert.deepEqual([made.name, made.version, made.metadata], ['from-js', 1, { a: 'b' }])
    assert.match(made.secretId, /^sec_/)
    assert.equal((await Secret.update('from-js', 'two')).version, 2)
    assert.equal((await Secret.getInfo(made.secretId)).version, 2)
    assert.ok(await Secret.exists('from-js'))
    const names = []
    for (const pages = Secret.list({ limit: 1 }); pages.hasNext;) names.push(...(await pages.nextItems()).map((s) => s.name))
    assert.ok(names.includes('from-js'))
    await assert.rejects(Secret.create('from-js', 'x'), SecretError)
    await assert.rejects(Secret.getInfo('none'), SecretNotFoundError)
    assert.equal(Secret.fill('from-js'), '${e2b.secrets.from-js}')
    assert.ok(await Secret.destroy('from-js'))
    assert.ok(!(await Secret.destroy('from-js')))
    assert.ok(!(await Secret.exists('from-js')))
  },
}

await go(scenarios, () => sbx.kill())
