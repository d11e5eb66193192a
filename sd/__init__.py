"""What sd_demo.py stands on: run folders, scorers, labels, a pipeline as a policy, a page."""

import os

# It warns, at each start, of image processors that nothing here uses
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class UserError(Exception):
    """What the user can mend, in a sentence: what was wrong, and what to do.

    new_run: it takes other settings than the run has; resumed, the run would end again.
    """

    def __init__(self, message: str, *, new_run: bool = False):
        super().__init__(message)
        self.new_run = new_run
