"""``python -m simulation``: see `simulation.campaign`, which worker processes can import."""

import sys

from simulation.campaign import main

sys.exit(main())
