"""Which packages the domains come from, where their data lie, and under which licence.

Nothing is fetched: a domain is a function of the installed versions. Data are read as files of the package, so that a
library of the size of torch need not be imported, and a package that is missing is named with the command to install.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

from lbr_dist.errors import UserError


@dataclass(frozen=True)
class Source:
    """One body of data: what it is called in the rows, and what may be done with it."""

    name: str
    licence: str
    version: str
    package: str


def folder(module: str, package: str) -> Path:
    """Folder of an installed package, without importing it.

    Raises:
        UserError: it is not installed.
    """
    spec = util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package {package} is not installed: pip install {package} (or all: pip install 'lbr-dist[paper]')"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def version(package: str) -> str:
    """Installed version; that of Python for `python-stdlib`."""
    if package == "python-stdlib":
        return platform.python_version()
    return metadata.version(package)
