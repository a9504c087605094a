"""The display of a run in progress."""

from __future__ import annotations

import pytest

from zotune.llm.training.progress import Display, Status


def test_the_time_left_follows_the_speed_of_the_last_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    # The first step takes 100 s, for it fills a cache; each later one takes 1 s and two passes.
    with Display(max_steps=100) as display:
        for step in range(1, 101):
            display.update(Status(step, 100, 0.5, 2 * step, 100.0 + step - 1, 0))
            if step in (1, 40):
                # Without a terminal lines come ten seconds apart.
                display._last_line -= 60
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" · ")[0] for line in lines] == ["step 2/100", "step 41/100", "step 100/100"]
    assert " · 2.0 forwards/s · 1:38 left" in lines[0]
    assert " · 2.0 forwards/s · 0:59 left" in lines[1]


def test_a_slower_phase_is_seen_within_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(max_steps=200) as display:
        for step in range(1, 201):
            # From step 100 on a step takes 4 s.
            seconds = step + 3.0 * max(step - 100, 0)
            if step == 120:
                display._last_line -= 60
            display.update(Status(step, 200, 0.5, 2 * step, seconds, 0))
    (line, last) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 120/200") and " · 0.5 forwards/s · 5:20 left" in line
    assert last.endswith("0:00 left · peak 0 MiB")


def test_a_process_counts_no_steps_of_an_earlier_one(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(max_steps=20) as display:
        # Resumed after 18 steps of an earlier process, whose seconds nobody knows.
        display.update(Status(18, 20, 0.5, 36, 0.0, 0))
        display.update(Status(19, 20, 0.5, 38, 1.0, 0))
        display.update(Status(20, 20, 0.5, 40, 2.0, 0))
    with Display(max_steps=20) as finished:
        finished.update(Status(20, 20, 0.5, 40, 0.0, 0))
    resumed, ended = capsys.readouterr().err.splitlines()
    assert resumed == "step 20/20 · loss 0.5000 · 2.0 forwards/s · 0:00 left · peak 0 MiB"
    assert ended == "step 20/20 · loss 0.5000 · peak 0 MiB"
