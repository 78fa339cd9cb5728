"""Programs for tests of envs/sandbox.py: of a hostile coder, who says "escaped" if one does what it must not do; honest.

{folder}, {file}, {port}, {pid}, {sleeper} and {half} are things outside that it tries to get at.
"""

# ruff: noqa: E501

PRELUDE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def escaped(what="it"): print("escaped:", what, flush=True)
"""

FILES = {
    "write a file outside": "open('{folder}/rl2-new', 'w')\nescaped()",
    "overwrite a file": "open('{file}', 'w').write('x')\nescaped()",
    "append to a file": "open('{file}', 'a').write('x')\nescaped()",
    "delete a file": "os.remove('{file}')\nescaped()",
    "rename a file": "os.rename('{file}', '{file}.old')\nescaped()",
    "truncate a file": "os.truncate('{file}', 0)\nescaped()",
    "change a file's mode": "os.chmod('{file}', 0)\nescaped()",
    "change a file's owner": "os.chown('{file}', 1, 1)\nescaped()",
    "change a file's time": "os.utime('{file}', (0, 0))\nescaped()",
    "mark a file": "os.setxattr('{file}', 'user.a', b'1')\nescaped()",
    "read a file": "print(open('{file}').read())\nescaped()",
    "read passwords": "print(open('/etc/passwd').read())\nescaped()",
    "list the home": "print(os.listdir(os.path.expanduser('~root')))\nescaped()",
    "link out by name": "os.symlink('{file}', 'link')\nopen('link', 'a').write('x')\nescaped()",
    "link out hard": "os.link('{file}', 'link')\nopen('link', 'a').write('x')\nescaped()",
    "climb out": "os.chdir('../' * 30)\nopen('..' + '{file}', 'a').write('x')\nescaped()",
    "write into the interpreter": "open(os.__file__, 'a').write('x')\nescaped()",
    "plant a module": "open(os.path.dirname(os.__file__) + '/rl2_escape.py', 'w')\nescaped()",
    "write to a disk": "for d in ('vda', 'sda', 'nvme0n1', 'mem'):\n  try: open('/dev/' + d, 'r+b'); escaped(d)\n"
    "  except OSError: pass",
    "make a device": "os.mknod('disk', 0o60600, os.makedev(254, 0))\nescaped()",
    "fill the disk": "open('big', 'wb').write(bytes(64 << 20))\nescaped()",
    "many files": "for n in range(5000): open(f'f{{n}}', 'wb').write(b'x' * 4096)\nescaped()",
    "many folders": "for n in range(5000): os.mkdir(f'd{{n}}')\nescaped()",
    "a sparse file": "f = open('sparse', 'wb'); f.truncate(1 << 40)\nescaped()",
    "use up file numbers": "kept = [open('/dev/null') for _ in range(2000)]\nescaped()",
    "a file in memory": "f = os.memfd_create('m'); os.ftruncate(f, 1 << 20)\nescaped()",
}
KERNEL = {
    "chroot": "os.mkdir('c') if os.access('.', os.W_OK) else None\nos.chroot('c')\nescaped()",
    "mount": "if libc.mount(b'proc', b'/tmp', b'proc', 0, None) == 0: escaped()",
    "unmount": "if libc.umount2(b'/', 2) == 0: escaped()",
    "take a namespace": "if libc.unshare(0x10000000 | 0x20000) == 0: escaped()",
    "clone a namespace": "if libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) >= 0: escaped()",
    "clone anew": "if libc.syscall(435, bytes(88), 88) >= 0: escaped()",
    "become root": "os.setuid(0) if os.getuid() else os.setuid(1)\nescaped()",
    "raise limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nescaped()",
    "lower its limit of time": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nescaped()",
    "lower it by a raw call": "if libc.syscall(160, 0, (ctypes.c_long * 2)(1, 1)) == 0: escaped()",
    "load a module": "if libc.syscall(175, 0, 0, b'') == 0: escaped()",
    "trace the parent": "for n in (os.getppid(), {pid}, {sleeper}):\n  if libc.ptrace(16, n, 0, 0) == 0: escaped(n)",
    "be traced": "if libc.ptrace(0, 0, 0, 0) == 0: escaped()",
    "read the parent's memory": "b = ctypes.create_string_buffer(8)\nv = (ctypes.c_size_t * 2)(ctypes.addressof(b), 8)\n"
    "for n in (os.getppid(), {pid}):\n  if libc.process_vm_readv(n, v, 1, v, 1, 0) > 0: escaped()",
    "read the parent's environment": "for n in (os.getppid(), {pid}, 'self', 1):\n  try: print(open(f'/proc/{{n}}/environ').read()); escaped(n)\n"
    "  except OSError: pass",
    "open the parent's memory": "open(f'/proc/{{os.getppid()}}/mem', 'rb')\nescaped()",
    "open the parent's files": "for n in range(20):\n  for p in ({pid}, os.getppid(), 'self'):\n"
    "    try: print(os.listdir(f'/proc/{{p}}/fd')); escaped()\n    except OSError: pass",
    "use files left open": "for n in range(3, 1000):\n  try: os.fstat(n); escaped(n)\n  except OSError: pass",
    "find secrets in memory": "import gc\nprint(os.environ)\nfor o in gc.get_objects():\n"
    "  if isinstance(o, dict) and any('{half}' in str(k) for k in list(o)): escaped()",
    "io_uring": "if libc.syscall(425, 8, bytes(120)) >= 0: escaped()",
    "bpf": "if libc.syscall(321, 0, bytes(72), 72) >= 0: escaped()",
    "perf": "if libc.syscall(298, bytes(128), 0, -1, -1, 0) >= 0: escaped()",
    "userfaultfd": "if libc.syscall(323, 0) >= 0: escaped()",
    "keys": "if libc.syscall(248, b'user', b'rl2', b'x', 1, -3) >= 0: escaped()",
    "open by handle": "if libc.syscall(304, -100, bytes(32), 0) >= 0: escaped()",
    "System V memory": "if libc.shmget(4242, 4096, 0o1600) >= 0: escaped()",
    "the other instruction set": "m = __import__('mmap').mmap(-1, 4096, prot=7)\nm.write(b'\\xb8\\x02\\x00\\x00\\x00\\xcd\\x80\\xc3')\n"
    "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\nif f() > 0: escaped()",
}
NETWORK = {
    "connect by TCP": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\nescaped()",
    "connect by name": "import urllib.request\nurllib.request.urlopen('http://localhost:{port}/', timeout=1)\nescaped()",
    "send by UDP": "import socket\nsocket.socket(2, 2).sendto(b'x', ('127.0.0.1', {port}))\nescaped()",
    "connect by path": "import socket\nsocket.socket(1).connect('{folder}/socket')\nescaped()",
    "connect by abstract name": "import socket\nsocket.socket(1, 2).connect('\\0rl2-canary-{pid}')\nescaped()",
    "send over a pair": "import socket\na, b = socket.socketpair(1, 2)\na.sendto(b'x', '\\0rl2-canary-{pid}')\nescaped()",
    "listen": "import socket\nsocket.create_server(('127.0.0.1', 0))\nescaped()",
    "raw system call": "if libc.syscall(41, 2, 1, 0) >= 0: escaped()",
}
PROCESSES = {
    "a fork": "if os.fork() == 0: os._exit(0)\nescaped()",
    "a fork bomb": "for _ in range(300):\n  try: os.fork(); escaped()\n  except OSError: pass",
    "vfork": "if libc.syscall(58) >= 0: escaped()",
    "a daemon": "import subprocess\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)\nescaped()",
    "a shell": "if os.system('touch {folder}/rl2-shell') == 0: escaped()",
    "another program": "os.execv(sys.executable, ['python', '-c', 'print(\"escaped\")'])",
    "processes of the library": "import multiprocessing\nmultiprocessing.Process(target=escaped).start()",
    "kill the parent": "for n in (os.getppid(), {pid}):\n  try: os.kill(n, 9); escaped()\n  except OSError: pass",
    "kill a neighbour": "os.kill({sleeper}, 9)\nescaped()",
    "kill the group": "os.killpg(0, 9)\nescaped()",
    "kill all": "os.kill(-1, 9)\nescaped()",
    "kill by number": "for n in range(1, 400):\n  if n != os.getpid():\n    try: os.kill(n, 0); escaped(n)\n    except OSError: pass",
    "signal by owner": "import fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, {sleeper})\nescaped()",
    "many threads": "import threading, time\nfor n in range(500):\n  threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
    "  if n > 40: escaped(n)",
    "a thread that stays": "import threading\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()",
    "exit handlers": "import atexit\natexit.register(lambda: open('{folder}/rl2-atexit', 'w'))",
    "real-time priority": "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))\nescaped()",
    "better priority": "os.nice(-5)\nescaped()",
    "locks on files": "import fcntl\nfcntl.lockf(open('/dev/null'), fcntl.LOCK_SH)\nescaped()",
}
WORK = {
    "spin against signals": "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n"
    "  except (OSError, ValueError): pass\nwhile True:\n  try:\n    while True: pass\n  except BaseException: pass",
    "sleep": "import time\ntime.sleep(10_000)",
    "wait for input": "r, w = os.pipe()\nos.read(r, 1)",
    "stop itself": "os.kill(os.getpid(), 19)\nescaped()",
    "much memory": "a = []\nwhile True: a.append(bytearray(10 << 20))",
    "much memory at once": "bytearray(8 << 30)\nescaped()",
    "a huge number": "x = 10 ** 10 ** 10",
    "a huge text": "x = 'a' * (1 << 40)\nescaped()",
    "deep recursion": "sys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",
    "deep recursion in C": "a = []\nfor _ in range(10 ** 6): a = [a]\nrepr(a)",
    "a crash": "ctypes.string_at(0)",
    "endless errors": "while True: print('x' * 1000, file=sys.stderr)",
    "output without Python": "while True: os.write(1, b'x' * 65536)",
    "a bad regular expression": "import re\nre.match('(a+)+$', 'a' * 40 + '!')",
    "a zip bomb": "import zlib\nd = zlib.compress(bytes(30 << 20))\nb = [zlib.decompress(d) for _ in range(20)]\nescaped()",
}
HOSTILE_ACTS = FILES | KERNEL | NETWORK | PROCESSES
HOSTILE = HOSTILE_ACTS | WORK

FORGERIES = {
    "leave": "import sys\nsys.exit(0)",
    "leave at once": "import os\nos._exit(0)",
    "leave when called": "import os\ndef f(x): os._exit(0)",
    "leave with an exception": "def f(x): raise SystemExit(0)",
    "interrupt": "def f(x): raise KeyboardInterrupt",
    "pretend to stop": "def f(x): raise StopIteration",
    "equal everything": "class E:\n  def __eq__(self, other): return True\n  __ne__ = lambda s, o: False\ndef f(x): return E()",
    "equal everything as a number": "class E(int):\n  def __eq__(self, other): return True\n  def __hash__(s): return 0\n"
    "def f(x): return E(0)",
    "equal everything from the right": "class E(list):\n  def __eq__(self, other): return True\ndef f(x): return E()",
    "compare late": "class E:\n  def __getattribute__(s, n): return lambda *a: True\ndef f(x): return E()",
    "lie about the type": "class E:\n  __class__ = int\n  def __eq__(s, o): return True\ndef f(x): return E()",
    "patch assert": "import builtins\nbuiltins.AssertionError = Warning\ndef f(x): return None",
    "patch the frame": "import sys\ndef f(x):\n  g = sys._getframe()\n  while g:\n    g.f_globals['f'] = lambda y: y * y\n"
    "    g.f_locals.clear()\n    g = g.f_back\n  return None",
    "read the tests from memory": "import gc, re\ndef f(x):\n  for o in gc.get_objects():\n    for s in list(o.values()) "
    "if isinstance(o, dict) else [o]:\n      if isinstance(s, str) and (m := re.search(r'assert f\\(%d\\) == (\\d+)' % x, s)):"
    " return int(m[1])",
    "read the tests from raw memory": "import ctypes, re\ndef f(x):\n  top = id(object())\n  for base in range(top & ~0xfffff, "
    "(top & ~0xfffff) + (1 << 20), 4096):\n    pass\n  return None",
    "read the tests from files": "import os\ndef f(x):\n  for n in range(64):\n    try:\n      if b'assert' in os.read(n, 9999): "
    "return x * x\n    except OSError: pass",
    "write a verdict": "import os, json\nfor n in range(64):\n  try: os.write(n, json.dumps({'passed': [True, True], 'why': None, "
    "'died': False}).encode() + b'\\n')\n  except OSError: pass\nos._exit(0)",
    "write an answer twice": "import os, json\ndef f(x):\n  for n in range(64):\n    try: os.write(n, b'[\"value\", 4, []]\\n' * 9)\n"
    "    except OSError: pass\n  return 4",
    "send nonsense": "import os\ndef f(x):\n  for n in range(64):\n    try: os.write(n, b'{\"value\": [[[[\\n' * 9)\n"
    "    except OSError: pass",
    "send a deep answer": "import os\ndef f(x):\n  for n in range(3, 64):\n    try: os.write(n, b'[' * 60000 + b'\\n')\n"
    "    except OSError: pass",
    "send a long answer": "def f(x): return 'a' * (40 << 20)",
    "change the arguments": "import gc\ndef f(x):\n  for o in gc.get_objects():\n    if type(o) is list: o.clear()",
    "exit behind the tests": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 4",
    "answer in a thread": "import threading, os\nthreading.Timer(0.01, lambda: os._exit(0)).start()\ndef f(x):\n  while True: pass",
    "kill itself": "import os\ndef f(x):\n  os.kill(os.getpid(), 9)\n  return 4",
    "take all memory": "def f(x):\n  a = []\n  while True: a.append(bytearray(1 << 20))",
    "crash": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "close the pipes": "import os\ndef f(x):\n  os.closerange(0, 99)\n  while True: pass",
    "close the pipes and sleep": "import os, time\nos.closerange(0, 99)\ntime.sleep(99)",
    "die when it is printed": "import os\nclass E:\n  def __str__(s): os._exit(0)\n  __repr__ = __str__\ndef f(x): return E()",
    "fill the memory of the tests": "def f(x): return [[] for _ in range(5 << 20)]",
    "no such function": "g = 1",
    "no program": "this is no Python",
    "a class of that name": "class f:\n  def __init__(s, x): pass\n  def __eq__(s, o): return True",
}
"""Solutions that do not square; each tries to pass, or not to be judged."""

HONEST = [
    (
        "def f(x): x.append(1)",
        ["a = []\nf(a)\nassert a == [1]", "d = {}\ntry: f(d)\nexcept AttributeError: d = 1\nassert d == 1"],
    ),
    (
        "class f:\n  def __init__(s, v): s.v = v\n  def __len__(s): return s.v",
        ["a = f(3)\na.v += 1\nassert (a.v, len(a)) == (4, 4)"],
    ),
    ("def f(n):\n  for i in range(n): yield i", ["assert list(f(3)) == [0, 1, 2]", "assert sum(f(4)) == 6"]),
    ("def f(a, *, b=1): return a, b", ["assert f(1, b=2) == (1, 2)", "assert f(a=3) == (3, 1)"]),
    (
        "class N:\n  left = None\ndef f(n=None):\n  return n is not None and n.left or N()",
        ["n = f()\nn.left = f()\nassert f(n) is n.left"],
    ),
    (
        "def f(x): return x",
        ["assert f(10**5000) == 10**5000", "x = float('nan')\nassert f(x) != x", "assert f('\\ud800') == '\\ud800'"],
    ),
    (
        "def f(x): raise ValueError('no')",
        ["try: f(1)\nexcept ValueError as e: assert str(e) == 'no'\nelse: assert False"],
    ),
    (
        "import json\nclass E(KeyError): pass\ndef f(x):\n  if x: json.loads('{')\n  raise E('k')",
        ["try: f(1)\nexcept ValueError: pass", "try: f(0)\nexcept KeyError as e: assert e.args == ('k',)"],
    ),
    ("def f(x): return x.decode()", ["try: f(b'\\xff')\nexcept UnicodeDecodeError: pass\nelse: assert False"]),
    (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n  x: 'int'\ndef f(x): return P(x).x",
        ["assert f(2) == 2"],
    ),
    ("class Solution:\n  def f(self, x): return x + 1", ["assert f(1) == 2"]),
    (
        "import threading\ndef f(x):\n  r = []\n  t = threading.Thread(target=r.append, args=(x,))\n  t.start()\n  t.join()\n  return r",
        ["assert f(1) == [1]"],
    ),
    ("import asyncio\nasync def g(): return 7\ndef f(): return asyncio.run(g())", ["assert f() == 7"]),
    ("import tempfile\ndef f():\n  with tempfile.TemporaryFile() as t: return t.write(b'abc')", ["assert f() == 3"]),
]
"""Solutions with tests that mean the same where both are in one process."""

VALUES = (
    "[None, True, 0, -(2**70), 1.5, float('inf'), 'a\\n', b'ab', (1, [2]), {1: {2}, 'a': (3,)}, {1, 2}, frozenset([1])]",
    "[1+2j, range(1, 9, 2), Decimal('0.10'), Fraction(1, 3), date(2020, 1, 2), datetime(2020, 1, 2), timedelta(3), bytearray(b'a')]",
)

SUBCLASSES = (
    "from collections import Counter, OrderedDict, namedtuple, defaultdict\nimport enum\nclass E(enum.IntEnum): A = 3\nclass S(str): pass\nP = namedtuple('P', 'x y')\ndef f(): return [Counter('aab'), P(1, 2), E.A, S('s'), defaultdict(list, a=[1])]",
    "assert [(type(x), x) for x in f()] == [(dict, {'a': 2, 'b': 1}), (tuple, (1, 2)), (int, 3), (str, 's'), (dict, {'a': [1]})]",
)
