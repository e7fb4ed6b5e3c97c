"""A set in a store, as `ShardFiles`: whole files from the cache, fetched once a machine, and ahead of their use."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from fasttrain.data.config import DataConfig
from fasttrain.data.files import LocalFiles, ShardFiles
from fasttrain.data.remote.addresses import join, refuse_secrets, scheme_of, shown
from fasttrain.data.remote.ahead import Ahead
from fasttrain.data.remote.cache import Cache, Held
from fasttrain.data.remote.fetch import Fetch
from fasttrain.data.remote.openers import Opener, opener_of
from fasttrain.data.remote.retry import Patience
from fasttrain.errors import UserError

FETCHERS = 4  # files on their way at a time, a process
RENEWALS = 2  # times that a file is fetched anew because its content was wrong
_POLL = 0.05  # seconds between looks at another process's draft
# Of the cache, over the processes of a machine: the rest is for what is on its way and what was used last.
_HELD, _AHEAD = 0.5, 0.25


def open_files(place: str, config: DataConfig, fresh: Sequence[str] = ()) -> ShardFiles:
    """The files of the set at `place`: a folder, or an address up to the files' names.

    Args:
        place: as `data.train` or a command names it.
        config: the `data:` section; its `train` is not looked at.
        fresh: names of files that are fetched anew by each process, because nothing tells whether a cached one is current.

    Raises:
        UserError: an address with a secret in it, an unknown scheme, `pipe:` without leave, or a cache that cannot be used.
    """
    scheme = scheme_of(place)
    if scheme is None:
        return LocalFiles(Path(place))
    check_address(place)
    opener = opener_of(scheme, place, config.allow_pipe)
    return RemoteFiles(place, opener, Cache(cache_folder(config) / "files", int(config.cache_gib * 2**30)), config.retry_seconds, fresh)


def check_address(place: str) -> None:
    """Raises UserError where an address carries a secret; the message does not show it."""
    try:
        refuse_secrets(place)
    except ValueError as error:
        raise UserError(str(error)) from None


def cache_folder(config: DataConfig) -> Path:
    """Where fetched files and indexes are kept: `data.cache`, $FASTTRAIN_CACHE, or ~/.cache/fasttrain."""
    return Path(config.cache or os.environ.get("FASTTRAIN_CACHE") or "~/.cache/fasttrain").expanduser()


class RemoteFiles:
    """The files of one set in a store. See `ShardFiles`.

    Args:
        base: the address that names are put behind.
        opener: reads the store.
        cache: where fetched files stand.
        retry_seconds: how long a passing failure is borne without anything new.
        fresh: names that are fetched anew once.
    """

    def __init__(self, base: str, opener: Opener, cache: Cache, retry_seconds: float, fresh: Sequence[str] = ()):
        self._base = base
        self._opener = opener
        self._cache = cache
        self._retry_seconds = retry_seconds
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._held: dict[str, Held] = {}
        self._stale = set(fresh)
        self._renewals: dict[str, int] = {}
        self._waiting: dict[str, int] = {}  # bytes fetched ahead and not yet asked for, by name
        self._largest = 0  # bytes of a file fetched ahead so far
        self._ahead = Ahead(self._fetch_ahead, self._may_fetch_ahead, FETCHERS)
        self._processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    @property
    def place(self) -> str:
        return shown(self._base)

    @property
    def most_held(self) -> int:
        return int(self._cache.bound * _HELD / self._processes)

    def path(self, name: str) -> Path:
        """See `ShardFiles.path`; a second thread that asks for the same file waits for the first."""
        while True:
            with self._lock:
                held = self._held.get(name)
                if held is not None and held.current():
                    return held.path
            with self._lock:
                self._waiting.pop(name, None)
            self._ahead.claim(name)
            self._keep(name, self._get(name))

    def ahead(self, names: Sequence[str]) -> None:
        with self._lock:
            self._waiting = {name: size for name, size in self._waiting.items() if name in names}
            here = {*self._held, *self._waiting}
        self._ahead.want([name for name in names if name not in here])

    def release(self, name: str) -> None:
        with self._lock:
            held = self._held.pop(name, None)
        if held is not None:
            held.release()

    def renew(self, name: str) -> bool:
        with self._lock:
            if self._renewals.get(name, 0) >= RENEWALS:
                return False
            self._renewals[name] = self._renewals.get(name, 0) + 1
            held = self._held.pop(name, None)
        if held is not None:
            self._cache.drop(held)
        return True

    def close(self) -> None:
        """Ends the fetching; who waits for a file is told that there will be none."""
        self._stop.set()
        self._ahead.close()
        for name in list(self._held):
            self.release(name)

    def _keep(self, name: str, held: Held) -> None:
        with self._lock:
            before = self._held.get(name)
            self._held[name] = held
        if before is not None:
            before.release()

    def _may_fetch_ahead(self, running: int) -> bool:
        """Whether this process's share of the cache has room beside what waits to be asked for and what is on its way.

        Files on their way take their room at once, and would take it from those that somebody waits for.
        """
        with self._lock:
            taken = sum(self._waiting.values()) + running * self._largest
            return taken < self._cache.bound * _AHEAD / self._processes and (self._largest > 0 or not running)

    def _fetch_ahead(self, name: str) -> None:
        """Puts a file into the cache, where it waits as one of the last used."""
        try:
            held = self._get(name)
        except (UserError, OSError):
            return  # `path` meets the same, and tells it
        with self._lock:
            self._waiting[name] = held.size
            self._largest = max(self._largest, held.size)
        held.release()

    def _get(self, name: str) -> Held:
        """A whole file, held: from the cache, from another process that is fetching it, or from the store."""
        url = join(self._base, name)
        patience = Patience(shown(url), self._retry_seconds, self._stop)
        self._drop_stale(name, url)
        while True:
            if (held := self._cache.hold(url)) is not None:
                return held
            draft = self._cache.draft(url)
            if draft is None:
                patience.watch(_POLL)
                continue
            try:
                # Another process may have put it there since we looked.
                if not self._cache.has(url):
                    draft.keep(Fetch(self._opener, url, draft, patience).run())
            finally:
                draft.discard()

    def _drop_stale(self, name: str, url: str) -> None:
        """Removes what an earlier start has cached of a file that must be current."""
        with self._lock:
            stale = name in self._stale
            self._stale.discard(name)
        if stale and (held := self._cache.hold(url)) is not None:
            self._cache.drop(held)
