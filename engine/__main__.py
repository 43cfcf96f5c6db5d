"""python -m engine [--preset tiny|student|day|full ...]"""

import sys
from pathlib import Path

# The modules of the top level are ours, whatever lm.py there is in the current folder
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.main import main  # noqa: E402

main(sys.argv[1:])
