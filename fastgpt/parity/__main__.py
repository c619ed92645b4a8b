"""`python -m fastgpt.parity`: the command `fastgpt parity`."""

import sys

from fastgpt.parity.command import main

sys.exit(main())
