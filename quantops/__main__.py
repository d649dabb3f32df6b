"""``python -m quantops`` prints which kernels serve which device; ``demo`` trains on real data; ``show FILE`` tells
what a file of integer weights, or of a whole model, holds."""

import argparse

from quantops.version import __version__


def main():
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m quantops", description=__doc__)
    parser.add_argument("--version", action="version", version=f"quantops {__version__}")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("info", help="which implementation serves which device (the default)")
    from quantops import demo

    demo.add_arguments(commands.add_parser("demo", help=demo.__doc__))
    commands.add_parser("show", help="what a file of save_int or save_model holds").add_argument("file")
    args = parser.parse_args()
    if args.command == "show":
        from quantops import modelfile
        from quantops.intfile import show

        try:
            print(show(args.file, {modelfile.FORMAT: modelfile.describe}))
        except (OSError, ValueError, ImportError) as error:
            raise SystemExit(f"quantops: {error}") from None
        return 0
    if args.command == "demo":
        return demo.run(args)
    import quantops

    print(quantops.info())
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("\ninterrupted")
        raise SystemExit(130) from None
