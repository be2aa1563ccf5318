"""`python -m gateway`: imports the gateway's process, and runs it."""

import gc
import sys


def main() -> int:
    # Nothing that is imported is garbage: looking for some took a fifth of the time. The process
    # turns it on again when all is made.
    gc.disable()
    # Not at the top, for that reason.
    from gateway import process

    return process.main()


if __name__ == "__main__":
    sys.exit(main())
