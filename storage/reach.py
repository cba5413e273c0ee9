"""Can a tracking URI be used at all? Answered in seconds, before a client starts its long retries.

Knows URIs, sockets and the first bytes of an SQLite file; opens no database and imports no client
library. A password in a URI never reaches a message: `redact` is for everything that is shown, and what
the standard library says of a URI, which repeats parts of it, is never passed on.
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
# Up to the last @: SQLAlchemy takes a password with / ? # in it as it is. What stands alone is a token.
_USERINFO = re.compile(
    r"""(?<![\w+.-])
        (?!(?:postgresql|mysql|mssql)[\w+.-]*://[^:/?#@\s]+@(?!\S*@))  # to a database, it is a user's name
        (?P<before>[\w+.-]*://
            (?!/|[^:@?#\s]*/[^:@?#\s]*\?\w+=)  # a file has no user; nor has a host with an @ in its query
            (?:[^:/?#@\s]+:(?!@))?)
        (?P<secret>\S{1,500})(?=@)""",
    re.VERBOSE | re.IGNORECASE,
)
_IN_QUERY = re.compile(
    r"(?P<before>[?&][^=&\s]{0,50}(?:pass|pwd|secret|token|key|odbc_connect)[^=&\s]{0,50}=)"
    r"(?P<secret>[^&\s'\"]+)",
    re.IGNORECASE,
)
_TELLING = 3  # characters: a shorter password, or part of one, is in too many words to be taken out of them
_TOKEN = 8  # and what stands alone may be a user's name, which hosts are called by too
_ENCODED = "special characters of a password are percent-encoded (/ is %2F, ? is %3F, # is %23, @ is %40)"


def redact(text: str, uri: str = "") -> str:
    """`text` without the secrets of `uri`, and without any other `://user:password@` or `?password=`."""
    for form in sorted(_forms(uri), key=len, reverse=True):
        text = text.replace(form, "***")
    return _IN_QUERY.sub(r"\g<before>***", _USERINFO.sub(r"\g<before>***", text))


def _forms(uri: str) -> set[str]:
    """The secrets of a URI, as they are written, as they are meant, and in the parts that others read."""
    whole = re.sub(r"[\s'\"]", "x", uri)  # as long, and without what ends a URI in a text
    found = [
        match.span("secret")
        for each in (_USERINFO, _IN_QUERY)
        for match in each.finditer(whole)
        if not match["before"].endswith("://") or len(match["secret"]) >= _TOKEN
    ]
    secrets = {form for start, end in found for form in (uri[start:end], unquote(uri[start:end]))}
    parts = {part for secret in secrets for part in re.split("[/?#@]", secret)}
    return {form for form in secrets | parts if len(form) >= _TELLING}


def absolute(uri: str, home: Path | None = None) -> str:
    """An SQLite URI that means the same file from every working directory; other URIs as they are.

    Relative to `home`, or to the working directory.
    """
    path = sqlite_path(uri)
    return uri if path is None else f"{_SQLITE}{(home / path if home else path).absolute()}"


def known_scheme(uri: str) -> bool:
    """Whether MLflow can keep its records at such a URI."""
    try:
        urlsplit(uri)
    except ValueError:  # [ without its ], for instance
        return False
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
    scheme = _scheme(uri)
    try:
        parts = urlsplit(uri)
        port = parts.port or _PORTS.get(scheme)
    except ValueError:
        return f"its host and port cannot be read: a port is a number up to 65535, and {_ENCODED}"
    if not parts.hostname or port is None or _through_proxy(scheme, parts.hostname):
        return None
    try:
        socket.create_connection((parts.hostname, port), timeout=_SECONDS).close()
    except (OSError, UnicodeError) as error:  # the second for a name that no host can have
        why = getattr(error, "strerror", None) or error
        if "@" in uri.partition(parts.netloc)[2]:  # then this host may be the beginning of a password
            return f"nothing answers at its host ({why}); {_ENCODED}"
        return f"nothing answers at {parts.hostname}:{port} ({why})"
    return None


def _through_proxy(scheme: str, host: str) -> bool:
    return scheme in {"http", "https"} and scheme in getproxies() and not proxy_bypass(host)


def _scheme(uri: str) -> str:
    return uri.partition(":")[0].partition("+")[0].lower()  # postgresql+psycopg2
