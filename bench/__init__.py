"""Benchmarks: every op and whole training steps against what a user could run instead. ``python -m bench --help``."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory and launches, talks otherwise
