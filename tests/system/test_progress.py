import pytest

from ctrl_diffusion.system.progress import delayed, silent


@pytest.mark.parametrize(("seconds", "opened"), [(1e9, []), (-1.0, [("reading", 5), 2, 1])])
def test_a_bar_opens_only_for_what_takes_a_while(seconds, opened):
    seen = []

    def phase(what, total):
        seen.append((what, total))
        return lambda n, note: seen.append(n)

    advance = delayed(phase, "reading", 5, seconds)
    advance(2)
    advance()
    assert seen == opened


def test_a_silent_phase_may_be_advanced():
    assert silent("reading", 5)(2, note="half") is None
