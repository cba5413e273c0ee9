"""Can a tracking URI be used at all? Answered in seconds, before a client starts its long retries.

Knows URIs, sockets and the first bytes of an SQLite file; opens no database and imports no client
library. A password in a URI never reaches a message: `redact` is for everything that is shown.
"""

import re
import socket
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

_SECONDS = 5.0
_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
_SQLITE = "sqlite:///"
_SQLITE_MAGIC = b"SQLite format 3\0"
_USERINFO = re.compile(r"(://[^:/@\s]*):[^/\s]*@")
_IN_QUERY = re.compile(r"([?&][^=&\s]*(?:pass|pwd|secret|token|key)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE)


def redact(text: str, uri: str = "") -> str:
    """`text` without the passwords of `uri`, and without any other `://user:password@` or `?password=`."""
    text = _IN_QUERY.sub(r"\1***", _USERINFO.sub(r"\1:***@", text))
    secrets = [
        urlsplit(uri).password or "",
        *(given[0].partition("=")[2] for given in _IN_QUERY.finditer(uri)),
    ]
    forms = {form for secret in secrets for form in (secret, unquote(secret)) if form}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "***")
    return text


def absolute(uri: str, home: Path | None = None) -> str:
    """An SQLite URI that means the same file from every working directory; other URIs as they are.

    Relative to `home`, or to the working directory.
    """
    path = sqlite_path(uri)
    return uri if path is None else f"{_SQLITE}{(home / path if home else path).absolute()}"


def known_scheme(uri: str) -> bool:
    """Whether MLflow can keep its records at such a URI."""
    return "://" in uri and _scheme(uri) in {"sqlite", *_PORTS}


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI."""
    return Path(uri.removeprefix(_SQLITE)) if uri.startswith(_SQLITE) else None


def is_server(uri: str) -> bool:
    """Whether somebody else's process decides where artifacts go."""
    return _scheme(uri) not in {"sqlite", "postgresql", "mysql", "mssql"}


def obstacle(uri: str) -> str | None:
    """Why `uri` cannot be used now, in words, or None when nothing speaks against trying."""
    path = sqlite_path(uri)
    if path is not None:
        return _file_obstacle(path)
    return _socket_obstacle(uri)


def _file_obstacle(path: Path) -> str | None:
    try:
        if path.is_dir():
            return f"{path} is a directory, not a database file"
        if path.exists() and path.stat().st_size > 0:
            with path.open("rb") as file:
                if file.read(len(_SQLITE_MAGIC)) != _SQLITE_MAGIC:
                    return f"{path} is not an SQLite database; restore it from a backup, or move it away"
    except OSError as error:
        return str(error)
    return None


def _socket_obstacle(uri: str) -> str | None:
    parts, scheme = urlsplit(uri), _scheme(uri)
    try:
        port = parts.port or _PORTS.get(scheme)
    except ValueError as error:
        return str(error)
    if not parts.hostname or port is None or _through_proxy(scheme, parts.hostname):
        return None
    try:
        socket.create_connection((parts.hostname, port), timeout=_SECONDS).close()
    except OSError as error:
        return f"nothing answers at {parts.hostname}:{port} ({error.strerror or error})"
    return None


def _through_proxy(scheme: str, host: str) -> bool:
    return scheme in {"http", "https"} and scheme in getproxies() and not proxy_bypass(host)


def _scheme(uri: str) -> str:
    return urlsplit(uri).scheme.partition("+")[0]  # postgresql+psycopg2
