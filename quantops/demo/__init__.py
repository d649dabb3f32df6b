"""Trains a small CNN on scikit-learn's digits: MSQ from 8 bits down, TruncQuant at 8, 4, 2, 1 bits, CPQ at 2, 3, 4."""

from pathlib import Path

METHODS = ("msq", "truncquant", "cpq")


def add_arguments(parser):
    """Options of ``python -m quantops demo``."""
    parser.add_argument("--method", choices=("all", *METHODS), default="all", help="which demo (default: all of them)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument(
        "--epochs", type=int, help="epochs of every run (default: 60 of msq, 12 of truncquant, 10 of cpq)"
    )
    parser.add_argument("--strength", type=float, default=1e-3, help="msq: lambda of the LSB penalty (default 1e-3)")
    parser.add_argument("--target", type=float, default=12.8, help="msq: compression to stop at (default 12.8)")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder of the figures and the JSON files")


def run(args):
    """The demos that were asked for; 1 where one of them did not show what it is to show."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit(f"the demo needs {error.name}: pip install 'quantops[demo]', or make demo") from None
    if args.seeds < 1 or (args.epochs is not None and args.epochs < 4):
        raise SystemExit(f"--seeds, --epochs: expected at least 1 and 4, got {args.seeds} and {args.epochs}")
    import quantops
    from quantops.demo import cpq, msq, truncquant

    print(quantops.info())
    args.out.mkdir(parents=True, exist_ok=True)
    return max(
        [
            module.run(args)
            for name, module in (("msq", msq), ("truncquant", truncquant), ("cpq", cpq))
            if args.method in ("all", name)
        ]
    )
