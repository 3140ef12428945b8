"""The queue on disk: states by rename, nothing lost and nothing doubled across a restart."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chestct.errors import SpoolError, SpoolFullError
from chestct.pacs.queue import Spool, spool_status

SERIES, OTHER = "1.2.3", "1.2.4"


@pytest.fixture
def spool(tmp_path):
    opened = Spool(tmp_path / "queue", 10_000)
    yield opened
    opened.close()


def reopened(spool: Spool) -> Spool:
    spool.close()
    return Spool(spool.folder, 10_000)


def names(spool: Spool, state: str) -> list[str]:
    return sorted(path.name for path in (spool.folder / state).rglob("*") if path.is_file())


def complete_now(spool: Spool) -> str | None:
    return spool.complete(1e-9, at_release=False)


def test_series_is_complete_after_quiet_time_alone(spool):
    name = spool.put(SERIES, "1", b"a", sender=1)
    assert spool.complete(60, at_release=False) is None
    time.sleep(0.05)
    assert spool.complete(0.04, at_release=False) == name


def test_series_is_complete_when_all_its_associations_were_released(spool):
    name = spool.put(SERIES, "1", b"a", sender=1)
    spool.put(SERIES, "2", b"b", sender=2)
    spool.end_sender(1, is_release=True)
    assert spool.complete(60, at_release=True) is None
    spool.end_sender(2, is_release=True)
    assert spool.complete(60, at_release=False) is None
    assert spool.complete(60, at_release=True) == name


def test_lost_association_completes_nothing(spool):
    spool.put(SERIES, "1", b"a", sender=1)
    spool.end_sender(1, is_release=False)
    assert spool.complete(60, at_release=True) is None


def test_object_sent_again_takes_the_place_of_the_first(spool):
    spool.put(SERIES, "1", b"a" * 10, sender=1)
    name = spool.put(SERIES, "1", b"b" * 7, sender=1)
    (file,) = (spool.folder / "incoming" / name).iterdir()
    assert file.read_bytes() == b"b" * 7
    assert spool.num_bytes == 7


def test_more_than_the_queue_may_hold_is_refused_until_there_is_room(spool):
    name = spool.put(SERIES, "1", b"a" * 9_000, sender=1)
    with pytest.raises(SpoolFullError, match="expected at most 10000"):
        spool.put(SERIES, "2", b"a" * 1_001, sender=1)
    assert names(spool, "incoming") == names(spool, f"incoming/{name}")
    assert len(names(spool, "incoming")) == 1
    folder, _ = spool.claim(name)
    spool.finish(folder, keep=False)
    assert spool.num_bytes == 0
    spool.put(SERIES, "2", b"a" * 1_001, sender=1)


def test_no_uid_is_in_a_name_and_two_queues_name_a_series_differently(spool, tmp_path):
    name = spool.put(SERIES, "7.7.7", b"a", sender=1)
    other = Spool(tmp_path / "other", 100)
    assert other.put(SERIES, "7.7.7", b"a", sender=1) != name
    other.close()
    for path in spool.folder.rglob("*"):
        assert SERIES not in path.name
        assert "7.7.7" not in path.name


def test_path_in_a_uid_leads_nowhere(spool):
    spool.put("../../../tmp/x", "/etc/passwd", b"a", sender=1)
    assert len(names(spool, "incoming")) == 1


def test_restart_finds_what_was_received(spool):
    name = spool.put(SERIES, "1", b"abc", sender=1)
    again = reopened(spool)
    assert complete_now(again) == name
    assert again.num_bytes == 3


def test_restart_takes_a_claimed_series_back_and_joins_it_with_what_came_later(spool):
    name = spool.put(SERIES, "1", b"one", sender=1)
    spool.claim(name)
    spool.put(SERIES, "2", b"two!", sender=1)
    again = reopened(spool)
    assert spool_status(again.folder)["classifying"] == 0
    assert complete_now(again) == name
    folder, tries = again.claim(name)
    assert sorted(path.read_bytes() for path in folder.glob("*.dcm")) == [b"one", b"two!"]
    assert tries == 2
    assert again.num_bytes == 7


def test_claims_that_come_to_no_end_are_counted_but_not_those_given_back(spool):
    name = spool.put(SERIES, "1", b"one", sender=1)
    for _ in range(3):
        assert spool.claim(name)[1] == 1
        spool.give_back(name)
        assert complete_now(spool) == name
    spool.claim(name)
    spool.give_back(name, counts=True)
    assert spool.claim(name)[1] == 2


def test_answer_survives_a_restart_and_what_was_sent_is_not_sent_again(spool):
    name = spool.put(SERIES, "1", b"one", sender=1)
    spool.claim(name)
    spool.answer(name, {"sr": b"report", "sc": b"capture"})
    ((_, results),) = spool.unsent()
    assert [path.name for path in results] == ["sc.dcm", "sr.dcm"]
    spool.mark_sent(results[0])
    again = reopened(spool)
    assert complete_now(again) is None
    ((folder, results),) = again.unsent()
    assert [path.read_bytes() for path in results] == [b"report"]
    assert again.num_bytes == len(b"onereportcapture")
    again.mark_sent(results[0])
    again.finish(folder, keep=False)
    assert not again.unsent()
    assert again.num_bytes == 0
    assert not any(spool_status(again.folder).values())


def test_half_an_answer_is_made_again(spool):
    """As after a crash between writing the results and the rename of the series."""
    name = spool.put(SERIES, "1", b"one", sender=1)
    folder, _ = spool.claim(name)
    (folder / "results").mkdir()
    (folder / "results" / "sr.dcm").write_bytes(b"rep")
    again = reopened(spool)
    assert again.num_bytes == 3
    assert not again.unsent()
    folder, _ = again.claim(name)
    assert [path.read_bytes() for path in folder.rglob("*.dcm")] == [b"one"]


def test_kept_and_failed_series_stay_with_their_reason(spool):
    for series in (SERIES, OTHER):
        spool.put(series, "1", b"one", sender=1)
    first, second = complete_now(spool), None
    spool.finish(spool.claim(first)[0], keep=True)
    second = complete_now(spool)
    spool.fail(spool.claim(second)[0], "because")
    status = spool_status(spool.folder)
    assert (status["kept"], status["failed"], status["incoming"]) == (1, 1, 0)
    (reason,) = spool.folder.glob("failed/*/reason.txt")
    assert reason.read_text() == "because\n"
    assert spool.num_bytes == 6


def test_second_process_cannot_open_the_same_queue(spool):
    code = (
        "import sys\nfrom pathlib import Path\nfrom chestct.pacs.queue import Spool\n"
        "Spool(Path(sys.argv[1]), 100)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, spool.folder], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "another process has this queue open" in done.stderr


def test_folder_that_cannot_be_used_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="cannot be used as a queue"):
        Spool(tmp_path / "file", 100)


WRITER = """
import sys
from pathlib import Path
from chestct.pacs.queue import Spool
spool = Spool(Path(sys.argv[1]), 10**9)
for number in range(10**6):
    spool.put(f"1.{number % 7}", f"2.{number}", b"%08d" % number * 1000, 1)
    print(number, flush=True)
    if number % 7 == 6:
        name = spool.complete(1e-9, at_release=False)
        spool.claim(name)
        spool.answer(name, {"sr": b"x" * 100})
"""


@pytest.mark.parametrize("seed", range(4))
def test_what_was_acknowledged_is_there_after_kill_9(tmp_path, seed):
    folder = tmp_path / "queue"
    command = [sys.executable, "-c", WRITER, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        acknowledged = [int(writer.stdout.readline()) for _ in range(30 + 17 * seed)]
        writer.kill()
        acknowledged += [int(line) for line in writer.stdout.read().split()]
    spool = Spool(folder, 10**9)
    found = {
        int(path.read_bytes()[:8])
        for path in folder.rglob("*.dcm")
        if path.parent.name != "results" and path.stat().st_size == 8_000
    }
    assert set(acknowledged) <= found
    # One more may have been written and not been acknowledged any more.
    assert len(found) <= len(acknowledged) + 1
    assert all(path.stat().st_size in (100, 8_000) for path in folder.rglob("*.dcm")), (
        "a half-written file has a name"
    )
    assert os.listdir(folder / "tmp") == []
    assert os.listdir(folder / "classifying") == []
    spool.close()


def test_status_of_a_folder_that_is_not_there_is_empty(tmp_path):
    assert not any(spool_status(Path(tmp_path / "none")).values())
