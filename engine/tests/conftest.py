import gc


def pytest_collection_finish(session):
    """What is imported by now stays: the collector need not look at half a million objects again
    and again."""
    gc.collect()
    gc.freeze()
