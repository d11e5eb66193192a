"""What sd_demo.py stands on: run folders, scorers, labels, a pipeline as a policy, a page."""

import os

# It warns, at each start, of image processors that nothing here uses
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class UserError(Exception):
    """What the user can mend, in a sentence: what was wrong, and what to do."""
