"""Leave to read or write one object: URLs that a store checks by itself, for a limited time.

Who holds a grant needs no credentials and can do nothing else with it. S3 signatures follow
"Authenticating Requests: Using Query Parameters (AWS Signature Version 4)", AWS S3 API Reference.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import quote, urlsplit

from photon.errors import LinkError
from photon.store.contract import require_key

Verb = Literal["GET", "HEAD", "PUT"]

_SHA256 = re.compile("[0-9a-f]{64}")

#: The longest that S3 lets a signature be valid.
MAX_VALID_S = 7 * 24 * 3600


@dataclass(frozen=True)
class Grant:
    """Leave for one request. The URL is a secret until it expires: it never goes into a log.

    Attributes:
        verb: HTTP's.
        url: with the signature in its query.
        headers: to be sent exactly so; lower-case names.
        expires_at: seconds since the epoch.
    """

    verb: Verb
    url: str = field(repr=False)
    headers: Mapping[str, str]
    expires_at: float


class Presigner(ABC):
    """Makes grants for the objects of one store."""

    def grant(
        self,
        verb: Verb,
        key: str,
        valid_s: int,
        bytes: int | None = None,
        sha256: str | None = None,
    ) -> Grant:
        """Leave to read an object, to ask whether it is there and how long it is, or to write it.

        Args:
            valid_s: seconds from now; 7 days at most.
            bytes, sha256: how long what is written is, and its hash, hexadecimal; for PUT only.

        Raises:
            LinkError: a time that no store accepts, or no length or sha256 of what is written.
        """
        if not 1 <= valid_s <= MAX_VALID_S:
            raise LinkError(f"a grant can be valid for 1 to {MAX_VALID_S} seconds, not {valid_s}")
        if verb != "PUT":
            return self._sign(verb, key, {}, valid_s)
        if bytes is None or sha256 is None:
            raise LinkError(f"leave to write {key} needs its length and sha256")
        return self._sign(verb, key, self._written(bytes, sha256), valid_s)

    @abstractmethod
    def _written(self, bytes: int, sha256: str) -> dict[str, str]:
        """Headers of a request that writes so many bytes."""

    @abstractmethod
    def _sign(self, verb: Verb, key: str, headers: Mapping[str, str], valid_s: int) -> Grant:
        """A request about an object, signed."""


class S3Presigner(Presigner):
    """Grants for a bucket of S3 or a store that speaks it, addressed path style.

    Leave to write signs the length, the sha256 and `if-none-match: *` along with the host, so the
    store refuses a longer body, other bytes and an overwrite. (Measured with SeaweedFS 4.48.)

    Args:
        endpoint: the store's URL as those see it who will use the grants.
        bucket: its name.
        region: what the store calls its region.
        access_key_id, secret: the credentials that grants act for.
        session_token: of temporary credentials.
        prefix: the folder in the bucket under which keys lie.
    """

    def __init__(
        self,
        endpoint: str,
        bucket: str,
        *,
        region: str,
        access_key_id: str,
        secret: str,
        session_token: str | None = None,
        prefix: str = "",
    ) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc or parts.query:
            raise LinkError(
                f"a store's endpoint must be an http or https URL, "
                f"found {parts.scheme}://{parts.netloc.rpartition('@')[2]}"
            )
        self._origin = f"{parts.scheme}://{parts.netloc}"
        # Clients leave a scheme's own port out of the header that is signed.
        default_port = ":443" if parts.scheme == "https" else ":80"
        self._host = parts.netloc.removesuffix(default_port)
        self._bucket_path = f"{parts.path.rstrip('/')}/{bucket}"
        self._region = region
        self._access_key_id = access_key_id
        self._secret = secret
        self._session_token = session_token
        self._prefix = prefix.strip("/")

    def _written(self, bytes: int, sha256: str) -> dict[str, str]:
        if not _SHA256.fullmatch(sha256):
            raise LinkError(f"{sha256[:80]!r} is not a sha256 in hexadecimal")
        return {
            "content-length": str(bytes),
            "if-none-match": "*",
            "x-amz-checksum-sha256": base64.b64encode(bytearray.fromhex(sha256)).decode(),
        }

    def bucket_request(self, verb: Verb, valid_s: int) -> Grant:
        """A request about the bucket itself: PUT makes it, HEAD asks whether it is there."""
        return self._sign_path(verb, self._bucket_path, {}, valid_s)

    def _sign(self, verb: Verb, key: str, headers: Mapping[str, str], valid_s: int) -> Grant:
        folder = f"{self._prefix}/" if self._prefix else ""
        path = f"{self._bucket_path}/{folder}{require_key(key)}"
        return self._sign_path(verb, path, headers, valid_s)

    def _sign_path(self, verb: Verb, path: str, headers: Mapping[str, str], valid_s: int) -> Grant:
        now = time.time()
        query = self.signed_query(verb, path, headers, datetime.fromtimestamp(now, UTC), valid_s)
        url = f"{self._origin}{quote(path)}?{query}"
        return Grant(verb, url, headers, int(now) + valid_s)

    def signed_query(
        self, verb: str, path: str, headers: Mapping[str, str], at: datetime, valid_s: int
    ) -> str:
        """The query that carries the signature of one request, as the reference defines it.

        Args:
            verb: HTTP's.
            path: unquoted, from the root of the host.
            headers: signed along with the host; lower-case names.
            at: the moment of signing, UTC.
            valid_s: seconds from `at`.
        """
        signed_headers = dict(sorted({**headers, "host": self._host}.items()))
        day = at.strftime("%Y%m%d")
        moment = at.strftime("%Y%m%dT%H%M%SZ")
        scope = f"{day}/{self._region}/s3/aws4_request"
        parameters = {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "X-Amz-Credential": f"{self._access_key_id}/{scope}",
            "X-Amz-Date": moment,
            "X-Amz-Expires": str(valid_s),
            "X-Amz-SignedHeaders": ";".join(signed_headers),
        }
        if self._session_token:
            parameters["X-Amz-Security-Token"] = self._session_token
        query = "&".join(
            f"{quote(name, safe='')}={quote(value, safe='')}"
            for name, value in sorted(parameters.items())
        )
        canonical = "\n".join(
            [
                verb,
                quote(path),
                query,
                *(f"{name}:{value.strip()}" for name, value in signed_headers.items()),
                "",
                ";".join(signed_headers),
                "UNSIGNED-PAYLOAD",
            ]
        )
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        to_sign = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{digest}"
        signing_key = f"AWS4{self._secret}".encode()
        for part in (day, self._region, "s3", "aws4_request"):
            signing_key = hmac.digest(signing_key, part.encode(), "sha256")
        signature = hmac.digest(signing_key, to_sign.encode(), "sha256").hex()
        return f"{query}&X-Amz-Signature={signature}"
