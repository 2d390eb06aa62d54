// The other guest of the tests of pauses: a server on localhost, port 3000, with
// what it remembers; a log that it appends to; and a connection to itself. /state
// tells them as JSON, and what was lost.
const fs = require('fs')
const http = require('http')
const net = require('net')
const { createHash } = require('crypto')

const log = process.env.HOME + '/guest.log'
const done = { count: 0, rows: 0, echoes: 0 }
const errors = []
const array = Array.from({ length: 100_000 }, (_, i) => ({ i, text: 'entry ' + i }))
const sum = () => createHash('sha256').update(JSON.stringify(array)).digest('hex')
const want = sum()
let hits = 0

setInterval(() => { done.count++ }, 20)
fs.rmSync(log, { force: true })
setInterval(() => {
  try {
    fs.appendFileSync(log, done.rows + 1 + '\n')
    done.rows++
    if (done.rows % 50) return
    const lines = fs.readFileSync(log, 'utf8').trim().split('\n')
    if (lines.length !== done.rows || lines.some((l, i) => l !== String(i + 1))) errors.push(`the log has ${lines.length} lines of ${done.rows}`)
  } catch (err) {
    errors.push(String(err))
  }
}, 20)
const echo = net.createServer((c) => c.on('error', (err) => errors.push('far: ' + err)).pipe(c)).listen(0, '127.0.0.1', () => {
  let got = ''
  const near = net.connect(echo.address().port, '127.0.0.1', () => near.write('1\n'))
  near.on('error', (err) => errors.push('near: ' + err)).on('close', () => errors.push('the connection was closed'))
  near.on('data', (b) => {
    got += b
    if (!got.endsWith('\n')) return
    if (got !== done.echoes + 1 + '\n') errors.push(`echo ${done.echoes + 1} is ${JSON.stringify(got)}`)
    got = ''
    done.echoes++
    setTimeout(() => near.write(done.echoes + 1 + '\n'), 10)
  })
})
http.createServer((q, r) => {
  if (q.url !== '/state') return r.end('node ' + process.pid + ' ' + ++hits)
  r.end(JSON.stringify({ whole: sum() === want, pid: process.pid, done, errors }))
}).listen(3000, '127.0.0.1')
