"""Models in a user's own file, which may import its neighbours."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from varmeta.models.sites import Model


def load_model(path: Path, name: str) -> Model:
    """The function or module `name` of the Python file `path`.

    While the file is loaded it is a module of its own and may import its neighbours; then
    `sys.path` is as it was.

    Raises:
        ValueError: no such file, or no such name in it.
    """
    with model_file(path, name) as model:
        return model


@contextmanager
def model_file(path: Path, name: str) -> Iterator[Model]:
    """The function or module `name` of the Python file `path`, which may import its neighbours.

    Within the block, so that it may when it runs, too; then `sys.path` and the modules are as they
    were.

    Raises:
        ValueError: no such file, or no such name in it.
    """
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}; give FILE.py:FUNCTION of a file that is there")
    # A name that no library has: it stands in sys.modules, where dataclasses look it up.
    spec = importlib.util.spec_from_file_location(f"varmeta_model_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = path.resolve().parent
    with _importing(module, folder):
        try:
            spec.loader.exec_module(module)
        except SystemExit:
            raise ValueError(f"{path} ended the program when it was loaded (SystemExit)") from None
        # From now on libraries come first: ours import some of theirs only when they need them.
        sys.path.remove(str(folder))
        sys.path.append(str(folder))
        yield _found(module, path, name)


def _found(module: ModuleType, path: Path, name: str) -> Model:
    found = getattr(module, name, None)
    own = [
        n
        for n, v in vars(module).items()
        if callable(v) and getattr(v, "__module__", None) == module.__name__
    ]
    if isinstance(found, type):
        raise ValueError(
            f"{path}: {name!r} is a class; name an object of it: write model = {name}() there and "
            f"give {path}:model"
        )
    if not callable(found):
        raise ValueError(f"{path} has no model {name!r}; it defines: {', '.join(own) or 'none'}")
    model: Model = found
    return model


@contextmanager
def _importing(module: ModuleType, folder: Path) -> Iterator[None]:
    """`module` among the modules and its folder on the path; then both lists are as they were.

    Neighbours that it has imported leave too, so that another folder's of the same name are found.
    """
    path, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    sys.modules[module.__name__] = module
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - known:
            file = Path(getattr(sys.modules[name], "__file__", None) or "/")
            library = "site-packages" in file.parts  # of an environment that lies in the folder
            if file.resolve().is_relative_to(folder) and not library:
                del sys.modules[name]
