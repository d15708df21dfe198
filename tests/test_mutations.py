"""What is almost right ends in no traceback, hang or crash: `tests/mutate.py` with a few cases of each kind."""

import mutate
import pytest


@pytest.mark.parametrize("kind", ["rows", "foreign", "configs", "settings"])
def test_mutated_files_and_settings_are_accepted_or_refused_in_one_line(kind):
    ends = mutate.run(kind, 200)
    assert ends["accepted"] > 10 and ends["refused"] > 50


def test_mutated_checkpoints_are_accepted_or_refused_in_one_line():
    ends = mutate.run("checkpoints", 200)
    assert ends["accepted"] > 10 and ends["refused"] > 50
