"""Loading of a user's Python file, such as an environment or an objective, from its path."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
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
    package, _ = _package(path)
    return sys.modules.get(f"{package}.{Path(path).stem}") or load_script(path)


def _package(path: str | Path) -> tuple[str, str]:
    """Return the name of the package that the folder of `path` is made into, and the folder."""
    folder = str(Path(path).resolve().parent)
    return f"rl2_scripts_{hashlib.blake2b(folder.encode(), digest_size=4).hexdigest()}", folder


def load_script(path: str | Path) -> ModuleType:
    """Return the module of the file `path`, executed anew, in a package made of its folder.

    The script can import its siblings (`from .other import f`). Raises `ScriptError`, with the line of the script that
    failed.
    """
    path = Path(path)
    if not path.is_file():
        raise ScriptError(f"{path}: there is no such file")
    package, folder = _package(path)
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [folder]
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
