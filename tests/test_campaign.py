"""The campaign's verdicts, and a short form of it."""

import os
import signal
import socket
import time

import pytest
import torch

from tests.campaign import isolation
from tests.campaign.__main__ import AREAS, Campaign, main
from tests.campaign.isolation import Trial, isolated


def raising(error):
    def run():
        raise error

    return run


def asking():
    socket.create_connection(("192.0.2.1", 80), timeout=0.1)


VERDICTS = [
    (lambda: None, "right"),
    (raising(ValueError("a.bin is no model")), "right"),
    (raising(OSError("a.bin is cut off")), "right"),
    (lambda: "other weights", "accepted"),
    (raising(KeyError("a.bin")), "bare"),
    (raising(ValueError("no model")), "unclear"),
    (raising(ValueError("a.bin\nand more")), "unclear"),
    (raising(ValueError("a.bin \x1b[31m")), "unclear"),
    (raising(ValueError("a.bin" * 1000)), "unclear"),
    (raising(MemoryError()), "memory"),
    (lambda: print(torch.ones(2 * 10**8)[0], time.sleep(9)), "memory"),
    (lambda: time.sleep(9), "hang"),
    (lambda: os.kill(os.getpid(), signal.SIGTRAP), "crash"),
    (lambda: os._exit(3), "crash"),
    (lambda: os.system("true") and None, "code"),
    (asking, "code"),
]


@pytest.mark.parametrize(("run", "verdict"), VERDICTS)
def test_verdicts(run, verdict, monkeypatch):
    monkeypatch.setattr(isolation, "SECONDS", 3)
    monkeypatch.setattr(isolation, "BYTES", 5 * 10**8)
    assert isolated(Trial(run, "a.bin")).verdict == verdict


def test_the_same_seed_makes_the_same_trials(tmp_path):
    (area,) = [area(tmp_path) for area in AREAS if area.name == "images"]
    cases = {1: [], 2: []}
    for number in (1, 1, 2):
        campaign = Campaign(7, tmp_path)
        campaign.note = lambda area, case, outcome, number=number: cases[number].append(repr(case))
        campaign.batch(area, number, 3)
    assert cases[1][:3] == cases[1][3:] != cases[2]


def test_the_command(tmp_path, capsys):
    assert main(["--minutes", "0", "--only", "images", "--json", str(tmp_path / "a.json")]) == 0
    assert "| images | " in capsys.readouterr().out
    assert '"images": {"right": ' in (tmp_path / "a.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS, ids=lambda area: area.name)
def test_nothing_is_wrong(area, tmp_path):
    campaign = Campaign(0, tmp_path)
    campaign.batch(area(tmp_path), 0, 15)
    assert not campaign.faults
