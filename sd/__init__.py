"""What sd_demo.py stands on: run folders, scorers, labels, a pipeline as a policy, a page."""

import os

# It warns, at each start, of image processors that nothing here uses
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class UserError(Exception):
    """What the user can mend, in a sentence: what was wrong, and what to do.

    needs_new_run: going on would end in the same way.
    """

    def __init__(self, message: str, *, needs_new_run: bool = False):
        super().__init__(message)
        self.needs_new_run = needs_new_run
