"""For all tests: one thread, and the garbage collector told that what is imported stays."""

import gc

import torch

torch.set_num_threads(1)


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()  # half a million objects, which it would look at again and again
