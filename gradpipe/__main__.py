"""The command `pipe`, from its first moment: a signal is answered while libraries still load."""

import signal
import sys
from types import FrameType


def main() -> None:
    """Run `gradpipe.cli`; stopped as it starts or ends, say so in one line and exit with 75."""
    asked = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        from gradpipe import cli  # noqa: PLC0415 (it takes a moment)

        if not asked:  # else the exception was lost in a library's finaliser
            cli.main()
            return
    except KeyboardInterrupt:
        pass
    sys.stderr.write("pipe: interrupted: run the same command again\n")
    sys.exit(75)


if __name__ == "__main__":
    main()
