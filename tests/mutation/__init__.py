"""Do the tests notice? One thing is changed at a time, and the tests that should notice are run.

`PYTHONPATH=tests python -m mutation --help`; docs/mutation.md says what came of it.
"""
