// Measures the official JavaScript client, as a user's program would use it:
// for each line on standard input one sandbox, and one line of JSON with the
// milliseconds its parts took.
//
//   node sdk.mjs PATH-OF-THE-CLIENT     (E2B_API_KEY, E2B_API_URL, E2B_SANDBOX_URL)
import { createInterface } from 'node:readline'

const { Sandbox } = await import(process.argv[2])

async function round() {
  const began = performance.now()
  const sandbox = await Sandbox.create({ timeoutMs: 120_000 })
  try {
    const created = performance.now()
    let first = 0
    const hello = await sandbox.commands.run('echo hello', { onStdout: () => { first ||= performance.now() } })
    if (hello.stdout !== 'hello\n' || !first) throw new Error(`echo said ${JSON.stringify(hello)}`)
    const runs = []
    for (let i = 0; i < 3; i++) {
      const t = performance.now()
      await sandbox.commands.run('true')
      runs.push(performance.now() - t)
    }
    const t = performance.now()
    await sandbox.kill()
    return { create: created - began, first: first - began, runs, kill: performance.now() - t }
  } catch (e) {
    await sandbox.kill().catch(() => {}) // the first error says more
    throw e
  }
}

for await (const _ of createInterface({ input: process.stdin })) {
  let answer
  try {
    answer = await round()
  } catch (e) {
    answer = { error: `${e.name}: ${e.message}` }
  }
  process.stdout.write(JSON.stringify(answer) + '\n')
}
