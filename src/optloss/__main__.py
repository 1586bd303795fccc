"""``python -m optloss``: train on the bundled digits."""

import sys


def main() -> int:
    """Run the demo, or say in one line what it needs."""
    try:
        from optloss import demo
    except ImportError as error:
        print(
            f"optloss: the demo needs {error.name}. pip install 'optloss[demo]'",
            file=sys.stderr,
        )
        return 1
    return demo.main()


if __name__ == "__main__":
    sys.exit(main())
