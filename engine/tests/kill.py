"""Kill a small run again and again, let it resume, and print how it ended. Not a test by itself:
test_engine_run.py calls `python engine/tests/kill.py FOLDER MODE KILLS` and compares what is left
in FOLDER.

Each run is a fork of this process, which has done nothing but import (seconds saved each time), so
that a kill is a real SIGKILL of a real process. MODE "time": at a random moment. MODE "write": at a
random one of the moments inside a write (WRITES).
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import matplotlib.pyplot  # noqa: E402, F401
import torch  # noqa: E402

from engine import folder as folder_file  # noqa: E402
from engine.main import main as run  # noqa: E402

SMALL = ("--seed 3 --toy_posts 640 --toy_comparisons 320 --toy_held_out 24 --ppo_episodes 192 "
         "--ppo_batch_size 32 --ppo_epochs 2 --judge_every 2 --judge_during 8 --judge_posts 16 "
         "--best_of_n 2 --response_length 16 --toy_width 32 --save_seconds 0.1").split()


WRITES = {  # the kinds of moments inside a write, and about how many of each a run has
    "half a line": 60, "half a checkpoint": 8, "half a text": 6, "before a rename": 15,
    "after a rename": 15}


def die_inside_write(kind, number, kinds):
    """Kill this process at the number-th moment of that kind; a line in the file kinds says so."""
    left = [number]

    def now(this):
        left[0] -= this == kind
        return this == kind and left[0] == 0

    def die():
        with open(kinds, "a", encoding="utf-8") as file:
            file.write(kind + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    def replace(source, target, really=os.replace):
        if now("before a rename"):
            die()
        really(source, target)
        if now("after a rename"):
            die()

    def save_file(tensors, path, really=folder_file.save_file):
        really(tensors, path)
        if now("half a checkpoint"):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def write_text(path, text, really=Path.write_text, **encoding):
        if now("half a text"):
            really(path, text[: len(text) // 2], **encoding)
            die()
        really(path, text, **encoding)

    class Torn:
        def __init__(self, *arguments, **keywords):
            self.file = open(*arguments, **keywords)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, line):
            if now("half a line"):
                self.file.write(line[: len(line) // 2])
                die()
            self.file.write(line)

    os.replace, folder_file.save_file = replace, save_file
    Path.write_text, folder_file.open = write_text, Torn


def start(folder, before=lambda: None):
    """Fork a run; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        out = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        torch.set_num_threads(1)
        before()
        try:
            run([*SMALL, "--resume", "--output_dir", str(folder)])
        except SystemExit as stop:
            print(stop)
            sys.stdout.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    return child


def finish(child):
    """Wait; True if it ended by itself, False if it was killed."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        sys.exit("a run ended with an error, see the .log beside its folder")
    return True


def main():
    folder, mode, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    random.seed(mode + folder.name)
    began = time.perf_counter()
    finish(start(folder / "whole"))
    seconds = time.perf_counter() - began
    print(f"never stopped: {seconds:.1f} s", flush=True)
    chain = 0
    while kills > 0:
        ended = False
        while not ended:
            if mode == "time":
                child = start(folder / f"chain{chain}")
                deadline = time.perf_counter() + random.uniform(0, seconds)
                while time.perf_counter() < deadline and not os.waitid(
                        os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    time.sleep(0.002)
                os.kill(child, signal.SIGKILL)
            else:
                kind = list(WRITES)[kills % len(WRITES)]
                number = random.randint(1, WRITES[kind])
                child = start(folder / f"chain{chain}",
                              lambda: die_inside_write(kind, number, folder / "kinds.txt"))
            ended = finish(child)
            kills -= not ended
        chain += 1
    print(f"chains: {chain}")


if __name__ == "__main__":
    main()
