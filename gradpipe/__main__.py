"""The command `pipe`, from its first moment: a signal is answered while libraries still load."""

import signal
import sys


def main() -> None:
    """Run `gradpipe.cli`; stopped as it starts or ends, say so in one line and exit with 75."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        from gradpipe.pipeline.interrupt import loading  # noqa: PLC0415 (not before signals count)

        with loading():
            from gradpipe import cli  # noqa: PLC0415 (it takes a moment)
        cli.main()
    except KeyboardInterrupt:
        sys.stderr.write("pipe: interrupted: run the same command again\n")
        sys.exit(75)


if __name__ == "__main__":
    main()
