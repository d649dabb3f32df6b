"""Every case on small weights, checked against the reference or only called, as under sanitizers; not timed."""

import torch

from bench.measure import check_served
from bench.ops.registry import cases
from bench.ops.shapes import shapes_of
from bench.state import Wrong


def small(args):
    """Checks every case on small weights against the reference; fails at the first that differs."""
    count = 0
    for case in cases():
        for dtype in case.dtypes:
            x = case.inputs(shapes_of("tiny"), dtype, args.device)
            result = case.run(x)
            if args.check and not case.check(result, x):
                raise Wrong(f"bench: {case.name} {dtype} differs from the reference on {args.device}")
            if args.check:
                check_served(lambda: case.run(x), args.device)
            count += 1
    print(f"{count} small cases {'equal the reference' if args.check else 'called'} on {args.device}")
    return 0


def add_arguments(parser):
    """Options of ``python -m bench small``."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-check", dest="check", action="store_false", help="call them alone: for sanitizers")
    parser.set_defaults(call=small)
