"""Where the seconds of the tiny preset go, by stage.

    python benchmarks/loop.py [--json FILE] [any setting of rlhf_minimal.py]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import HERE, report


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    arguments, settings = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, HERE.parent / "rlhf_minimal.py", "--output_dir",
                        Path(folder, "run"), *settings], check=True, stdout=subprocess.DEVNULL)
        results = json.loads(Path(folder, "run", "results.json").read_text(encoding="utf-8"))
    seconds = results["seconds"]
    report({"seconds": seconds, "peak_memory_bytes": results["peak_memory_bytes"],
            "share": {stage: value / seconds["total"] for stage, value in seconds.items()}},
           arguments.json)


if __name__ == "__main__":
    main()
