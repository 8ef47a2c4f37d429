"""Two real sites keep accounts: what one lent the other borrowed, proved by files alone."""

import json
import sys
from datetime import timedelta

import pytest

from gridcloud.model import JobSpec, JobState, Need
from gridcloud.model.usage import ReceiptState
from testbeds.sites import wait_until

pytestmark = pytest.mark.component
HOME = '[providers.local]\ncpus = 1\nmemory = "4G"\n'
LENDER = (
    '[providers.local]\ncpus = 2\nmemory = "4G"\n'
    '[lending]\nenabled = true\ndisk = "1G"\nmax_time = "1h"\n'
    '[[lending.rules]]\ncommunity = "physics"\n'
    "prices = { cpu_hour = 3.0, memory_gib_hour = 0.5 }\n"
)


@pytest.fixture
def pair(new_site):
    """Return a borrower and a lender in one community."""
    borrower, lender = new_site("borrower", HOME), new_site("lender", LENDER)
    borrower.start()
    lender.start()
    with borrower.client() as inviter, lender.client() as joining:
        inviter.create_community("physics")
        joining.join_community(inviter.invite("physics").code)
        wait_until(lambda: inviter.offers(Need(cpus=2)).plan.winners)
    return borrower, lender


def run_there(site, script="true"):
    """Run a job that only the lender can serve."""
    with site.client() as client:
        (job,) = client.submit(JobSpec(command=("sh", "-c", script), need=Need(cpus=2)))
        (ended,) = client.wait(job.id, timedelta(seconds=60))
    assert ended.state is JobState.COMPLETED, (ended, site.log())


def listed(site):
    with site.client() as client:
        return client.receipts()


def settled(site, number):
    return [each.state for each in listed(site)] == [ReceiptState.AGREED] * number


def rows(site, *more):
    report = json.loads(site.cli("usage", "--json", *more).stdout)
    assert (report["open"], report["disputed"], report["missing"]) == (0, 0, 0)
    return report["rows"]


def test_both_sides_keep_the_same_accounts(pair, tmp_path):
    """Figures agree to the last digit; either's books are verified with no site running; one
    altered bit is found, and the receipt named."""
    borrower, lender = pair
    for _ in range(2):
        run_there(borrower)
    wait_until(lambda: settled(lender, 2) and settled(borrower, 2))
    (lent,), (borrowed,) = rows(lender), rows(borrower)
    assert (lent["side"], borrowed["side"]) == ("lent", "borrowed")
    assert lent["figures"] == borrowed["figures"]
    hours = lent["figures"]["cpu_hours"]
    assert 0 < hours < 0.1
    assert lent["figures"]["gb_hours"] == pytest.approx(hours / 2)
    assert lent["figures"]["credits"] == pytest.approx(hours * 3.25, abs=1e-5)
    (by_site,) = rows(borrower, "--by", "site")
    assert by_site["group"] == "lender"
    assert lender.cli("usage", "--csv").stdout == lender.cli("usage", "--csv").stdout
    assert "sum" in lender.cli("usage").stdout
    first = listed(lender)[0]
    shown = lender.cli("receipts", "show", first.id[:12])
    assert first.lease_id in shown.stdout

    community = json.loads(lender.cli("community", "list", "--json").stdout)[0]["id"]
    files = [tmp_path / "lender.jsonl", tmp_path / "borrower.jsonl"]
    for site, file in zip((lender, borrower), files, strict=True):
        done = site.cli("receipts", "export", str(file))
        assert done.returncode == 0, done.stderr
        assert site.stop() == 0
    nowhere = {"GRIDCLOUD_STATE": str(tmp_path / "nowhere"), "HOME": str(tmp_path)}

    def verify(*arguments):
        return lender.cli("receipts", "verify", *map(str, arguments), env=nowhere)

    done = verify("--community", community, *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 receipts, 0 not countersigned, nothing wrong" in done.stdout
    assert not (tmp_path / "nowhere").exists()

    content = bytearray(files[0].read_bytes())
    at = content.rindex(b'{"receipt":"') + 400
    content[at] ^= 1
    files[0].write_bytes(content)
    line = content[:at].count(b"\n") + 1
    done = verify(files[0])
    assert done.returncode == 1
    assert f"{files[0]}, line {line}: " in done.stdout


#: Runs a site that dies once the receipt of a loan is made, before the loan is over in its store.
DYING = """
import os
from gridcloud.site.accounting import Accounting
loan_ended = Accounting.loan_ended
async def die(self, lease, grant):
    await loan_ended(self, lease, grant)
    os.kill(os.getpid(), 9)
Accounting.loan_ended = die
from gridcloud.site.__main__ import main
main()
"""


def test_a_lender_killed_at_the_end_of_a_loan_makes_one_receipt(pair, start_changed):
    """Neither none nor two, and it is shown once the lender is back."""
    borrower, lender = pair
    lender.stop()
    start_changed(lender, DYING)
    run_there(borrower)
    lender.process.wait(60)
    lender.start()
    wait_until(lambda: settled(lender, 1) and settled(borrower, 1))
    with lender.client() as client:
        wait_until(lambda: client.status().leases_lent == 0)
    assert len(listed(lender)) == 1


def test_a_borrower_that_was_away_countersigns_when_it_is_back(pair):
    """Until then the lender says that it is not countersigned yet, and where to look."""
    borrower, lender = pair
    with borrower.client() as client:
        (job,) = client.submit(JobSpec(command=("sleep", "300"), need=Need(cpus=2)))
        wait_until(lambda: client.job(job.id)[0].state is JobState.ACTIVE)
    borrower.kill()
    (loan,) = json.loads(lender.cli("lent", "--json").stdout)
    assert lender.cli("lent", "end", loan["lease_id"], "--now").returncode == 0
    wait_until(lambda: listed(lender))
    assert json.loads(lender.cli("receipts", "list", "--disputed", "--json").stdout)
    assert "1 not countersigned yet" in lender.cli("usage").stdout
    borrower.start()
    wait_until(lambda: settled(lender, 1) and settled(borrower, 1), 90)


@pytest.fixture
def start_changed():
    """Return a function that starts a site's daemon with something changed in it."""
    import subprocess

    from gridcloud.client import starting

    def start(site, program):
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

    return start
