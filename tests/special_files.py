"""Paths that are no regular files."""

import os

POSIX_KINDS = ["fifo", "device"] if hasattr(os, "mkfifo") else []


def make_special(path, kind):
    """Make a path a folder, a FIFO, or a link to a device that never ends."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
