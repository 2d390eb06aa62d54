// The first program: a sandbox, some code in it, its output.
// It is what E2B's documentation shows; nothing in it knows of Cay.
import { Sandbox } from 'e2b'

const sandbox = await Sandbox.create()
console.log(`sandbox ${sandbox.sandboxId} is running`)

await sandbox.files.write('hello.py', `
import platform, sys
print("Hello from Python", sys.version.split()[0], "in a sandbox of its own")
print("kernel:", platform.release(), "  6 * 7 =", 6 * 7)
`)
const result = await sandbox.commands.run('python3 hello.py')
process.stdout.write(result.stdout)

await sandbox.kill()
console.log('sandbox killed')
