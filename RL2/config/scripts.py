"""Loading of a user's Python file, such as an environment or an objective, from its path."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import itertools
import sys
import traceback
from pathlib import Path
from types import ModuleType

from RL2.errors import UserError, one_line


class ScriptError(UserError, ValueError):
    """A script that cannot be used; raised when it is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def import_script(path: str | Path) -> ModuleType:
    """Return the module of the file `path`, executed once in a process, as `import` does.

    So an edit does not change a run under way. Raise `ScriptError` as `load_script` does.
    """
    package = _package(path)
    return sys.modules.get(f"{package}.{Path(path).stem}") or _execute(Path(path), package)


def load_script(path: str | Path) -> ModuleType:
    """Return the module of the file `path`, executed anew, as are the siblings that it imports.

    The script can import its siblings (`from .other import f`): it is in a package made of its folder, one for each
    load, so that no class or setting of an earlier load is mixed in. Raise `ScriptError`, with the line of the script
    that failed.
    """
    names = (f"{_package(path)}_{i}" for i in itertools.count(1))
    return _execute(Path(path), next(name for name in names if name not in sys.modules))


def _package(path: str | Path) -> str:
    folder = str(Path(path).resolve().parent)
    return f"rl2_scripts_{hashlib.blake2b(folder.encode(), digest_size=4).hexdigest()}"


def _execute(path: Path, package: str) -> ModuleType:
    if not path.is_file():
        raise ScriptError(f"{path}: there is no such file")
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(path.resolve().parent)]
    name = f"{package}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ScriptError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that exits is an error with a reason
        del sys.modules[name]
        raise ScriptError(f"{path} cannot be imported: {described(error, str(path), spec.origin)}") from error
    return module


def described(error: BaseException, path: str, file: str | None) -> str:
    """Return an error's type, the first line of its message, and the last line of the script in its traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    message = (str(error).splitlines() or [""])[0][:200]
    return type(error).__name__ + (f": {message}" if message else "") + (f" ({path}:{lines[-1]})" if lines else "")


def raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise `error` in the thread with this identifier; None cancels an error that is not raised yet."""
    cause = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), cause)
