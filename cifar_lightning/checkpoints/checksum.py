"""The SHA-256 that a checkpoint carries as the comment of its zip archive.

Data and hash are put in place by one rename, and copies of the file keep the hash. torch and zip tools read the file as
before. The checksums of the zip format are not enough: `torch.load` does not check them, and they do not cover names,
sizes and padding.
"""

import hashlib

_TAG = b"sha256:"
_CHECKSUM_BYTES = len(_TAG) + 64
# Of the zip's last record: 22 bytes without a comment, of which the last two are the length of the comment.
_END = b"PK\x05\x06"
_END_BYTES = 22


def add_checksum(archive: bytes) -> bytes:
    """Return a zip archive as `torch.save` writes it, without a comment, with its hash as the comment."""
    assert archive[-_END_BYTES:].startswith(_END), "not a zip archive without a comment"
    content = bytearray(archive)
    content[-2:] = _CHECKSUM_BYTES.to_bytes(2, "little")
    return bytes(content) + _TAG + hashlib.sha256(content).hexdigest().encode()


def has_checksum(data: bytes) -> bool:
    """Return whether a file ends with a checksum; a truncated one does not."""
    return data[-_CHECKSUM_BYTES:].startswith(_TAG)


def is_intact(data: bytes) -> bool:
    """Return whether a file ends with the checksum of its bytes."""
    checksum, content = data[-64:], memoryview(data)[:-_CHECKSUM_BYTES]
    return has_checksum(data) and hashlib.sha256(content).hexdigest().encode() == checksum
