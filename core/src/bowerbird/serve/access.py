"""Who may do what, how often; and the log of what administrators did.

A service on the loopback address without a token file trusts everybody who reaches it, as a program that the operator
runs does. Anywhere else callers show a token of the token file, or a proxy that has authenticated them names them.
The token file is TOML and holds no token, only their SHA-256 (tokens are 256 random bits, so that a plain hash keeps
them)::

    [[token]]
    name = "upload robot"
    role = "write"            # read < write < admin
    sha256 = "9f86d0..."

    [users]                   # with --proxy-header: the role of a user that the proxy names; others may read
    "ada@example.org" = "admin"

    [proxy]
    addresses = ["10.0.0.0/8"]  # from where the header is believed, besides the loopback addresses

``docs/serve-security.md`` is the threat model.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, cast, get_args

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from bowerbird.errors import InputError, StoreUnavailableError, did_you_mean
from bowerbird.gallery.protocol import StorageLike
from bowerbird.serve.problems import ProblemError
from bowerbird.serve.schemas import Role
from bowerbird.serve.settings import ServeSettings

log = logging.getLogger("bowerbird.serve.audit")

ROLES: tuple[Role, ...] = get_args(Role)  # from the least to the most
WRONG_TOKENS_PER_MINUTE = 30  # per address
AUDIT_FILE = "serve/audit.jsonl"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Caller:
    """Somebody who may use the service.

    Attributes:
        name: Of the token, or of the user as the proxy calls it; ``local`` for everybody on a service without tokens.
        role: The most that the caller may do.
    """

    name: str
    role: Role

    def may(self, role: Role) -> bool:
        return ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True)
class Tokens:
    """A token file, read."""

    callers: dict[str, Caller]  # by the SHA-256 of their token
    users: dict[str, Role]
    proxies: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]


def new_token(role: Role, name: str | None = None) -> tuple[str, str]:
    """A new token and the lines of the token file that let it in. The token is kept nowhere."""
    name = name or f"{role} {secrets.token_hex(3)}"
    if role not in ROLES:
        raise InputError(f"a token has the role read, write or admin, found {role!r}.{did_you_mean(role, ROLES)}")
    token = f"bowerbird_{secrets.token_urlsafe(32)}"
    lines = f"[[token]]\nname = {json.dumps(name)}\nrole = {json.dumps(role)}\nsha256 = {json.dumps(_hash(token))}\n"
    return token, lines


def read_tokens(file: Path) -> Tokens:
    """Raises ``InputError`` that names the file and what is wrong in it."""
    try:
        if file.stat().st_mode & 0o002:
            raise InputError(
                f"token file {file} can be written by everybody, who could let themselves in; chmod o-w it"
            )
        content = tomllib.loads(file.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"token file {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"token file {file} is not TOML: {error}") from error
    for key in content:
        if key not in ("token", "users", "proxy"):
            known = ("token", "users", "proxy")
            raise InputError(
                f"token file {file} has an unknown part {key!r}; known are {known}.{did_you_mean(key, known)}"
            )
    callers: dict[str, Caller] = {}
    for number, entry in enumerate(_list_of_tables(content.get("token", []), file), 1):
        where = f"token {number} of {file}"
        if set(entry) != {"name", "role", "sha256"}:
            raise InputError(f"{where} must have exactly name, role and sha256, found {sorted(entry)}")
        if (
            not isinstance(entry["name"], str)
            or not entry["name"]
            or entry["name"] in {c.name for c in callers.values()}
        ):
            raise InputError(f"{where} needs a name of its own, found {entry['name']!r}")
        if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
            raise InputError(
                f"{where}: sha256 must be 64 hexadecimal digits; `bowerbird serve --new-token` writes them"
            )
        callers[entry["sha256"]] = Caller(entry["name"], _role(entry["role"], where))
    users = content.get("users", {})
    if not isinstance(users, dict):
        raise InputError(f"[users] of {file} must be a table of names and roles")
    proxy = content.get("proxy", {})
    if not isinstance(proxy, dict) or set(proxy) - {"addresses"} or not isinstance(proxy.get("addresses", []), list):
        raise InputError(f"[proxy] of {file} takes `addresses`, a list of addresses or networks")
    try:
        proxies = tuple(ipaddress.ip_network(address) for address in proxy.get("addresses", []))
    except (ValueError, TypeError) as error:
        raise InputError(f"[proxy] of {file}: {error}") from error
    return Tokens(callers, {name: _role(role, f"user {name!r} of {file}") for name, role in users.items()}, proxies)


def _list_of_tables(value: Any, file: Path) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise InputError(f"tokens of {file} are tables: write [[token]] above each")
    return value


def _role(value: Any, where: str) -> Role:
    if value not in ROLES:
        raise InputError(f"{where}: a role is read, write or admin, found {value!r}.{did_you_mean(str(value), ROLES)}")
    return cast(Role, value)


def is_loopback(host: str) -> bool:
    """Whether an address, or a name that always means one, is of the loopback interface."""
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Access:
    """Knows callers by their tokens or their proxy's header, and refuses the others.

    Raises ``InputError`` where the service would be open to a network without asking who calls.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.tokens = read_tokens(settings.tokens) if settings.tokens is not None else None
        if not is_loopback(settings.host) and self.tokens is None and settings.proxy_header is None:
            raise InputError(
                f"a service on {settings.host} can be reached by others, and nothing says who may use it; give a token "
                "file (--tokens FILE; `bowerbird serve --new-token admin` writes its first line), name the header of a "
                "proxy that authenticates (--proxy-header NAME), or stay on 127.0.0.1"
            )
        if self.tokens is not None and not self.tokens.callers and settings.proxy_header is None:
            raise InputError(f"token file {settings.tokens} has no token, so that nobody could use the service")
        self.storage: StorageLike | None = None  # the gallery's, set as soon as it is open
        per_minute = settings.requests_per_minute
        self._limit = RateLimitItemPerMinute(per_minute) if per_minute else None
        self._wrong = RateLimitItemPerMinute(WRONG_TOKENS_PER_MINUTE)
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._limiter.storage.reset()

    @property
    def open(self) -> bool:
        """Whether nobody is asked who they are: a service on the loopback address."""
        return self.tokens is None and self.settings.proxy_header is None

    # -------------------------------------------------------------------------------------------------- who is it

    def caller(self, request: HTTPConnection, role: Role) -> Caller:
        """Who calls. Raises a problem: 401 for a stranger, 403 for somebody who may not do it, 429 for too much."""
        caller = self.identify(request)
        if role != "read" and self.settings.read_only:
            raise ProblemError(403, "this service was started read-only; nothing can be changed through it")
        if not caller.may(role):
            log.info("refused: %r has the role %s and asked for what needs %s", caller.name, caller.role, role)
            raise ProblemError(403, f"this needs the role {role}; {caller.name!r} has the role {caller.role}")
        return caller

    def identify(self, request: HTTPConnection) -> Caller:
        """Who calls, asked and counted once per request."""
        known: Caller | None = request.scope.get("bowerbird.caller")
        if known is None:
            address = request.client.host if request.client else "unix"
            known = self._identify(request.headers, address)
            request.scope["bowerbird.caller"] = known
            key = f"address {address}" if self.open else f"caller {known.name}"
            if self._limit is not None and not self._limiter.hit(self._limit, key):
                raise self._too_many(f"more than {self.settings.requests_per_minute} requests in a minute", key)
        return known

    def _identify(self, headers: Headers, address: str) -> Caller:
        most: Role = "read" if self.settings.read_only else "admin"
        if self.open:
            return Caller("local", most)
        kind, _, token = headers.get("authorization", "").partition(" ")
        if self.tokens is not None and kind.lower() == "bearer":
            found = self._by_token(token.strip())
            if found is not None:
                return Caller(found.name, min(found.role, most, key=ROLES.index))
            key = f"wrong {address}"
            if not self._limiter.hit(self._wrong, key):
                raise self._too_many("too many unknown tokens from this address", key, self._wrong)
        if self.settings.proxy_header is not None and self._is_proxy(address):
            named = headers.getlist(self.settings.proxy_header)
            if len(named) > 1:  # one of them is the client's own
                raise ProblemError(400, f"{self.settings.proxy_header} is there more than once")
            user = named[0] if named else ""
            if user:
                role = self.tokens.users.get(user, "read") if self.tokens else "read"
                return Caller(user, min(role, most, key=ROLES.index))
        what = "this token is not known" if kind else "no token"
        raise ProblemError(
            401, f"{what}; send `Authorization: Bearer TOKEN`", headers={"WWW-Authenticate": 'Bearer realm="bowerbird"'}
        )

    def _by_token(self, token: str) -> Caller | None:
        shown = _hash(token)
        found = None
        assert self.tokens is not None
        for known, caller in self.tokens.callers.items():  # all of them, whichever fits: the time tells nothing
            if hmac.compare_digest(known, shown):
                found = caller
        return found

    def _is_proxy(self, address: str) -> bool:
        if address == "unix":
            return True
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:  # a socket for both versions says so
            ip = ip.ipv4_mapped
        return ip.is_loopback or (self.tokens is not None and any(ip in network for network in self.tokens.proxies))

    def _too_many(self, what: str, key: str, limit: RateLimitItemPerMinute | None = None) -> ProblemError:
        item = limit or self._limit
        assert item is not None
        until = self._limiter.get_window_stats(item, key).reset_time - datetime.now(UTC).timestamp()
        return ProblemError(429, f"{what}; wait", headers={"Retry-After": str(max(1, round(until)))})

    # -------------------------------------------------------------------------------------------------- audit log

    def audit(self, caller: Caller, act: str, detail: Mapping[str, Any] | None = None) -> None:
        """Note an act of an administrator, durably, BEFORE it is done: one JSON line in ``serve/audit.jsonl``.

        Blocks for one fsync. ``detail`` is plain data. Raises ``StoreUnavailableError`` where it cannot be written;
        then the act must not be done.
        """
        entry = {"time": datetime.now(UTC).isoformat(), "caller": caller.name, "role": caller.role, "act": act}
        line = json.dumps(
            {**entry, "detail": dict(detail or {})}, default=str
        )  # ASCII: no forged lines, whatever is in it
        log.info("%s", line)
        if self.storage is None or self.settings.read_only:
            return
        try:
            self.storage.append_line(AUDIT_FILE, line)
        except OSError as error:
            raise StoreUnavailableError(
                f"the audit log cannot be written ({error.strerror}); nothing was done"
            ) from error


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()
