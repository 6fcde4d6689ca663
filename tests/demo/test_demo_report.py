"""What the demo reports and asks."""

from __future__ import annotations

import json

import msgspec

from kvstrata.demo.prompts import demo_prompts
from kvstrata.demo.report import COLUMNS, DemoReport, HitTokens, Phase


def phase(name: str, hits: HitTokens, *, equal: bool = True) -> Phase:
    return Phase(name, 100, hits, 0.5, 2.0, equal)


def test_json_has_the_documented_fields():
    report = DemoReport((phase("l1", HitTokens(l1=100)),))
    assert json.loads(msgspec.json.encode(report)) == {
        "phases": [
            {
                "name": "l1",
                "prompt_tokens": 100,
                "hit_tokens": {"l1": 100, "redis": 0, "disk": 0},
                "ttft_seconds": 0.5,
                "speedup": 2.0,
                "answer_equal": True,
            }
        ]
    }


def test_one_row_per_phase():
    rows = DemoReport((phase("cold", HitTokens()), phase("disk", HitTokens(disk=99), equal=False))).rows()
    assert [len(row) for row in rows] == [len(COLUMNS)] * 2
    assert rows[1] == ("disk", "100", "0", "0", "99", "0.50", "2.0x", "NO")


def test_shortcomings():
    good = (phase("cold", HitTokens()), phase("l1", HitTokens(l1=99)), phase("redis", HitTokens(redis=100)))
    assert DemoReport(good).shortcomings() == []
    bad = (phase("l1", HitTokens(disk=100)), phase("shared_prefix", HitTokens(), equal=False))
    assert DemoReport(bad).shortcomings() == [
        "the answer of phase shared_prefix differs",
        "l1 supplied 0 of 100 tokens",
    ]


def test_hits_since():
    assert HitTokens(5, 6, 7).since(HitTokens(1, 2, 3)) == HitTokens(4, 4, 4)


def test_prompts_share_exactly_their_first_half():
    first, second = demo_prompts(lambda text: [hash(word) for word in text.split()], 800)
    assert len(first) == len(second) == 800
    assert first[:400] == second[:400]
    assert first[400:420] != second[400:420]
