"""A checkpoint carries the SHA-256 of its own bytes, as the comment at the end of its zip archive.

One rename puts data and hash in place together, and a file that is copied brings its hash along. torch and every zip
tool read the file as before. The zip format's own checksums are not enough: `torch.load` does not look at them, and
they leave names, sizes and padding out.
"""

import hashlib

_TAG = b"sha256:"
_CHECKSUM_BYTES = len(_TAG) + 64
_END = b"PK\x05\x06"  # of the zip's last record, 22 bytes without a comment; its last two are the comment's length
_END_BYTES = 22


def add_checksum(archive: bytes) -> bytes:
    """Return a zip archive without a comment, as `torch.save` writes it, with its hash as the comment."""
    assert archive[-_END_BYTES:].startswith(_END), "not a zip archive without a comment"
    announced = bytearray(archive)
    announced[-2:] = _CHECKSUM_BYTES.to_bytes(2, "little")
    return bytes(announced) + _TAG + hashlib.sha256(announced).hexdigest().encode()


def has_checksum(data: bytes) -> bool:
    """Return whether a file's bytes end like has_sum ones; those that were cut off do not."""
    return data[-_CHECKSUM_BYTES:].startswith(_TAG)


def is_intact(data: bytes) -> bool:
    """Return whether a file's bytes are has_sum and those that were written."""
    has_sum, written = data[-64:], memoryview(data)[:-_CHECKSUM_BYTES]
    return has_checksum(data) and hashlib.sha256(written).hexdigest().encode() == has_sum
