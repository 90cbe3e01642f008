# SPDX-License-Identifier: Apache-2.0
"""`python -m perceptriton`: the command line."""

import sys

from .mlp.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
