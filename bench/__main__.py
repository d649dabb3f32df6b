"""``python -m bench COMMAND``, from the repository's root; see --help, and that of each command."""

import argparse
import sys

from bench import headline
from bench.machine_code import static, variants
from bench.ops import compare, report, run, small, steps
from bench.state import Wrong
from bench.training import costs, kept, tables, train


def main(argv=None):
    """Command line entry."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for module in (run, steps, static, small, report, compare, train, costs, kept, tables, headline, variants):
        name = module.__name__.rpartition(".")[2]
        module.add_arguments(commands.add_parser(name, help=getattr(module, name).__doc__))
    args = parser.parse_args(argv)
    args.argv = argv
    try:
        return args.call(args)
    except Wrong as why:
        print(why, file=sys.stderr)
        raise


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured is kept, and --resume goes on from there")
        raise SystemExit(130) from None
