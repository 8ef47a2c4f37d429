"""The state machine that decides whom to probe: what silence, hints and helpers lead to."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from gridcloud.grid.swim import (
    IN_FLIGHT,
    SMALL,
    TOLD,
    Changed,
    PeerState,
    Probe,
    ProbeVia,
    Speak,
    Swim,
    Tell,
)


class Table:
    """A machine among peers of which the test says who answers, and how fast time goes."""

    def __init__(self, peers, seed=1):
        self.swim = Swim(random.Random(seed))
        self.now = 0.0
        self.up = {f"p{number}" for number in range(peers)}
        self.through = set()
        self.asked = []
        self.told = []
        self.changed = []
        self.spoke = []
        self.pending = []
        for key in sorted(self.up):
            self.swim.add(key)

    def do(self, actions):
        for action in actions:
            if isinstance(action, Changed | Tell | Speak):
                kept = {Changed: self.changed, Tell: self.told, Speak: self.spoke}
                kept[type(action)].append(action)
                continue
            self.asked.append((self.now, action))
            there = action.key in self.up
            if isinstance(action, ProbeVia):
                there = there or action.key in self.through
            self.pending.append((self.now + (0.01 if there else action.timeout), action, there))

    def pass_time(self, seconds):
        """Let time go in steps, and answers come when they are due."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.05
            due = [each for each in self.pending if each[0] <= self.now]
            self.pending = [each for each in self.pending if each[0] > self.now]
            for _, action, there in due:
                self.do(self.outcome(action, there))
            assert len(self.pending) <= IN_FLIGHT
            self.do(self.swim.tick(self.now))

    def outcome(self, action, there):
        if isinstance(action, ProbeVia):
            answer = self.swim.vouched if there else self.swim.unvouched
            return answer(action.key, self.now)
        if there:
            return self.swim.answered(action.key, self.now, 0.01)
        return self.swim.failed(action.key, self.now)

    def state(self, key):
        return self.swim.seen(key).state

    def probes(self, key, since=0.0):
        return [
            at
            for at, action in self.asked
            if isinstance(action, Probe) and action.key == key and at >= since
        ]


def test_all_of_a_small_grid_are_met_soon():
    """A few of thirty at once, and the rest within two seconds."""
    table = Table(30)
    table.pass_time(0.5)
    assert 3 <= len(table.swim.alive()) <= 6
    table.pass_time(1.5)
    assert set(table.swim.alive()) == table.up


def test_new_peers_are_not_left_until_the_next_turn():
    """Whoever carries out the machine is woken for them, and once they wait, for no earlier."""
    swim = Swim(random.Random(1))
    swim.tick(0.0)
    for number in range(10):
        swim.add(f"p{number}")
    assert swim.wake_at(0.0) <= 0.05
    swim.tick(0.05)
    assert swim.wake_at(0.05) > 0.1


def test_the_rest_waits_while_none_of_the_first_has_answered():
    """Where all are slow, as when a whole host starts, to ask everybody would make it worse."""
    table = Table(30)
    table.do(table.swim.tick(table.now))
    first = {action.key for _, action in table.asked}
    assert len(first) == 3
    table.pending.clear()
    table.pass_time(3)
    assert len(table.asked) == 3
    table.do(table.swim.answered(min(first), table.now, 3.0))
    table.pass_time(0.8)
    assert len(table.asked) <= 5
    table.pass_time(2)
    assert table.up - first <= {action.key for _, action in table.asked}


def test_who_says_a_moment_ago_that_it_is_there_need_not_be_dialled():
    """Its signed word counts whoever brought it; while such words come, the others get time."""
    table = Table(30)
    table.pass_time(0.5)
    for number in range(30):
        table.do(table.swim.spoke(f"p{number}", table.now))
        table.pass_time(0.05)
    assert set(table.swim.alive()) == table.up
    assert len(table.asked) <= 3 + 2 * 2


def test_the_word_of_one_that_is_gone_holds_until_it_is_looked_at():
    """A word can be out of date by a moment: the next look tells, as of anybody."""
    table = Table(6)
    table.pass_time(3)
    table.up.remove("p3")
    table.pass_time(15)
    table.do(table.swim.spoke("p3", table.now))
    assert table.state("p3") is PeerState.ALIVE
    assert not table.swim.seen("p3").direct
    table.pass_time(15)
    assert table.state("p3") is PeerState.DEAD


def test_a_site_that_finds_the_dead_again_says_that_it_is_there_itself():
    """What parted them may have made it dead to the others; said once in a while, not each time."""
    table = Table(10)
    table.pass_time(2)
    lost = {f"p{number}" for number in range(5)}
    table.up -= lost
    table.pass_time(30)
    assert not table.spoke
    table.up |= lost
    table.pass_time(5)
    assert set(table.swim.alive()) == table.up
    assert len(table.spoke) == 1
    assert table.swim._doubted(table.now) == []
    assert table.swim._doubted(table.now + 10) == [Speak()]


def test_news_goes_to_a_few_peers_to_which_there_is_a_link():
    """All that is new goes together, and soon; with nothing new, nothing is told."""
    table = Table(40)
    table.pass_time(0.3)
    met = set(table.swim.alive())
    for number in range(40):
        table.do(table.swim.spoke(f"p{number}", table.now))
    table.told.clear()
    table.pass_time(1)
    assert not table.told
    for _ in range(10):
        table.swim.news(table.now)
    table.pass_time(0.5)
    (told,) = table.told
    assert 1 <= len(told.to) <= TOLD
    assert all(table.swim.seen(key).met for key in told.to)
    assert met


def test_peers_are_probed_in_turn_and_none_is_forgotten():
    """Each is looked at once a round: after two rounds everyone was, at least twice."""
    table = Table(10)
    table.pass_time(3)
    table.asked.clear()
    table.pass_time(2 * 10 * 0.5 * 1.2)
    assert all(2 <= len(table.probes(key)) <= 4 for key in table.up)


def test_a_silent_peer_is_asked_for_through_others_then_suspected_then_dead():
    """No single lost message makes anyone suspect; the dead are told of."""
    table = Table(8)
    table.pass_time(2)
    table.up.remove("p3")
    table.pass_time(12)
    assert table.state("p3") is PeerState.DEAD
    (via,) = [action for _, action in table.asked if isinstance(action, ProbeVia)]
    assert via.key == "p3"
    assert len(via.helpers) == 3
    assert "p3" not in via.helpers
    assert [changed.state for changed in table.changed] == [PeerState.SUSPECT, PeerState.DEAD]
    assert table.told


def test_who_answers_through_others_lives_but_is_not_direct():
    """A helper's proof keeps a peer alive; that we do not reach it is known."""
    table = Table(8)
    table.pass_time(2)
    table.up.remove("p3")
    table.through.add("p3")
    table.pass_time(20)
    assert table.state("p3") is PeerState.ALIVE
    assert not table.swim.seen("p3").direct
    changes = table.swim.changes
    table.up.add("p3")
    table.pass_time(10)
    assert table.swim.seen("p3").direct
    assert table.swim.changes > changes  # its offers count again, and who waits is woken


def test_the_dead_are_redialled_for_ever_and_one_answer_has_all_of_them_tried():
    """Twenty dead: more than a try a second in all; the first that is back brings the rest."""
    table = Table(25)
    table.pass_time(2)
    lost = {f"p{number}" for number in range(20)}
    table.up -= lost
    table.pass_time(60)
    assert all(table.state(key) is PeerState.DEAD for key in lost)
    table.pass_time(600)
    begin = table.now
    table.pass_time(10)
    tries = sum(len(table.probes(key, begin)) for key in lost)
    assert tries >= 15
    table.up |= lost
    table.pass_time(3)
    assert set(table.swim.alive()) == table.up


def test_what_the_dead_say_for_themselves_counts_at_once():
    """A request of the peer itself is proof of life, whoever cannot be reached by us."""
    table = Table(4)
    table.pass_time(2)
    table.up.remove("p1")
    table.pass_time(12)
    table.do(table.swim.heard("p1", table.now))
    assert table.state("p1") is PeerState.ALIVE
    assert table.changed[-1].state is PeerState.ALIVE


def test_a_hint_makes_us_look_and_nothing_else():
    """Told that a living peer is dead, we probe it once, and it stays alive."""
    table = Table(10)
    table.pass_time(2)
    begin = table.now
    table.swim.hint("p1", "p2", PeerState.DEAD, begin)
    assert table.state("p2") is PeerState.ALIVE
    table.pass_time(0.3)
    assert len(table.probes("p2", begin)) >= 1
    assert table.state("p2") is PeerState.ALIVE


def test_hints_are_bounded_by_teller_and_in_all():
    """A thousand hints a second cost a few probes."""
    table = Table(40)
    table.pass_time(3)
    begin = table.now
    for _ in range(10):
        for number in range(2, 40):
            table.swim.hint("p1", f"p{number}", PeerState.DEAD, table.now)
        table.pass_time(0.1)
    probes = [at for at, action in table.asked if at >= begin and isinstance(action, Probe)]
    assert len(probes) <= 16 + 4 + 4  # a burst, the rate of a second, and those in turn


def test_the_same_hint_by_the_same_teller_counts_once_in_a_while():
    """Who repeats itself is not listened to for three seconds; another teller is."""
    table = Table(40)
    table.pass_time(3)
    begin = table.now
    for _ in range(20):
        table.swim.hint("p1", "p2", PeerState.DEAD, table.now)
        table.pass_time(0.1)
    assert len(table.probes("p2", begin)) <= 2
    table.swim.hint("p3", "p2", PeerState.DEAD, table.now)
    table.pass_time(0.1)
    assert len(table.probes("p2", begin)) in (2, 3)


def test_with_a_hint_and_silence_nobody_else_is_asked():
    """Two who found it silent are enough to suspect it: no helpers are troubled."""
    table = Table(10)
    table.pass_time(2)
    table.up.remove("p2")
    table.swim.hint("p1", "p2", PeerState.SUSPECT, table.now)
    table.pass_time(1)
    assert table.state("p2") is PeerState.SUSPECT
    assert not any(isinstance(action, ProbeVia) for _, action in table.asked)
    table.pass_time(1.5)
    assert table.state("p2") is PeerState.DEAD


def test_a_removed_peer_is_let_alone_even_if_an_answer_is_under_way():
    """What comes late for a peer that is no member changes nothing; added again it is anew."""
    table = Table(5)
    table.pass_time(2)
    table.swim.remove("p2")
    table.do(table.swim.answered("p2", table.now, 0.1))
    begin = table.now
    table.pass_time(10)
    assert not table.probes("p2", begin)
    assert "p2" not in table.swim.alive()
    table.swim.add("p2")
    table.pass_time(5)
    assert table.state("p2") is PeerState.ALIVE


def test_a_large_grid_costs_no_more_than_a_small_one():
    """A thousand peers: one probe a second, and state only of those that were met."""
    table = Table(1000)
    table.pass_time(30)
    assert len(table.asked) <= 30 * 1.2 + SMALL
    assert len(table.swim._seen) <= len(table.asked)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["down", "up", "hint", "heard", "remove", "add", "wait"]),
        st.integers(0, 7),
        st.integers(0, 7),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.integers(0, 2**16))
def test_in_the_end_everybody_is_seen_as_they_are(events, seed):
    """Whatever happened in whatever order: once it is quiet, the machine is right about all."""
    table = Table(8, seed)
    members = set(table.up)
    for what, one, other in events:
        key, teller = f"p{one}", f"p{other}"
        if what == "down":
            table.up.discard(key)
        elif what == "up":
            table.up.add(key)
        elif what == "hint" and {key, teller} <= members:
            table.swim.hint(
                teller, key, PeerState(["alive", "suspect", "dead"][one % 3]), table.now
            )
        elif what == "heard" and key in members & table.up:
            table.do(table.swim.heard(key, table.now))
        elif what == "remove" and key in members:
            members.discard(key)
            table.swim.remove(key)
        elif what == "add" and key not in members:
            members.add(key)
            table.swim.add(key)
        else:
            table.pass_time(0.3)
    table.pass_time(25)
    assert set(table.swim.alive()) == members & table.up
    assert all(table.state(key) is PeerState.DEAD for key in members - table.up)


def test_a_slow_site_asks_less_and_waits_longer():
    """What is late here is not taken for a silence there, and makes no more work for anybody."""
    quick, slow = Table(10), Table(10)
    slow.swim.slowness = 5.0
    for table in (quick, slow):
        table.pass_time(10)
        table.asked.clear()
        table.pass_time(20)
        assert set(table.swim.alive()) == table.up
    assert len(slow.asked) < len(quick.asked) / 4
    slow.up.remove("p3")
    slow.pass_time(90)
    assert slow.state("p3") is PeerState.DEAD
    first = min(action.timeout for _, action in slow.asked if isinstance(action, Probe))
    assert first >= 5 * min(
        action.timeout for _, action in quick.asked if isinstance(action, Probe)
    )
