"""The table of tests/benchmark.py: its code at a small size, and what it counts at the paper's."""

import re

import benchmark
import pytest
from benchmark import PAPER, TOY, WIDTH, L, N, counted, rows_of, table


def test_each_row_is_counted_and_measured_by_the_same_code():
    lines = table(TOY, "cpu", True).splitlines()
    assert re.match(r"20\d\d-\d\d-\d\d, CPU, threads: \d+, torch .*; matrices at .* TFLOP/s$", lines[0])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[0] for row in rows] == list(rows_of(TOY)) and len(rows) == 6
    for name, tflop, seconds, memory, share in rows:
        assert float(tflop) > 0 and float(seconds) > 0 and memory == "-" and share.endswith("%"), name


def test_stage_1_counts_what_a_pencil_counts():
    S = L + 1
    matrices = 12 + 8 + 24  # x S W^2: forward, recomputed but for the last matrix of each block, backward
    attention = (1 + 1 + 2.5) * 2  # x S^2 W; its backward pass computes the logits once more
    blocks = 24 * (matrices * S * WIDTH**2 + attention * S**2 * WIDTH)  # multiply-adds of a clip
    ends = 2 * N * L * 4 + 3 * L * 4 * WIDTH + 3 * WIDTH * 768  # no gradient of the voxels
    by_hand = 2 * 144 * (blocks + ends)
    assert counted(benchmark.stage_1, PAPER, True) == pytest.approx(by_hand, rel=0.01)


def test_the_encoders_count_what_a_pencil_counts():
    tokens, width, layers = 1 + 16**2, 1024, 24
    frame = 2 * layers * (12 * tokens * width**2 + 2 * tokens**2 * width)
    assert counted(benchmark.clip_frames, PAPER, False) == pytest.approx(128 * frame, rel=0.01)
    tokens = 1 + 8 * 16**2
    film = 2 * layers * (12 * tokens * width**2 + 2 * tokens**2 * width)
    assert counted(benchmark.viclip_clips, PAPER, False) == pytest.approx(16 * film, rel=0.01)
