"""The front door's certificate while `photon serve` runs: made anew in time, or watched over.

Photon's own is made anew once a third of its life is left; one that the operator gave is taken over
when its files change, and its end is announced. Either way the door reads it again without ending a
connection, and silos need nothing new: what they trust is the authority.

Invariant: the files that the door serves from hold a pair that passed every check. The operator's
are therefore copied: half-written ones, or a key that does not fit, never reach the door.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from photon.config.serve import ServeConfig
from photon.deploy.certificates import (
    MOST_DAYS,
    CertificateFiles,
    given_files,
    keep_certificate,
    read,
    renewal_is_due,
    require_certificate,
    valid_until,
)
from photon.deploy.front_door import public_host
from photon.errors import PhotonError
from photon.store.disk import write_whole

#: Between two looks at the files.
_LOOK_S = 60.0
#: The operator is told of the end of a certificate of his own so many days before, or when a
#: quarter of its life is left, whichever is later; and again every day.
_TOLD_DAYS, _AGAIN_S = 21.0, 86_400.0
_GIVEN = "given"


class DoorCertificate:
    """The certificate of the front door. Not for several threads, but for `status`.

    Args:
        serve: whose certificate it is, and for which host.
        home: serve.home.
        tell: told, in words, what was done or is to be done.
        days: that one of Photon's own is valid.
        look_s: between two looks at the files.

    Raises:
        CertificateError: the operator's can't be used, or Photon's can't be made.
    """

    def __init__(
        self,
        serve: ServeConfig,
        home: Path,
        *,
        tell: Callable[[str], None],
        days: float = MOST_DAYS,
        look_s: float = _LOOK_S,
    ) -> None:
        self._home = home
        self._host = public_host(serve)
        self._tell = tell
        self._days = days
        self._look_s = look_s
        self._next_look_s = time.monotonic() + look_s
        self._told: tuple[str, float] = ("", 0.0)
        self._trouble: str | None = None
        self._given = given_files(serve)
        if self._given is not None:
            self.files = self._take_over(self._given)
            # Invitations carry the authority from here.
            write_whole(home / "ca.crt", self._given.ca.read_bytes(), "the authority")
        else:
            self.files = keep_certificate(home, self._host, days)
        self._until = valid_until(self.files.certificate)

    def look(self, read_again: Callable[[], object], *, now_s: float | None = None) -> bool:
        """Look after the certificate, if it is time to.

        Args:
            read_again: has the door read its certificate.
            now_s: of a clock that never goes back.

        Returns:
            Whether the door has another certificate now.
        """
        now_s = time.monotonic() if now_s is None else now_s
        if now_s < self._next_look_s:
            return False
        self._next_look_s = now_s + self._look_s
        try:
            renewed = self._renew() if self._given is None else self._follow(self._given)
            self._trouble = None
        except (PhotonError, OSError) as error:
            renewed = False
            self._trouble = error.message if isinstance(error, PhotonError) else str(error)
            self._say_daily(f"the door's certificate could not be renewed: {self._trouble}", now_s)
        if renewed:
            self._until = valid_until(self.files.certificate)
            read_again()
            self._told = ("", 0.0)
            self._tell(f"the door has a new certificate, valid until {_shown(self._until)}")
        elif self._trouble is None and (words := self._warning()):
            self._say_daily(words, now_s)
        return renewed

    def status(self) -> dict[str, Any]:
        """For `photon status`: until (seconds since the epoch), and a warning or None."""
        warning = self._warning()
        if self._trouble is not None:
            warning = f"the door's certificate could not be renewed: {self._trouble}" + (
                f"; {warning}" if warning else ""
            )
        return {"until": self._until.timestamp(), "warning": warning}

    def _renew(self) -> bool:
        if not renewal_is_due(self.files.certificate):
            return False
        before = self.files.certificate.read_bytes()
        keep_certificate(self._home, self._host, self._days)
        return self.files.certificate.read_bytes() != before

    def _follow(self, given: CertificateFiles) -> bool:
        """Take over the operator's files where they changed.

        Raises:
            CertificateError: they did, and can't be used; the door keeps those it has.
        """
        names = ("certificate", "key")
        if all(read(getattr(given, name)) == read(getattr(self.files, name)) for name in names):
            return False
        self._take_over(given)
        return True

    def _take_over(self, given: CertificateFiles) -> CertificateFiles:
        require_certificate(given, self._host)
        folder = self._home / _GIVEN
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        own = CertificateFiles(folder / "server.crt", folder / "server.key", given.ca)
        # A door that starts between the two fails, and is started again.
        write_whole(own.key, given.key.read_bytes(), "the door's key", mode=0o600)
        write_whole(own.certificate, given.certificate.read_bytes(), "the door's certificate")
        return own

    def _warning(self) -> str | None:
        left = self._until - datetime.now(UTC)
        if left < timedelta(0):
            words = f"the door's certificate expired at {_shown(self._until)}: no silo comes in"
            return f"{words}; {self._remedy()}"
        # Of one that is renewed by a robot, more than a third of its life is left at any time.
        soon = left < timedelta(days=_TOLD_DAYS) and renewal_is_due(self.files.certificate)
        if self._given is None or not soon:
            return None
        days = left / timedelta(days=1)
        return (
            f"the door's certificate {self._given.certificate} is valid for {days:.1f} more days, "
            f"until {_shown(self._until)}; {self._remedy()}"
        )

    def _remedy(self) -> str:
        if self._given is None:
            return "see the log for why it can't be made anew"
        return (
            f"put a new one, by the same authority, at {self._given.certificate} and "
            f"{self._given.key}: it is taken over while this runs"
        )

    def _say_daily(self, words: str, now_s: float) -> None:
        """The same thing once a day; the numbers in it may change."""
        before, at = self._told
        kind = words.partition(":")[0].partition(" is valid for ")[0]
        if kind != before or now_s - at >= _AGAIN_S:
            self._told = (kind, now_s)
            self._tell(words)


def _shown(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M} UTC"
