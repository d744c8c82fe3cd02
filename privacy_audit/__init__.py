"""May this release leave? Compares surrogate tiles with the private ones and returns a verdict with its evidence.

One test is one module and returns one `TestResult`; the runner puts them in order and the worst status is the
verdict. Nothing here trains, samples or sends anything.
"""
