"""Download from the Hub, verify cached files, and explain failures."""

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import WeightsDamaged, WeightsNotFound
from .safetensors_io import read_bytes

__all__ = ["address", "cached", "download", "fetch", "hub_cause", "hub_damage", "hub_reason"]


def download(repository: str, file: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    """Download a file to the Hub's cache like `fetch`, and return its path."""
    return fetch(repository, file, revision, cache_dir)[0]


def fetch(repository: str, file: str, revision: str | None, cache_dir: str | Path | None) -> tuple[Path, str | None]:
    """Download a file to the Hub's cache, or update it if the Hub is reachable.

    The content is verified against the Hub's digest. A damaged copy is removed and downloaded once more.

    Returns:
        The path, and the SHA-256, or None if the Hub gives no digest.

    Raises:
        WeightsNotFound: the file can be neither downloaded nor found in the cache.
        WeightsDamaged: both copies are damaged.
    """
    damage = ""
    for _ in range(2):
        try:
            path, etag = _newest(repository, file, revision, cache_dir)
        except WeightsNotFound as error:
            if damage:
                raise WeightsDamaged(f"{damage}; it was removed from the cache, but {error}") from error
            raise
        data = read_bytes(path)
        found = hub_damage(data, etag)
        if not found:
            return path, hashlib.sha256(data).hexdigest() if etag else None
        damage = f"{address(repository, file, revision)} arrived damaged ({len(data):,} bytes): {found}"
        _remove(path)
    raise WeightsDamaged(
        f"{damage}; a second copy was damaged too. The problem is the Hub or the connection to it: try again later"
    )


def cached(repository: str, file: str, cache_dir: str | Path | None, revision: str | None = None) -> Path | None:
    """Return the file in the Hub's cache; None if it is missing or damaged."""
    path = _in_cache(repository, file, cache_dir, revision)
    return path if path and not hub_damage(read_bytes(path), _etag(path)) else None


def hub_damage(data: bytes, etag: str | None) -> str:
    """Describe how `data` differs from the Hub's digest `etag`; return '' if it matches or there is no digest."""
    if etag is None:
        return ""
    if len(etag) == 64:  # SHA-256, for large files
        got = [hashlib.sha256(data).hexdigest()]
    else:  # git's blob hash, for small files; mirrors that are not git may send the plain SHA-1
        got = [hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), hashlib.sha1(data).hexdigest()]
    return "" if etag in got else f"expected the Hub's digest {etag}, got {got[0]}"


def _newest(repository: str, file: str, revision: str | None, cache_dir: str | Path | None) -> tuple[Path, str | None]:
    """Return the newest available file, unverified, and its expected digest, if known.

    Every failure is reported in one sentence that begins with the URL.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    metadata = None
    try:
        # A separate request, for the digest, and because the download alone would retry for 20 s.
        metadata = get_hf_file_metadata(hf_hub_url(repository, file, revision=revision))
        path = Path(hf_hub_download(repository, file, revision=revision, cache_dir=cache_dir))
    except Exception as error:  # any error of the installed client's HTTP library
        cached = None if _is_settled(error) else _in_cache(repository, file, cache_dir, revision)
        if cached is None:
            nor_here = "" if _is_settled(error) else ", and the file is not in the local Hub cache"
            where = address(repository, file, revision)
            raise WeightsNotFound(f"{where}: {hub_reason(error)}{nor_here}") from hub_cause(error)
        path = cached
    return path, _etag(path, metadata)


def _is_settled(error: Exception) -> bool:
    """Return whether the Hub answered that the file does not exist or is forbidden; a cached copy is then ignored."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return False
    settled = errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError
    return isinstance(error, (*settled, errors.HFValidationError))


def _in_cache(repository: str, file: str, cache_dir: str | Path | None, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, file, revision=revision, cache_dir=cache_dir)
    return Path(path) if isinstance(path, str) else None


def _etag(path: Path, metadata: Any = None) -> str | None:
    """Return the Hub's digest of a cached file: the name of its blob, or else from the Hub's response."""
    if path.is_symlink():
        etag = Path(os.readlink(path)).name
    elif metadata and metadata.commit_hash in path.parts:  # a file system without links
        etag = metadata.etag
    else:
        return None
    return etag if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", etag or "") else None


def _remove(path: Path) -> None:
    """Remove a file from the Hub's cache: the entry and every file it links to."""
    chain = [path]
    while chain[-1].is_symlink():
        chain.append(chain[-1].parent / os.readlink(chain[-1]))
    for link in reversed(chain):
        with suppress(OSError):  # a read-only cache; the file is rejected anyway
            link.unlink()


def address(repository: str, file: str, revision: str | None = None) -> str:
    """Return the URL of a file on the Hub."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}/resolve/{revision or 'main'}/{file}"


def hub_reason(error: Exception, token: str | None = None) -> str:
    """Explain a failed download or upload in a sentence that never shows a token.

    Args:
        error: The exception that huggingface_hub raised.
        token: The token that was used, if it is not the stored one.
    """
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError):  # wraps the real cause
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    signed_in = token or get_token()
    if isinstance(error, errors.HFValidationError):
        return f"this is not a valid name for a Hub repository ({_first_line(error, token)})"
    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated: accept its terms on its page, and log in with that account (hf auth login)"
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "that the current token cannot access" if signed_in else "that needs a login (hf auth login)"
        return f"no such repository, or a private one {private}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return "the repository has no such file"
    if type(error) is ValueError:  # a rejected argument or card; the whole message is needed
        return " ".join(_without_tokens(str(error), token).split())
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401 and not signed_in:
        return "the Hub requires a login for this: hf auth login"
    if status == 401:
        return "the Hub rejects the current token, which is wrong or has expired: hf auth login, or unset HF_TOKEN"
    if status == 403:
        return "the current token does not have permission for this in this organisation"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if status is not None:
        return f"the Hub returned an error ({_first_line(error, token)})"
    if type(error) is OSError:
        return f"the download failed ({_first_line(error, token)})"
    return f"the Hub did not respond ({_first_line(error, token)})"


def hub_cause(error: Exception, token: str | None = None) -> Exception | None:
    """Return the error to raise `from`, or None if its traceback would show a token."""
    return error if _without_tokens(str(error), token) == str(error) else None


def _first_line(error: Exception, token: str | None) -> str:
    return _without_tokens((str(error) or type(error).__name__).splitlines()[0], token)


def _without_tokens(text: str, token: str | None) -> str:
    from huggingface_hub import get_token

    for secret in filter(None, (token, get_token())):
        text = text.replace(secret, "hf_***")
    return re.sub(r"Bearer [^'\"]+|hf_[A-Za-z0-9]{20,}", "hf_***", text)
