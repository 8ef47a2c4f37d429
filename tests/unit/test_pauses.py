"""A job that everybody refuses for good does not ask them for ever at the same pace."""

from gridcloud.orchestration.pauses import Pauses


def test_a_job_refused_again_and_again_pauses_longer_each_time():
    """The first places may be tried at once; then the pause doubles, up to five minutes."""
    pauses = Pauses()
    assert [pauses.refused("a", 0.0) for _ in range(10)] == [
        *(0.0, 0.0),
        *(10.0, 20.0, 40.0, 80.0, 160.0),
        *(300.0, 300.0, 300.0),
    ]
    assert not pauses.over("a", 299.0)
    assert pauses.over("a", 300.0)
    assert pauses.over("b", 0.0), "others do not wait for it"


def test_a_job_that_found_a_place_begins_anew():
    """What was held against it before is forgotten."""
    pauses = Pauses()
    for _ in range(5):
        pauses.refused("a", 0.0)
    assert pauses.news("a", "no")
    pauses.forget("a")
    assert pauses.over("a", 0.0)
    assert pauses.refused("a", 0.0) == 0.0
    assert pauses.news("a", "no")


def test_the_same_word_is_told_once():
    """So that a job's events tell what is new, and do not grow without end."""
    pauses = Pauses()
    said = [pauses.news("a", text) for text in ("no", "no", "not now", "not now", "no")]
    assert said == [True, False, True, False, True]
