// What the runners of the tests share: run.mjs here and in the directories
// beside. A runner goes through scenarios with the JavaScript client that is
// installed in the directory given, as a user's program would, and prints a line
// of JSON for each: {"name", "ok", "error", "ms"}.
import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import path from 'node:path'

const dir = path.resolve(process.argv[2])
const require = createRequire(path.join(dir, 'package.json'))

// client returns the client. It reads the environment.
export const client = () => require('e2b')
export const version = () => require(path.join(dir, 'node_modules/e2b/package.json')).version

// Error classes by name: a class may be missing in an older version.
export const kinds = (err) => {
  const out = []
  for (let p = Object.getPrototypeOf(err); p; p = Object.getPrototypeOf(p)) out.push(p.constructor.name)
  return out
}
export const kind = (err) => kinds(err).find((name) => name.endsWith('Error')) ?? String(err)
export const fails = async (promise, name) => {
  try {
    await promise
  } catch (err) {
    assert.ok(kinds(err).includes(name), `want a ${name}, got ${kind(err)}: ${err.message}`)
    return err
  }
  assert.fail(`want a ${name}, got no error`)
}

// How long to wait for what must come. It says nothing about how fast that is:
// the machine may do other things.
export const patience = 60_000
// until polls f and returns its first true value. What it waits for is a text,
// or a function that returns one.
export const until = async (what, f) => {
  const end = Date.now() + patience
  for (;;) {
    const v = await f()
    if (v) return v
    assert.ok(Date.now() < end, `not within ${patience} ms: ${typeof what === 'function' ? what() : what}`)
    await new Promise((r) => setTimeout(r, 30))
  }
}

// go goes through the scenarios as they are written. end removes what they
// share, as far as it is there.
export const go = async (scenarios, end = async () => {}) => {
  for (const [name, run] of Object.entries(scenarios)) {
    const began = Date.now()
    const result = { name, ok: true }
    try {
      await run()
    } catch (err) {
      result.ok = false
      result.error = `${err.stack ?? err} ${err.cause ?? ''}`
    }
    console.log(JSON.stringify({ ...result, ms: Date.now() - began }))
  }
  try {
    await end()
  } catch {
    // a scenario has ended it, or failed to begin it
  }
  process.exit(0) // idle connections would keep the process
}
