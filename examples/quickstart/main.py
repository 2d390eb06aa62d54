# The first program, in Python: pip install e2b
from e2b import Sandbox

with Sandbox.create() as sandbox:
    sandbox.files.write("hello.py", 'print("6 * 7 =", 6 * 7)\n')
    print(sandbox.commands.run("python3 hello.py").stdout, end="")
