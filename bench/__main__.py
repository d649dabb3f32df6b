"""``python -m bench run|steps|static|report|compare``, from the repository's root; see --help of each."""

import argparse
import sys

from bench import compare, report, run, static, steps


def main(argv=None):
    """Command line entry."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for module, name in ((run, "run"), (steps, "steps"), (static, "static"), (report, "report"), (compare, "compare")):
        module.add_arguments(commands.add_parser(name, help=getattr(module, name).__doc__))
    args = parser.parse_args(argv)
    args.argv = argv
    return args.call(args)


if __name__ == "__main__":
    raise SystemExit(main())
