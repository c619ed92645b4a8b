"""`python -m fastgpt.parity`: the command `fastgpt parity`."""

import sys

from fastgpt.parity.table import main

sys.exit(main())
