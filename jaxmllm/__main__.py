"""Runs the command line: `python -m jaxmllm`."""

import sys

from jaxmllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
