"""``tokenrelay eval`` measures what it says, and its last line is for programs."""

from __future__ import annotations

import json
from pathlib import Path

from tests.service.test_cli import run


def test_a_row_for_each_choice(smollm2_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 3)
    options = ("--quantization", "none,int4", "--context", "16", "--text", str(text), "--model", str(smollm2_path))
    done = run("eval", "perplexity", *options)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    plain, small = measured["rows"]
    assert (plain["quantization"], small["quantization"]) == ("none", "int4")
    assert small["weight_bytes"] < plain["weight_bytes"] / 2
    assert 1 < plain["perplexity"] < 1000
    assert small["perplexity"] < plain["perplexity"] * 1.2
    assert plain["prefill_tokens_per_second"] > 0 < plain["decode_tokens_per_second"]
