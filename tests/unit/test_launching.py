"""The state machine of a launch."""

from datetime import timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from gridcloud.errors import (
    Conflict,
    Forbidden,
    InvalidSpec,
    NoCapacity,
    NotFound,
    Throttled,
    TimedOut,
    Unavailable,
)
from gridcloud.model.machine import LaunchStep
from gridcloud.providers.cloud.launching import (
    Clear,
    Do,
    Finished,
    GiveUp,
    Launching,
    Look,
    Pause,
)
from gridcloud.providers.cloud.section import Patience

STEPS = list(LaunchStep)
FINAL = [InvalidSpec, NotFound, Forbidden, Conflict]
PASSING = [Unavailable, TimedOut, Throttled]
PLACES = ("north", "south", "east")


class Clock:
    """Plays a launch: each decision is answered by the next of ``answers``, ``"ok"`` at their end;
    carrying out takes ``cost`` seconds. Keeps all that was decided."""

    def __init__(self, answers=(), cost=0.1, places=PLACES, there=False):
        self.now, self.cost, self.places, self.there = 100.0, cost, places, there
        self.answers = iter(answers)
        self.state = Launching.begin(Patience(), "seed", self.now)
        self.decided = []

    def play(self, most=10_000):
        """Go on until the end; return the last decision."""
        for _ in range(most):
            decision = self.state.decide(self.now)
            self.decided.append((self.now, decision))
            match decision:
                case Finished() | GiveUp():
                    return decision
                case Pause(seconds, _):
                    assert seconds > 0
                    self.now += seconds
                case _:
                    self.now += self.cost
                    self.answer(decision, next(self.answers, "ok"))
        raise AssertionError("it never ends")

    def answer(self, decision, answer):
        """Tell the state what became of a decision."""
        if isinstance(answer, Exception):
            self.state = self.state.failed(answer, self.now)
        elif isinstance(decision, Clear):
            self.state = self.state.cleared(self.now)
        elif isinstance(decision, Look):
            self.state = self.state.looked(self.now, there=answer == "there")
        elif decision.step is LaunchStep.PLACE:
            self.state = self.state.placed(self.places, self.now, there=self.there)
        else:
            self.state = self.state.succeeded(self.now)

    @property
    def done(self):
        """Steps that were carried out or tried, with their places."""
        return [(d.step, d.place) for _, d in self.decided if isinstance(d, Do)]


def until(step, *then):
    """Return answers: all well before ``step``, then these."""
    return ["ok"] * STEPS.index(step) + list(then)


errors = st.sampled_from([*FINAL, *PASSING, NoCapacity]).map(lambda kind: kind("Because."))
answers = st.lists(st.one_of(st.just("ok"), st.just("there"), errors), max_size=60)


@settings(deadline=None)
@given(answers, st.floats(0.0, 200.0), st.booleans())
def test_it_ends_and_clears_away_what_it_made(answers, cost, there):
    """Whatever happens it ends in a bounded time; and unless the machine is ready, what was made
    was cleared away last, or the error says that it was not."""
    clock = Clock(answers, cost, there=there)
    last = clock.play()
    patience = Patience()
    limits = sum(patience.limit(step).total_seconds() for step in STEPS)
    clears = sum(isinstance(d, Clear) for _, d in clock.decided)
    assert clock.now - 100 <= len(PLACES) * (2 * limits + 20 * (cost + 15)) + clears * cost
    made = [i for i, (_, d) in enumerate(clock.decided) if isinstance(d, Do) and d.place]
    if isinstance(last, GiveUp) and made:
        cleared = [i for i, (_, d) in enumerate(clock.decided) if isinstance(d, Clear)]
        assert cleared
        assert cleared[-1] > made[-1]
    if isinstance(last, Finished):
        assert clock.done[-1][0] is LaunchStep.SETUP


@settings(deadline=None)
@given(answers, st.booleans())
def test_steps_come_in_order_and_places_only_once(answers, there):
    """No step is tried before all earlier ones succeeded here; no place is gone back to."""
    clock = Clock(answers, there=there)
    clock.play()
    places = [place for _, place in clock.done if place]
    assert sorted(places, key=PLACES.index) == places
    for (before, _), (after, _) in zip(clock.done, clock.done[1:], strict=False):
        back = after is LaunchStep.NETWORK
        on = STEPS.index(after) - STEPS.index(before) in {0, 1}
        skipped = after is LaunchStep.REACHABLE  # the machine was found
        assert back or on or skipped


@settings(deadline=None)
@given(st.sampled_from(STEPS), st.sampled_from(FINAL))
def test_what_no_other_attempt_can_mend_ends_it(step, kind):
    """The error is raised as it came, and nothing is tried after it but to clear away."""
    error = kind("It is wrong.")
    clock = Clock(until(step, error))
    last = clock.play()
    assert isinstance(last, GiveUp)
    assert last.error is error
    assert last.step is step
    assert clock.done[-1][0] is step
    assert [step for step, _ in clock.done].count(step) == 1


@settings(deadline=None)
@given(st.sampled_from(STEPS), st.sampled_from(PASSING), st.integers(1, 4))
def test_what_may_pass_is_tried_again(step, kind, times):
    """A few errors that pass do not end it, at whichever step."""
    clock = Clock(until(step, *[kind("Not now.")] * times))
    assert isinstance(clock.play(), Finished)
    assert clock.done[-1][0] is LaunchStep.SETUP


@settings(deadline=None)
@given(st.sampled_from(STEPS))
def test_each_step_has_its_own_time(step):
    """One that never succeeds is given up when its time is over, not before half of it, and the
    error says what took too long and why."""

    class Never:
        def __init__(self):
            self.left = STEPS.index(step)

        def __iter__(self):
            return self

        def __next__(self):
            self.left -= 1
            return "ok" if self.left >= 0 else Unavailable("It is down.")

    clock = Clock(places=("north",))
    clock.answers = Never()
    last = clock.play()
    assert isinstance(last, GiveUp)
    assert last.error.retryable
    begin = next(at for at, d in clock.decided if isinstance(d, Do) and d.step is step)
    limit = Patience().limit(step).total_seconds()
    assert limit / 2 <= clock.now - begin <= limit + 1
    assert "did not succeed within" in last.error.message or "not all" in str(last.error).lower()


def test_no_capacity_goes_to_the_next_place_after_clearing_away():
    """Each place is tried; in between, and in the end, what was made is removed."""
    full = NoCapacity("Full.", hint="Wait.")
    here = ["ok", "ok", full, "ok"]  # network, volumes, create, clear
    clock = Clock([*["ok"] * 3, *here * 3])
    last = clock.play()
    assert isinstance(last, GiveUp)
    assert isinstance(last.error, NoCapacity)
    assert [place for step, place in clock.done if step is LaunchStep.CREATE] == list(PLACES)
    assert sum(isinstance(d, Clear) for _, d in clock.decided) == 3
    for place in PLACES:
        assert f"{place}: Full." in last.error.message
    assert last.error.hint == "Wait."


def test_a_machine_that_could_not_be_built_is_tried_elsewhere():
    """A failure seen while waiting for it counts as a lack of capacity."""
    clock = Clock(until(LaunchStep.REACHABLE, NoCapacity("No valid host.")))
    assert isinstance(clock.play(), Finished)
    assert clock.state.place == "south"


def test_no_place_at_all_is_a_lack_of_capacity():
    """A shape that is made nowhere is refused."""
    last = Clock(places=()).play()
    assert isinstance(last, GiveUp)
    assert isinstance(last.error, NoCapacity)


def test_an_unclear_create_is_looked_for_before_it_is_repeated():
    """After a time-out it looks three times, then asks for the network again and creates again."""
    clock = Clock(until(LaunchStep.CREATE, TimedOut("No answer."), "no", "no", "no"))
    assert isinstance(clock.play(), Finished)
    decided = [d for _, d in clock.decided if not isinstance(d, Pause)]
    first = next(i for i, d in enumerate(decided) if isinstance(d, Do) and d.step == "create")
    assert [type(d) for d in decided[first + 1 : first + 4]] == [Look] * 3
    assert [d.step for d in decided[first + 4 : first + 7]] == ["network", "volumes", "create"]
    assert {d.place for d in decided[first + 4 : first + 7]} == {"north"}


def test_a_machine_that_is_found_is_not_made_again():
    """A look that finds it goes on with waiting for it."""
    clock = Clock(until(LaunchStep.CREATE, Unavailable("500."), "no", "there"))
    assert isinstance(clock.play(), Finished)
    assert [step for step, _ in clock.done].count(LaunchStep.CREATE) == 1


def test_an_earlier_machine_is_only_waited_for():
    """A launch that begins again does not make what is there."""
    clock = Clock(there=True)
    assert isinstance(clock.play(), Finished)
    assert LaunchStep.CREATE not in {step for step, _ in clock.done}


def test_an_earlier_machine_that_failed_is_cleared_away_first():
    """Then all places are tried, the first too."""
    clock = Clock()
    for _ in range(2):
        clock.state = clock.state.succeeded(clock.now)
    clock.state = clock.state.placed(PLACES, clock.now, there=True, broken=True)
    assert isinstance(clock.state.decide(clock.now), Clear)
    assert isinstance(clock.play(), Finished)
    assert clock.state.place == "north"


def test_a_cloud_that_wants_to_be_left_alone_is():
    """The pause is at least what it asked for; longer than the step may take ends it."""
    clock = Clock([Throttled("Slow down.", after_seconds=20.0)])
    assert isinstance(clock.play(), Finished)
    assert clock.decided[2][0] - clock.decided[1][0] >= 20.0
    last = Clock([Throttled("Slow down.", after_seconds=3600.0)]).play()
    assert isinstance(last, GiveUp)


def test_what_could_not_be_removed_is_told():
    """The error says what went wrong first, and that something may have stayed."""
    first, second = Forbidden("No permission.", hint="Ask."), Unavailable("It is down.")
    last = Clock(until(LaunchStep.CREATE, first, second)).play()
    assert isinstance(last, GiveUp)
    assert last.error is first
    assert "Ask. Not all that was made is removed yet, and it is tried again: It is down." in str(
        last.error
    )


def test_nothing_is_cleared_that_was_never_made():
    """An unknown image costs no more calls."""
    clock = Clock([NotFound("There is no such image.")])
    assert isinstance(clock.play(), GiveUp)
    assert not any(isinstance(d, Clear) for _, d in clock.decided)


def test_patience_is_a_setting():
    """Each step's time can be set; the usual ones are those of the documentation."""
    patience = Patience(create=timedelta(seconds=5))
    assert patience.limit(LaunchStep.CREATE) == timedelta(seconds=5)
    assert patience.limit(LaunchStep.READY) == timedelta(minutes=15)
