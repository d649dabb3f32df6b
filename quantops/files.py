"""Files that appear whole or not at all, whatever ends the process or the power meanwhile."""

import contextlib
import errno
import os
import stat
import uuid

_WITHOUT_LINKS = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)  # of file systems without O_TMPFILE


def write_whole(path, write):
    """Puts what ``write(binary file)`` writes at ``path``, in the place of a file that is there.

    It is written in the same folder, to a file without a name where the file system has those (so that a killed process
    leaves nothing), flushed to the disk, given a name and renamed; then the folder is flushed. The new file has the
    mode and, where permitted, the owner of the old one, or what the umask says. A symbolic link stays, and its target
    is replaced.

    Raises OSError, with the old file as it was, where that cannot be done or ``path`` is a folder or a device.
    """
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    old = os.stat(target) if os.path.lexists(target) else None  # OSError where links go round in a circle
    if (old and not stat.S_ISREG(old.st_mode)) or not os.path.basename(path):
        raise OSError(errno.EINVAL, "expected a regular file or a free name", os.fspath(path))
    beside = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")  # no longer than that, whatever the name of the file
    place = os.open(folder, os.O_RDONLY)  # first: where it cannot be flushed, the old file stays
    try:
        descriptor, named = _open(folder, beside)
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            if old:
                with contextlib.suppress(PermissionError):
                    os.fchown(descriptor, old.st_uid, old.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
            os.fsync(descriptor)
            if not named:
                # Any src_dir_fd makes Python follow the link that /proc has, whose name is absolute.
                os.link(f"/proc/self/fd/{descriptor}", beside, src_dir_fd=descriptor, follow_symlinks=True)
        os.replace(beside, target)
        _flush(place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    finally:
        os.close(place)


def _open(folder, beside):
    """(descriptor of a new file, whether it has the name ``beside``), with the mode that the umask gives."""
    if hasattr(os, "O_TMPFILE") and os.path.exists("/proc/self/fd"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666), False
        except OSError as error:
            if error.errno not in _WITHOUT_LINKS or not os.path.isdir(folder):
                raise
    return os.open(beside, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666), True


def _flush(place):
    """The new name, too, lasts over a power cut. Some file systems flush no folders."""
    try:
        os.fsync(place)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
