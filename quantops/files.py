"""Files that appear whole or not at all."""

import os
import uuid


def whole(path, write):
    """Calls ``write(name)`` with the name of a new file beside ``path``, then renames that to ``path``."""
    path = os.path.realpath(path)  # a link stays one
    beside = os.path.join(os.path.dirname(path), f".{uuid.uuid4().hex}.tmp")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        if os.path.exists(beside):
            os.unlink(beside)
