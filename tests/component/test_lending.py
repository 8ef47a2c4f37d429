"""Loans survive crashes on either side, and end with nothing left, whoever is gone for good."""

import json
import secrets
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from gridcloud.access.keys import load_or_create, public_line
from gridcloud.client import starting
from gridcloud.errors import Forbidden
from gridcloud.grid.calling import Caller
from gridcloud.grid.documents import sign
from gridcloud.grid.identity import Identity
from gridcloud.grid.messages import GrantBody, Kind, LeaseBody
from gridcloud.grid.overlay import OverlayTransport
from gridcloud.grid.papers import Membership, Presence, Role
from gridcloud.grid.transport import PeerAddress
from gridcloud.model import JobSpec, JobState, Need
from testbeds.sites import wait_until

pytestmark = pytest.mark.component
HOME = '[providers.local]\ncpus = 1\nmemory = "4G"\n'
LENDER = (
    '[providers.local]\ncpus = 2\nmemory = "4G"\n'
    '[lending]\nenabled = true\ndisk = "1G"\nmax_time = "{}"\n'
)
BORROWED = Need(cpus=2)
#: One line and one mark for each step, and a result at the end.
STEPS = "for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.5; done; echo done > r.txt"


#: Runs a site that never gets to tell a lender that it gives a loan back.
MUTE = """
from gridcloud.errors import Unavailable
from gridcloud.grid.broker import Broker
async def release_lease(self, *arguments):
    raise Unavailable("The lender is away.")
Broker.release_lease = release_lease
from gridcloud.site.__main__ import main
main()
"""


def start_changed(site, program):
    """Start a site's daemon with something changed in it by ``program``."""
    with (site.folder / "site.log").open("ab") as log:
        site.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=site.environment,
            start_new_session=True,
        )
    wait_until(lambda: starting.answers(site.state) or site.process.poll() is not None)


@pytest.fixture
def lend(new_site):
    """Return a function that starts a borrower and a lender in one community."""

    def make(max_time="1h"):
        borrower, lender = new_site("borrower", HOME), new_site("lender", LENDER.format(max_time))
        borrower.start()
        lender.start()
        with borrower.client() as inviter, lender.client() as joining:
            inviter.create_community("physics")
            joining.join_community(inviter.invite("physics").code)
            wait_until(lambda: inviter.offers(BORROWED).plan.winners)
        return borrower, lender

    return make


def submit(site, script, **more):
    """Hand in a job that only the lender can serve; return it once it has printed something."""
    with site.client() as client:
        (job,) = client.submit(JobSpec(command=("sh", "-c", script), need=BORROWED, **more))
        wait_until(lambda: b"".join(client.logs(job.id)) or client.job(job.id)[0].state.final)
        (job,) = client.job(job.id)
    assert job.state is JobState.ACTIVE, (job.message, site.log())
    return job


def wait(site, job):
    with site.client() as client:
        (ended,) = client.wait(job.id, timedelta(seconds=60))
    return ended


def sandboxes(site):
    folder = site.state / "sandboxes"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def leases_lent(site):
    return json.loads(site.cli("status", "--json").stdout)["leases_lent"]


def nothing_left(lender):
    """Whether no loan, no sandbox and no process but the daemon is left at a running lender."""
    return (
        not sandboxes(lender) and lender.left() == [lender.process.pid] and not leases_lent(lender)
    )


def test_the_lender_is_killed_while_the_job_runs(lend, tmp_path):
    """The sandbox goes on; the lender started again lets its guest back in at the same address."""
    borrower, lender = lend()
    before = lender.cli("site", "show", "--json").stdout
    job = submit(borrower, STEPS, outputs=("r.txt",), into=str(tmp_path / "out"))
    lender.kill()
    assert lender.left()
    lender.start()
    after = lender.cli("site", "show", "--json").stdout
    assert json.loads(after)["gateway_address"] == json.loads(before)["gateway_address"]
    ended = wait(borrower, job)
    assert ended.state is JobState.COMPLETED, (ended, borrower.log())
    assert (tmp_path / "out" / "r.txt").read_text() == "done\n"
    assert borrower.cli("logs", job.id).stdout.split() == list("12345678")
    wait_until(lambda: nothing_left(lender))


def test_the_borrower_is_killed_while_its_job_runs(lend, tmp_path):
    """Started again it finds its job at the peer; all output is there, once."""
    borrower, lender = lend()
    job = submit(borrower, STEPS, outputs=("r.txt",), into=str(tmp_path / "out"))
    borrower.kill()
    borrower.start()
    ended = wait(borrower, job)
    assert ended.state is JobState.COMPLETED, (ended, borrower.log())
    assert (tmp_path / "out" / "r.txt").read_text() == "done\n"
    assert borrower.cli("logs", job.id).stdout.split() == list("12345678")
    assert "found again" in borrower.cli("events", job.id).stdout
    wait_until(lambda: nothing_left(lender))


def test_both_are_killed_while_the_job_runs(lend):
    """Started again in either order they take the job to its end."""
    borrower, lender = lend()
    job = submit(borrower, STEPS)
    borrower.kill()
    lender.kill()
    borrower.start()
    lender.start()
    assert wait(borrower, job).state is JobState.COMPLETED
    assert borrower.cli("logs", job.id).stdout.split() == list("12345678")
    wait_until(lambda: nothing_left(lender))


def test_cancel_reaches_a_lender_that_was_away(lend):
    """Canceled while both are down, the job is ended once both are back."""
    borrower, lender = lend()
    job = submit(borrower, "echo begun; sleep 300")
    lender.kill()
    with borrower.client() as client:
        client.cancel(job.id)
    borrower.kill()
    lender.start()
    assert leases_lent(lender) == 1
    borrower.start()
    assert wait(borrower, job).state is JobState.CANCELED, borrower.log()
    wait_until(lambda: nothing_left(lender))
    wait_until(lambda: not list((borrower.state / "keys" / "loans").iterdir()))


def test_what_could_not_be_given_back_is_given_back_after_a_restart(lend):
    """A borrower that is killed before its lender heard of the release says it again."""
    borrower, lender = lend()
    borrower.stop()
    start_changed(borrower, MUTE)
    with borrower.client() as client:
        (job,) = client.submit(JobSpec(command=("true",), need=BORROWED))
        assert client.wait(job.id, timedelta(seconds=60))[0].state is JobState.COMPLETED
        assert client.status().leases_borrowed == 1
    borrower.kill()
    assert leases_lent(lender) == 1
    borrower.start()
    wait_until(lambda: nothing_left(lender))
    with borrower.client() as client:
        wait_until(lambda: client.status().leases_borrowed == 0)


def test_a_borrower_that_never_comes_back(lend):
    """Its loan ends at its end, and the lender has its capacity again."""
    borrower, lender = lend("5s")
    submit(borrower, "echo begun; setsid sleep 300 & sleep 300")
    borrower.kill()
    assert sandboxes(lender)
    wait_until(lambda: nothing_left(lender), 40)


def test_both_never_come_back(lend):
    """With no site alive at all, the keeper ends the sandbox when the lease ends."""
    borrower, lender = lend("5s")
    submit(borrower, "echo begun; setsid sleep 300 & sleep 300")
    borrower.kill()
    lender.kill()
    assert lender.left()
    wait_until(lambda: not lender.left(), 20)


def test_a_job_is_told_that_its_lease_ended(lend):
    """A job that outlasts its loan fails for that reason, and the site asks no further."""
    borrower, lender = lend("5s")
    job = submit(borrower, "echo begun; sleep 300")
    ended = wait(borrower, job)
    assert ended.state is JobState.FAILED, ended
    assert "lease" in ended.message
    wait_until(lambda: nothing_left(lender))


def test_a_lender_that_lost_its_store_removes_what_it_cannot_account_for(lend):
    """Sandboxes without a lease go at its start; the borrower's job ends with a cause."""
    borrower, lender = lend()
    job = submit(borrower, "echo begun; setsid sleep 300 & sleep 300")
    lender.kill()
    for path in lender.state.glob("site.db*"):
        path.unlink()
    assert sandboxes(lender)
    lender.start()
    wait_until(lambda: nothing_left(lender))
    ended = wait(borrower, job)
    assert ended.state is JobState.FAILED, ended
    assert "does not let" in ended.message


async def test_a_stranger_gets_no_lease(lend, tmp_path):
    """Who is no member is refused, whatever membership it has written for itself."""
    _, lender = lend()
    shown = json.loads(lender.cli("site", "show", "--json").stdout)
    (community,) = shown["communities"]
    stranger = Identity.generate()
    transport = OverlayTransport(stranger)

    async def deaf(_key, _message):
        return b""

    def now():
        return datetime.now(UTC)

    membership = Membership(
        community=community,
        member=stranger.key,
        site_name="stranger",
        roles=tuple(Role),
        issued_at=now(),
        issuer=stranger.key,
    )
    presence = Presence(site=stranger.key, addresses=(), issued_at=now())
    body = LeaseBody(
        community=community,
        credential=sign(stranger, membership),
        presence=sign(stranger, presence),
        request_id="x-1",
        need=BORROWED,
        user="eve",
        ssh_public_key=public_line(load_or_create(tmp_path / "key")),
    )
    peer = PeerAddress(key=shown["key"], addresses=tuple(shown["grid_addresses"]))
    await transport.start(deaf)
    try:
        with pytest.raises(Forbidden, match="not a member"):
            await Caller(transport, now).ask(peer, Kind.LEASE, body, GrantBody, 10)
    finally:
        await transport.close()
    assert nothing_left(lender)


def test_the_gateway_lets_in_only_the_holder_of_the_lease(lend, tmp_path):
    """With OpenSSH: the loan's own files work; another's, a bare key, or after release do not."""
    borrower, lender = lend()
    job = submit(borrower, "echo begun; sleep 300")
    (lease,) = sandboxes(lender)
    loans = borrower.state / "keys" / "loans"
    key, certificate = tmp_path / "key", tmp_path / "key-cert.pub"
    key.write_bytes((loans / lease).read_bytes())
    key.chmod(0o600)
    certificate.write_bytes((loans / f"{lease}-cert.pub").read_bytes())
    host, port = json.loads(lender.cli("site", "show", "--json").stdout)["gateway_address"].split(
        ":"
    )

    def ssh(user, identity, *more):
        command = ["ssh", "-F", "none", "-p", port, "-l", user, "-i", identity, *more]
        for option in (
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "BatchMode=yes",
            "StrictHostKeyChecking=no",
            f"UserKnownHostsFile={tmp_path / 'known'}",
        ):
            command += ["-o", option]
        return subprocess.run(
            [*command, host, "hostname; ls jobs"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    assert ssh(lease, key).stdout.startswith("guest\n")
    assert "Permission denied" in ssh(secrets.token_hex(8), key).stderr
    bare = tmp_path / "bare"
    bare.write_bytes(key.read_bytes())
    bare.chmod(0o600)
    assert "Permission denied" in ssh(lease, bare).stderr
    forward = ssh(lease, key, "-W", "127.0.0.1:22")
    assert forward.returncode != 0
    assert borrower.cli("cancel", job.id).returncode == 0
    wait_until(lambda: nothing_left(lender))
    assert "Permission denied" in ssh(lease, key).stderr

    other = submit(borrower, "echo begun; sleep 300")
    (second,) = sandboxes(lender)
    assert second != lease
    assert "Permission denied" in ssh(second, key).stderr
    assert borrower.cli("cancel", other.id).returncode == 0


RECALLABLE = '[[lending.rules]]\ncommunity = "physics"\nnotice = "{}"\n'


def rewrite(site, text):
    """Replace a site's settings, as an editor does."""
    new = site.folder / "settings.new"
    new.write_text(f'name = "{site.name}"\n{text}')
    new.replace(site.settings_file)


def test_a_loan_is_recalled_at_its_owners_word(lend):
    """It ends after its notice though it was lent for longer; the borrower's job learns of it."""
    borrower, lender = lend()
    rewrite(lender, LENDER.format("1h") + RECALLABLE.format("3s"))
    wait_until(lambda: "by 1 rule" in lender.cli("site", "show").stdout)
    job = submit(borrower, "echo begun; setsid sleep 300 & sleep 300", resubmit=0)
    (loan,) = json.loads(lender.cli("lent", "--json").stdout)
    assert loan["person"].endswith("@borrower")
    assert (loan["recalled"], loan["notice"]) == ("", "PT3S")
    assert loan["lease_id"] in lender.cli("lent").stdout
    ended = lender.cli("lent", "end", loan["lease_id"])
    assert ended.returncode == 0, ended
    wait_until(lambda: nothing_left(lender), 40)
    assert "recall told" in lender.log()
    failed = wait(borrower, job)
    assert (failed.state, failed.outcome.reason) == (JobState.FAILED, "recalled")
    assert "recalled the machine before the job was done" in failed.message


def test_a_loan_is_lengthened_while_its_job_runs(lend):
    """The borrower asks in time, the owner agrees by its rules of now, and all of the loan goes by
    the later end: its sandbox, its certificate, and what both sides keep."""
    borrower, lender = lend("15s")
    job = submit(borrower, "while true; do date +%s; sleep 0.3; done", resubmit=0)

    def end():
        (loan,) = json.loads(lender.cli("lent", "--json").stdout)
        return datetime.fromisoformat(loan["ends_at"])

    first = end()
    rewrite(lender, LENDER.format("1h"))
    wait_until(lambda: "the lease was lengthened" in borrower.cli("events", job.id).stdout)
    assert end() >= first + timedelta(seconds=15)

    def printed():
        with borrower.client() as client:
            return int(b"".join(client.logs(job.id)).split()[-1])

    wait_until(lambda: printed() > first.timestamp() + 2)
    assert borrower.cli("cancel", job.id).returncode == 0
    assert wait(borrower, job).state is JobState.CANCELED
    wait_until(lambda: nothing_left(lender))
    wait_until(lambda: "agreed" in borrower.cli("receipts", "list").stdout)


def test_a_loan_without_notice_is_ended_at_once_or_not_at_all(lend):
    """Its owner has to say that it means now; the borrower finds the place gone."""
    borrower, lender = lend()
    job = submit(borrower, "echo begun; setsid sleep 300 & sleep 300", resubmit=0)
    (lease,) = sandboxes(lender)
    refused = lender.cli("lent", "end", lease)
    assert "without a notice" in refused.stderr
    assert refused.returncode == 73
    assert leases_lent(lender) == 1
    assert lender.cli("lent", "end", "--now", lease).returncode == 0
    wait_until(lambda: nothing_left(lender), 40)
    assert wait(borrower, job).state is JobState.FAILED
    assert "nothing is lent" in lender.cli("lent").stdout
    assert lender.cli("lent", "end", "nosuch").returncode == 66


def test_a_new_policy_holds_without_a_restart(lend):
    """Who is asked next goes by the new file; a broken one is told and changes nothing."""
    borrower, lender = lend()
    job = submit(borrower, "echo begun; sleep 300")
    pid = lender.process.pid
    rewrite(lender, LENDER.format("1h") + '[[lending.rules]]\ncommunity = "chemistry"\n')
    wait_until(lambda: "no rule is for them any more" in lender.cli("status").stdout)
    assert "rule 1 is for chemistry, which this site is not in" in lender.cli("status").stdout
    assert sandboxes(lender), "what runs goes on"
    rewrite(lender, LENDER.format("1h") + '[[lending.rules]]\ncomunity = "physics"\n')
    wait_until(lambda: "comunity: there is no such setting" in lender.cli("status").stdout)
    assert "line 10" in lender.cli("status").stdout
    assert borrower.cli("cancel", job.id).returncode == 0
    wait_until(lambda: nothing_left(lender))
    with borrower.client() as client:
        wait_until(lambda: not client.offers(BORROWED).plan.winners)
        day = f"{datetime.now() + timedelta(days=3):%A}".lower()
        rewrite(lender, LENDER.format("1h") + f'[[lending.rules]]\nhours = "{day}"\n')
        closed = f"closed until {day[:3].title()} 00:00"
        wait_until(lambda: closed in borrower.cli("offers", "--cpus", "2").stdout)
        rewrite(lender, LENDER.format("1h"))
        wait_until(lambda: client.offers(BORROWED).plan.winners)
    assert "problem" not in lender.cli("status").stdout
    assert lender.process.pid == pid


def test_lending_is_switched_on_while_the_site_runs(new_site):
    """The gateway opens, and peers are offered what there is, without a restart."""
    borrower, lender = new_site("borrower", HOME), new_site("lender", "")
    borrower.start()
    lender.start()
    with borrower.client() as inviter, lender.client() as joining:
        inviter.create_community("physics")
        joining.join_community(inviter.invite("physics").code)
        rewrite(lender, LENDER.format("1h"))
        wait_until(lambda: inviter.offers(Need(cpus=2)).plan.winners)
        (job,) = inviter.submit(JobSpec(command=("true",), need=BORROWED))
        assert inviter.wait(job.id, timedelta(seconds=60))[0].state is JobState.COMPLETED


def test_a_lender_killed_after_a_recall_still_ends_the_loan(lend):
    """With the owner's site gone, the sandbox's own keeper goes by the new end."""
    borrower, lender = lend()
    rewrite(lender, LENDER.format("1h") + RECALLABLE.format("4s"))
    wait_until(lambda: "by 1 rule" in lender.cli("site", "show").stdout)
    submit(borrower, "echo begun; setsid sleep 300 & sleep 300", resubmit=0)
    (lease,) = sandboxes(lender)
    assert lender.cli("lent", "end", lease).returncode == 0
    lender.kill()
    borrower.kill()
    assert lender.left()
    wait_until(lambda: not lender.left(), 20)


def test_own_users_come_first(lend):
    """A job of the lender's own recalls the loan in its way, and runs once its notice is over."""
    borrower, lender = lend()
    rewrite(lender, LENDER.format("1h") + RECALLABLE.format("3s"))
    wait_until(lambda: "by 1 rule" in lender.cli("site", "show").stdout)
    job = submit(borrower, "echo begun; sleep 300", resubmit=0)
    with lender.client() as client:
        (own,) = client.submit(JobSpec(command=("echo", "mine"), need=BORROWED, site="lender"))
        (ended,) = client.wait(own.id, timedelta(seconds=60))
    assert ended.state is JobState.COMPLETED, (ended, lender.log())
    assert wait(borrower, job).state is JobState.FAILED
    assert "own users need it" in lender.log()
    assert "own users need it" in borrower.cli("events", job.id).stdout
    wait_until(lambda: nothing_left(lender))
