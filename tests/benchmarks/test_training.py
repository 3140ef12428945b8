from __future__ import annotations

import json

import pytest

from benchmarks.training import main


@pytest.mark.slow
@pytest.mark.xdist_group("timing")
def test_speed_up_is_measured_on_the_same_layers(phantoms, tmp_path, capsys):
    (tmp_path / "train.yaml").write_text(
        f"scans: {phantoms.scans}\nsplit: {phantoms.split}\nweights: random\nepochs: 4\n"
        "augmented_copies: 0\n"
    )
    output = tmp_path / "training.json"
    arguments = ["--config", str(tmp_path / "train.yaml"), "--output", str(output)]
    assert main([*arguments, "--num-scans", "8", "--repeats", "1"]) == 0
    result = json.loads(output.read_text())
    assert result["scans"] == 8
    assert result["plain_epoch_s"] > result["cached_epoch_s"] > 0
    total = result["epochs"] * result["plain_epoch_s"]
    cached = result["copies"] * result["fill_one_copy_s"] + 4 * result["cached_epoch_s"]
    assert abs(result["training_speed_up"] - total / cached) < 0.2 * total / cached
    assert "times faster" in capsys.readouterr().out
